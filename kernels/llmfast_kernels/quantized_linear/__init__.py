"""Linear layers with weights of four or eight bits, dequantized inside the multiplication."""

from .formats import pack_int4, pack_int8, unpack_int4, unpack_int8
from .op import int4_linear, int8_linear
from .workspace import free_workspaces, workspace_bytes

__all__ = [
    "free_workspaces",
    "int4_linear",
    "int8_linear",
    "pack_int4",
    "pack_int8",
    "unpack_int4",
    "unpack_int8",
    "workspace_bytes",
]
