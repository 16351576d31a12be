"""Clipping as a part of the optimizer's step."""

from .on_step import ClipOnStep, clip_on_step

__all__ = ["ClipOnStep", "clip_on_step"]
