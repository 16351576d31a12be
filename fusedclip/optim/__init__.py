"""Clipping as a part of the optimizer's step."""

from .adamw import AdamW
from .on_step import ClipOnStep, clip_on_step
from .sgd import SGD

__all__ = ["SGD", "AdamW", "ClipOnStep", "clip_on_step"]
