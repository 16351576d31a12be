"""Clipping as a part of the optimizer's step.

A step pre-hook clips, either by scaling the gradients where that is needed, or by handing the coefficient to torch's
fused optimizers, which divide every gradient by `grad_scale` and skip the step where `found_inf` is 1.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsFloat

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from . import norms, passes
from ._fused_step import Stepping, any_of, divides, is_nested, make_momentum, refuse_dampening
from .grads import Gradients, gather
from .norms import ClipRule
from .torch_internals import outside_graphs, refuse_tracing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Limit = SupportsFloat | Tensor
Hooked = tuple[tuple[Any, ...], dict[str, Any]]


def clip_on_step(
    optimizer: Optimizer,
    max_norm: Limit,
    norm_type: SupportsFloat = 2.0,
    *,
    on_nonfinite: Literal["propagate", "skip"] = "propagate",
    defer: bool | None = None,
    group: "ProcessGroup | None" = None,
) -> "ClipOnStep":
    """Make an optimizer clip its gradients at the start of every `step()`, until `handle.remove()`.

    Equivalent, in every training loop that has an `optimizer.step()`::

        clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], max_norm, norm_type)
        optimizer.step()

    With `step(closure)` the gradients are clipped whenever the closure has made them (LBFGS calls it many times).
    With a torch GradScaler the norm is that of the unscaled gradients, whether `scaler.unscale_` was called before or
    `scaler.step` leaves the unscaling to a fused optimizer.

    Args:
        optimizer: any torch.optim.Optimizer. A param group with an entry "max_norm" (a number or a 0-d tensor; None
            counts as absent) is clipped by itself to that; all other groups together to `max_norm`. The entry is read
            at each step.
        max_norm, norm_type: as in `fusedclip.clip_grad_norm_`. A max_norm tensor on the CPU is read once, now.
        on_nonfinite: with a NaN or an inf in any gradient, "propagate" clips as `fusedclip.clip_grad_norm_` does and
            steps; "skip" leaves parameters and optimizer state as they are, by `found_inf`. Neither waits for the
            device. "skip" needs an Adam, AdamW, SGD or Adagrad (no subclass) with fused=True.
        defer: True never writes the gradients here but hands 1 / coefficient to a fused Adam, AdamW, SGD or Adagrad,
            which divides by it (`.grad` then holds the clipped gradients after the step; 1 / coefficient is fp32, as
            torch's kernels want it). False scales the gradients before the step, where there is something to clip.
            None defers where that moves fewer bytes for certain: with these optimizers on the CPU, and wherever a
            GradScaler has them divide anyway; else, and with fp64 gradients, it scales. Subclasses of them may do
            anything with their gradients, so they are always scaled. A coefficient below 3e-39 comes out as 0 when it
            is deferred. Hooks that run after this one are handed a stand-in of the optimizer when it is.
        group: as in `fusedclip.clip_grad_norm_`. Every rank must step, with the same "max_norm" entries.

    Returns:
        A handle with `total_norm`, `clip_coef`, `group_norms` and `remove()`.

    Raises:
        TypeError: for something that is not a torch optimizer with hooks, such as another library's wrapper of one.
        ValueError: for a limit or an order that is not one; for `defer=True` or "skip" where the optimizer has no
            kernel for it; for `defer=True` with a group's own "max_norm"; for "skip" with an SGD that has momentum and
            dampening; if the optimizer clips on step already.
        What `fusedclip.clip_grad_norm_` raises, it raises from `step()`; nothing has been stepped then.

    `torch.compile` of the step works with `defer` None or False: the gradients are scaled before the graph runs.

    Nothing is kept on the optimizer but the hook: its state_dict, zero_grad, schedulers and pickling are torch's (a
    pickled or copied optimizer loses the hook, as it loses every hook).
    """
    # What None knows: beyond the read for the norm, scaling costs 2 N (the bytes of the gradients, read and written) at
    # the steps that clip, and else nothing. Deferring costs 1 N, as torch's fused kernels write the gradient back
    # whenever they are given a grad_scale: at every step, unless the host can see that nothing is clipped, which it can
    # on the CPU. Measured there, GPT-2 124M in fp32 on two cores, (clip + step) / step:
    #
    #                     not clipped         clipped
    #                   scales   defers   scales   defers
    #     AdamW          1.25     1.25     1.57     1.36      (a grad_scale of 1 at the steps that don't clip: 1.37)
    #     SGD, momentum  1.29     1.29     1.77     1.54
    if on_nonfinite not in ("propagate", "skip"):
        raise ValueError(f"on_nonfinite must be 'propagate' or 'skip', got {on_nonfinite!r}")
    limit, p = norms.check_max_norm(max_norm), norms.check_norm_type(norm_type)
    handle = ClipOnStep(limit, p, on_nonfinite == "skip", defer, group)
    handle._register(optimizer)
    return handle


class ClipOnStep:
    """What `clip_on_step` returns: what the last step did, and the way to end it. None waits for the device."""

    total_norm: Tensor | None = None
    """The norm before clipping at the last step, of all param groups without a "max_norm" of their own: 0-d, fp32 (fp64
    if any gradient is), on the first gradient's device. None before the first step."""

    clip_coef: Tensor | None = None
    """What the clip multiplied these gradients by, in the same dtype and place: 1 where nothing was clipped."""

    group_norms: dict[int, Tensor]
    """By index, the norm of each param group that has a "max_norm" of its own."""

    def __init__(
        self, limit: float | Tensor, p: float, skip: bool, defer: bool | None, group: "ProcessGroup | None"
    ) -> None:
        self._limit, self._p, self._skip, self._defer, self._group = limit, p, skip, defer, group
        self._hook: RemovableHandle | None = None
        self.group_norms = {}

    def remove(self) -> None:
        """Stop clipping; the optimizer has nothing of ours then. Calling it again does nothing."""
        if self._hook is not None:
            self._hook.remove()

    def _register(self, optimizer: Optimizer) -> None:
        if any(isinstance(getattr(hook, "__self__", None), ClipOnStep) for hook in _pre_hooks(optimizer).values()):
            raise ValueError(f"this {type(optimizer).__name__} clips on step already; remove() the other handle first")
        self._check(optimizer)
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def _check(self, optimizer: Optimizer) -> None:
        """Whether the optimizer, as it is now, can do what was asked for: its groups may have changed."""
        if self._defer and any(group.get("max_norm") is not None for group in optimizer.param_groups):
            raise ValueError(
                "defer=True hands the optimizer one coefficient for all its gradients, but a param group has a "
                "max_norm of its own; leave defer at None"
            )
        if (self._defer or self._skip) and not divides(optimizer):
            asked = "defer=True" if self._defer else "on_nonfinite='skip'"
            raise ValueError(
                f"{asked} needs an Adam, AdamW, SGD or Adagrad with fused=True, whose kernels take grad_scale and "
                f"found_inf; this {type(optimizer).__name__} has none"
            )
        if self._skip and isinstance(optimizer, torch.optim.SGD):
            refuse_dampening(optimizer)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked | None:
        if torch.compiler.is_compiling():
            self._before_compiled_step(optimizer, args, kwargs)
            return None
        if is_nested(optimizer):
            return None  # a subclass's step called its parent's, which runs the hooks as well
        if "grad_scaler" in kwargs:
            raise RuntimeError(
                f"the GradScaler leaves unscaling to {type(optimizer).__name__}.step(grad_scaler=...) itself, before "
                "which nothing can clip; call fusedclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, ...) instead"
            )
        # Only torch's own fused steps are known to read what a stand-in shows them; all others get scaled gradients.
        stepping = Stepping(optimizer) if divides(optimizer) and (self._skip or self._defer is not False) else None
        shown = args if stepping is None else (stepping, *args[1:])
        if callable(kwargs.get("closure")):
            return shown, {**kwargs, "closure": self._clipping(kwargs["closure"], optimizer, stepping)}
        for place, argument in enumerate(args[1:], start=1):
            if callable(argument):
                wrapped = self._clipping(argument, optimizer, stepping)
                return (*shown[:place], wrapped, *shown[place + 1 :]), kwargs
        self._clip(optimizer, stepping)
        return None if stepping is None else (shown, kwargs)

    @outside_graphs
    def _before_compiled_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Under torch.compile the gradients are scaled outside of the graph, in which nothing can stand in for self."""
        closure = any(map(callable, (*args[1:], kwargs.get("closure"))))
        if self._defer or self._skip or closure or getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "clip_on_step in a compiled step scales the gradients before the graph runs: no defer=True, no "
                "on_nonfinite='skip', no closure and no GradScaler that leaves the unscaling to the step"
            )
        self._clip(optimizer, None)

    def _clipping(
        self, closure: Callable[[], Any], optimizer: Optimizer, stepping: Stepping | None
    ) -> Callable[[], Any]:
        """The closure, clipping what it has made."""

        def clipping_closure() -> Any:
            loss = closure()
            self._clip(optimizer, stepping)
            return loss

        return clipping_closure

    def _clip(self, optimizer: Optimizer, stepping: Stepping | None) -> None:
        """Clip the gradients as they are now, by scaling them or through what `stepping` shows to the step."""
        refuse_tracing()
        self._check(optimizer)
        own, rest = self._gather(optimizer)
        scale = getattr(optimizer, "grad_scale", None)  # a GradScaler's: these gradients are still too large by that
        inverse = None if scale is None else scale.double().reciprocal()
        defer = stepping is not None and not own and self._defers(optimizer, rest, scaled=scale is not None)

        parts = {i: self._part(grads, limit, inverse) for i, (grads, limit) in own.items()}
        whole = self._part(rest, self._limit, inverse, write=not defer)
        if stepping is not None and defer and (scale is not None or not _seen_to_be_one(whole.coef)):
            stepping.grad_scale = whole.coef.reciprocal().float()
        self._prepare_skip(optimizer, stepping, [part.found_inf for part in (whole, *parts.values())])

        coef = whole.coef if scale is None else whole.coef * scale.to(whole.coef.device, non_blocking=True)
        self.total_norm, self.clip_coef = whole.norm, coef.to(whole.norm.dtype, copy=True)
        self.group_norms = {i: part.norm for i, part in parts.items()}

    def _gather(self, optimizer: Optimizer) -> tuple[dict[int, tuple[Gradients, float | Tensor]], Gradients]:
        """What is clipped by itself, by index of the param group, with its limit; and what is clipped together."""
        own, rest = {}, []
        for i, group in enumerate(optimizer.param_groups):
            if group.get("max_norm") is None:
                rest += group["params"]
            else:
                own[i] = gather(list(group["params"]), p=self._p), norms.check_max_norm(group["max_norm"])
        return own, gather(rest, p=self._p)

    def _defers(self, optimizer: Optimizer, grads: Gradients, *, scaled: bool) -> bool:
        if grads.has_duplicates():
            if self._defer:
                raise ValueError(
                    "defer=True has the optimizer divide every gradient, and two parameters share the memory of one, "
                    "which would be divided twice; leave defer at None"
                )
            return False
        if self._defer is not None:
            return self._defer
        # A grad_scale in fp32 would round the coefficient of fp64 gradients.
        return divides(optimizer) and grads.dtype == torch.float32 and (scaled or grads.device.type == "cpu")

    def _part(self, grads: Gradients, limit: float | Tensor, inverse: Tensor | None, *, write: bool = True) -> "_Part":
        """Clip what has one limit together; without `write`, only find out by how much.

        With an inverse loss scale the gradients stay as large as they are by that: the step will divide.
        """
        p, rule, group = self._p, ClipRule(limit), self._group
        if write and inverse is None:
            exact, coef = passes.clip_(grads, p, rule, group=group, dtype=torch.float64)
        else:
            exact, coef = passes.measure(grads, p, rule, group=group, multiplier=inverse)
            if write:
                passes.scale_(grads, norms.coefficient(exact, rule))
        found_inf = passes.found_inf(grads, p, exact, group) if self._skip else None
        return _Part(exact.to(grads.dtype), coef, found_inf)

    def _prepare_skip(self, optimizer: Optimizer, stepping: Stepping | None, found: list[Tensor | None]) -> None:
        """Show the step whether to skip, in our eyes or a GradScaler's, whose answer to no gradients is a plain 0."""
        theirs = getattr(optimizer, "found_inf", None)
        if self._skip and stepping is not None:
            stepping.found_inf = any_of([flag for flag in (*found, theirs) if isinstance(flag, Tensor)])
        if isinstance(optimizer, torch.optim.SGD) and (self._skip or theirs is not None):
            make_momentum(optimizer)


class _Part(NamedTuple):
    norm: Tensor  # in the dtype of results
    coef: Tensor  # fp64; contains the inverse loss scale
    found_inf: Tensor | None


def _pre_hooks(optimizer: Optimizer) -> dict[int, Any]:
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    if not isinstance(optimizer, Optimizer) or hooks is None:
        raise TypeError(
            f"clip_on_step takes a torch.optim.Optimizer, got {type(optimizer).__name__}; if that wraps one, pass the "
            "optimizer inside (often .optimizer)"
        )
    return dict(hooks)


def _seen_to_be_one(coef: Tensor) -> bool:
    """Whether the host knows, without waiting for a device, that nothing is clipped."""
    return coef.device.type == "cpu" and coef.item() == 1
