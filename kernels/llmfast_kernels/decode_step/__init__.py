"""What stands before and after a model in a step of decoding."""

from .op import begin_step, end_step

__all__ = ["begin_step", "end_step"]
