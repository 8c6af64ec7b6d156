"""Weights: quantized and packed forms, checkpoint formats, and the weights that a model carries."""
