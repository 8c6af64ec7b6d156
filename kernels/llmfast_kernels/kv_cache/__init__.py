from .op import write_kv

__all__ = ["write_kv"]
