"""Weights in 4 or 8 bits: the neutral form, checkpoint formats, and methods that find the codes."""
