from .op import gelu_mul, gelu_tanh_mul, silu_mul

__all__ = ["gelu_mul", "gelu_tanh_mul", "silu_mul"]
