"""Linear layers of few tokens, where reading the weights is all the time it takes."""

from .int4_layout import pack_int4, unpack_int4
from .int4_op import int4_linear
from .int8_layout import pack_int8, unpack_int8
from .int8_op import int8_linear
from .op import dense_linear, gated_linear
from .workspace import free_workspaces, workspace_bytes

__all__ = [
    "dense_linear",
    "free_workspaces",
    "gated_linear",
    "int4_linear",
    "int8_linear",
    "pack_int4",
    "pack_int8",
    "unpack_int4",
    "unpack_int8",
    "workspace_bytes",
]
