"""Hugging Face modules: match, verify, swap, restore."""
