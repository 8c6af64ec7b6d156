from .op import apply_rope, rope_write_kv

__all__ = ["apply_rope", "rope_write_kv"]
