"""Hugging Face modules: load, match, verify, swap, restore."""
