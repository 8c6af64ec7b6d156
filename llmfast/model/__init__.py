"""Hugging Face modules: load, match, prove, swap, restore."""
