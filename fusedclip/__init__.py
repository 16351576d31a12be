"""Gradient clipping for PyTorch that reads every gradient once and writes only when it clips."""

from importlib.metadata import version as _version

from . import adaptive, amp, backends, monitor, optim
from .clip import (
    clip_grad_norm_,
    clip_grad_norm_per_tensor_,
    clip_grad_norm_scopes_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_per_tensor_norms,
    get_total_norm,
)
from .patch import patch_torch
from .stats import GradStats, clip_grad_norm_with_stats_, get_grad_stats

__version__ = _version("fusedclip")

__all__ = [
    "GradStats",
    "adaptive",
    "amp",
    "backends",
    "clip_grad_norm_",
    "clip_grad_norm_per_tensor_",
    "clip_grad_norm_scopes_",
    "clip_grad_norm_with_stats_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_grad_stats",
    "get_per_tensor_norms",
    "get_total_norm",
    "monitor",
    "optim",
    "patch_torch",
]
