"""Limits that follow the norms they have seen, one file per published method; their state stays on the device::

    rule = fusedclip.adaptive.ZClip()
    norm = rule.clip_(model.parameters())                       # in place of clip_grad_norm_(..., max_norm)
    fusedclip.optim.clip_on_step(optimizer, rule)               # or: wherever a limit is
    checkpoint["clip"] = rule.state_dict()

- `AutoClip`: a percentile of the norms so far
- `ZClip`: spikes by their z-score
- `AdaGC`, `EMAClip`: each parameter by the running norm of its own gradient
- `SkipSpikes`: leaves the step out

Without a state, called like `clip_grad_norm_`:

- `adaptive_clip_grad_`: AGC, each unit by the norm of its weights
- `clip_by_block_rms_`: each tensor by its root mean square
- `kl_clip_`: a preconditioned step by the change that it makes
"""

from ..rules import AdaptiveEachRule, AdaptiveRule, Proposal
from .adagc import AdaGC
from .agc import adaptive_clip_grad_
from .autoclip import AutoClip
from .block_rms import clip_by_block_rms_
from .ema_clip import EMAClip
from .kl_clip import kl_clip_
from .skip_spikes import SkipSpikes
from .zclip import ZClip

__all__ = [
    "AdaGC",
    "AdaptiveEachRule",
    "AdaptiveRule",
    "AutoClip",
    "EMAClip",
    "Proposal",
    "SkipSpikes",
    "ZClip",
    "adaptive_clip_grad_",
    "clip_by_block_rms_",
    "kl_clip_",
]
