"""From raw logits to a token: penalties, temperature, filters and the draw."""

from .op import sample_tokens
from .reference import Sampled

__all__ = ["Sampled", "sample_tokens"]
