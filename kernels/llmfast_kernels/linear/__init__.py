"""Linear layers of few tokens, where reading the weights is all the time it takes."""

from .int4_layout import pack_int4, unpack_int4
from .int4_op import int4_linear
from .int4_workspace import free_int4_workspaces, int4_workspace_bytes
from .int8_op import int8_linear
from .op import dense_linear, gated_linear

__all__ = [
    "dense_linear",
    "free_int4_workspaces",
    "gated_linear",
    "int4_linear",
    "int4_workspace_bytes",
    "int8_linear",
    "pack_int4",
    "unpack_int4",
]
