"""The operations before and after the model in a decoding step."""

from .op import begin_step, end_step
from .reference import NO_TOKEN

__all__ = ["NO_TOKEN", "begin_step", "end_step"]
