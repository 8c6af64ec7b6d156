"""Linear layers of few tokens, where reading the weights is all the time it takes."""

from .op import dense_linear, gated_linear

__all__ = ["dense_linear", "gated_linear"]
