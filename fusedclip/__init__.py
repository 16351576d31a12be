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

__version__ = _version("fusedclip")

__all__ = [
    "adaptive",
    "amp",
    "backends",
    "clip_grad_norm_",
    "clip_grad_norm_per_tensor_",
    "clip_grad_norm_scopes_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_per_tensor_norms",
    "get_total_norm",
    "monitor",
    "optim",
    "patch_torch",
]
