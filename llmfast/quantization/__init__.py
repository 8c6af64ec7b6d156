"""Quantization: methods that find codes, the driver over a model's layers, and saving."""
