from .op import flash_attention, flash_attention_varlen
from .paged_op import paged_attention

__all__ = ["flash_attention", "flash_attention_varlen", "paged_attention"]
