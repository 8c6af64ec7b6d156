"""Linear layers in 16 bits, for few tokens, which are bound by reading the weights."""

from .op import dense_linear, gated_linear

__all__ = ["dense_linear", "gated_linear"]
