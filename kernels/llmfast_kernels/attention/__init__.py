from .op import flash_attention, flash_attention_varlen

__all__ = ["flash_attention", "flash_attention_varlen"]
