"""Benchmarks and evaluation: timing, whole models, quality and results files."""
