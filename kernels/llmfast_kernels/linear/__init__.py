"""Linear layers of few tokens, where reading the weights is all the time it takes."""

from .int4_layout import pack_int4, unpack_int4
from .int4_op import int4_linear
from .op import dense_linear, gated_linear

__all__ = ["dense_linear", "gated_linear", "int4_linear", "pack_int4", "unpack_int4"]
