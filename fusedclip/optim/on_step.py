"""Clipping as a part of the optimizer's step.

A step pre-hook clips, either by scaling the gradients where that is needed, or by handing the coefficient to torch's
fused optimizers, which divide every gradient by `grad_scale` and skip the step where `found_inf` is 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, SupportsFloat

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import passes
from ..arguments import Limit, check_defer, check_norm_type, on_nonfinite_is
from ..gradients import Gradients, gather, shares_memory
from ..norms import Clipped, EachRule, Rule
from ..peers import Elsewhere, Group, Peers, check_group
from ..rules import AdaptiveRule, as_rule
from ..scopes import Scope, scale_scopes_
from ..torch_internals import outside_graphs, refuse_tracing
from ..transfers import follow
from .groups import TOGETHER, LastStep, found_inf_in, measure_groups, results_of, scopes_of
from .skip import combine_flags, prepare_momentum, refuse_unmade_momentum
from .stand_in import StandIn, is_inner_step, takes_grad_scale

Hooked = tuple[tuple[Any, ...], dict[str, Any]]


def clip_on_step(
    optimizer: Optimizer,
    max_norm: Limit | AdaptiveRule,
    norm_type: SupportsFloat = 2.0,
    *,
    on_nonfinite: Literal["propagate", "skip"] = "propagate",
    defer: bool | None = None,
    group: Group | None = None,
    counted_elsewhere: Elsewhere | None = None,
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
        max_norm, norm_type: as in `fusedclip.clip_grad_norm_`. A max_norm tensor on the CPU is read once, now. Or an
            adaptive rule (`fusedclip.adaptive`), which a step that is left out by `found_inf` does not enter; one by
            which each gradient has its own coefficient is never deferred. `SkipSpikes` needs what "skip" needs.
        on_nonfinite: with a NaN or an inf in any gradient, "propagate" clips as `fusedclip.clip_grad_norm_` does and
            steps; "skip" leaves parameters and optimizer state as they are, by `found_inf`, and needs an Adam, AdamW,
            SGD or Adagrad (no subclass) with fused=True. Neither waits for the device, but for "skip" in an SGD with
            momentum and dampening, which does until its first step is made.
        defer: True never writes the gradients here but hands 1 / coefficient to a fused Adam, AdamW, SGD or Adagrad,
            which divides by it (`.grad` then holds the clipped gradients after the step; 1 / coefficient is fp32, as
            torch's kernels want it). False scales the gradients before the step, where there is something to clip.
            None defers where that moves fewer bytes for certain: with these optimizers on the CPU, and wherever a
            GradScaler has them divide anyway; else, and with fp64 gradients, it scales. Subclasses of them may do
            anything with their gradients, so they are always scaled. A coefficient below 3e-39 comes out as 0 when it
            is deferred. Hooks that run after this one may be handed a stand-in of a fused optimizer.
        group, counted_elsewhere: as in `fusedclip.clip_grad_norm_`. Every rank must step, with the same "max_norm"
            entries.

    Returns:
        A handle with `total_norm`, `clip_coef`, `group_norms` and `remove()`.

    Raises:
        TypeError: for something that is not a torch optimizer with hooks, such as another library's wrapper of one.
        ValueError: for a limit or an order that is not one; for `defer=True` or "skip" where the optimizer has no
            kernel for it; for `defer=True` with a group's own "max_norm"; if the optimizer clips on step already.

    What `fusedclip.clip_grad_norm_` raises, `step()` raises; nothing has been stepped then.

    Where a GradScaler skips the first step of a fused SGD with momentum, torch leaves uninitialised momentum; this
    leaves what SGD without fused=True has then. With dampening that waits for the device until the first step is made,
    and needs an SGD that is no subclass and not compiled: else the step to be skipped raises a RuntimeError.

    `torch.compile` of the step works with `defer` None or False: the gradients are scaled before the graph runs.

    Nothing is kept on the optimizer but the hook: its state_dict, zero_grad, schedulers and pickling are torch's (a
    pickled or copied optimizer loses the hook, as it loses every hook; a copied handle is of no optimizer).
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
    skip = on_nonfinite_is("skip", on_nonfinite)
    rule, p = as_rule(max_norm), check_norm_type(norm_type)
    handle = ClipOnStep(rule, p, skip, check_defer(defer), check_group(group, counted_elsewhere))
    handle._register(optimizer)
    return handle


class ClipOnStep(LastStep):
    """What `clip_on_step` returns: what the last step did, and the way to end it. None waits for the device.

    A pickled or copied handle knows what the last step did and belongs to no optimizer: its `remove()` does nothing.
    """

    _is_registered = False  # before _register, after remove() and in a copy

    def __init__(self, rule: Rule, p: float, skip: bool, defer: bool | None, peers: Peers | None) -> None:
        self._rule, self._p, self._skip, self._defer, self._peers = rule, p, skip, defer, peers
        if isinstance(rule, AdaptiveRule):
            self._skip |= rule.skips
        self.group_norms = {}

    def remove(self) -> None:
        """Stop clipping; the optimizer has nothing of ours then. Calling it again does nothing."""
        if self._is_registered:
            self._hook.remove()
            self._is_registered = False

    def __getstate__(self) -> dict[str, Any]:
        return {"total_norm": self.total_norm, "clip_coef": self.clip_coef, "group_norms": self.group_norms}

    def _register(self, optimizer: Optimizer) -> None:
        owners = [getattr(hook, "__self__", None) for hook in _pre_hooks(optimizer).values()]
        if any(isinstance(owner, ClipOnStep) and owner._is_registered for owner in owners):
            raise ValueError(f"this {type(optimizer).__name__} clips on step already; remove() the other handle first")
        self._check(optimizer)
        self._hook: RemovableHandle = optimizer.register_step_pre_hook(self._before_step)
        self._is_registered = True

    def _check(self, optimizer: Optimizer) -> None:
        """Whether the optimizer, as it is now, can do what was asked for: its groups may have changed."""
        own = any(group.get("max_norm") is not None for group in optimizer.param_groups)
        each = isinstance(self._rule, EachRule)
        if self._defer and (own or each):
            several = (
                f"{type(self._rule).__name__} has one for each" if each else "a param group has a max_norm of its own"
            )
            raise ValueError(
                f"defer=True hands the optimizer one coefficient for all its gradients, but {several}; leave defer at "
                "None"
            )
        if own and each:
            raise ValueError(
                f"{type(self._rule).__name__} clips each gradient by itself, and a param group has a max_norm of its "
                "own beside; leave one of them out"
            )
        if (self._defer or self._skip) and not takes_grad_scale(optimizer):
            skips = type(self._rule).__name__ if getattr(self._rule, "skips", False) else "on_nonfinite='skip'"
            asked = "defer=True" if self._defer else skips
            raise ValueError(
                f"{asked} needs an Adam, AdamW, SGD or Adagrad with fused=True, whose kernels take grad_scale and "
                f"found_inf; this {type(optimizer).__name__} has none"
            )

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked | None:
        if not self._is_registered:
            return None  # a copy's, which came along with an optimizer that copies its hooks
        if torch.compiler.is_compiling():
            self._before_compiled_step(optimizer, args, kwargs)
            return None
        if is_inner_step(optimizer):
            return None  # a subclass's step called its parent's, which runs the hooks as well
        if "grad_scaler" in kwargs:
            raise RuntimeError(
                f"the GradScaler leaves unscaling to {type(optimizer).__name__}.step(grad_scaler=...) itself, before "
                "which nothing can clip; call fusedclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, ...) instead"
            )
        # Only torch's own fused steps are known to read what a stand-in shows them; all others get scaled gradients.
        to_show = self._skip or self._defer is not False or getattr(optimizer, "found_inf", None) is not None
        stand_in = StandIn(optimizer) if to_show and takes_grad_scale(optimizer) else None
        shown = args if stand_in is None else (stand_in, *args[1:])
        if callable(kwargs.get("closure")):
            return shown, {**kwargs, "closure": partial(self._clip_after, kwargs["closure"], optimizer, stand_in)}
        for place, argument in enumerate(args[1:], start=1):
            if callable(argument):
                wrapped = partial(self._clip_after, argument, optimizer, stand_in)
                return (*shown[:place], wrapped, *shown[place + 1 :]), kwargs
        self._clip(optimizer, stand_in)
        return None if stand_in is None else (shown, kwargs)

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

    def _clip_after(self, closure: Callable[[], Any], optimizer: Optimizer, stand_in: StandIn | None) -> Any:
        """What a closure returns, when what it has made is clipped."""
        loss = closure()
        self._clip(optimizer, stand_in)
        return loss

    def _clip(self, optimizer: Optimizer, stand_in: StandIn | None) -> None:
        """Clip the gradients as they are now, by scaling them or through what `stand_in` shows to the step."""
        refuse_tracing()
        self._check(optimizer)
        if stand_in is None:
            refuse_unmade_momentum(optimizer)
        parameters, scopes = scopes_of(optimizer.param_groups, self._rule)
        if isinstance(self._rule, AdaptiveRule):
            self._rule.bind(parameters)
        grads = gather(parameters, p=self._p, peers=self._peers)
        scale = getattr(optimizer, "grad_scale", None)  # a GradScaler's: these gradients are still too large by that
        one_coef = len(scopes) == 1 and not isinstance(self._rule, EachRule)
        defer = stand_in is not None and one_coef and self._defers(optimizer, grads, scaled=scale is not None)
        clipped = self._measure_and_scale(grads, scopes, scale, write=not defer)
        coef = clipped[TOGETHER].coef
        if stand_in is not None and defer and (scale is not None or not _seen_to_be_one(coef)):
            stand_in.grad_scale = coef.reciprocal().float()
        self._prepare_skip(optimizer, stand_in, found_inf_in(clipped, grads, self._p) if self._skip else None)
        self.total_norm, self.clip_coef, self.group_norms = results_of(clipped, grads, scopes, scale)

    def _defers(self, optimizer: Optimizer, grads: Gradients, *, scaled: bool) -> bool:
        if shares_memory(grads):
            if self._defer:
                raise ValueError(
                    "defer=True has the optimizer divide every gradient, and two parameters share the memory of one, "
                    "which would be divided twice; leave defer at None"
                )
            return False
        if self._defer is not None:
            return self._defer
        # A grad_scale in fp32 would round the coefficient of fp64 gradients.
        return takes_grad_scale(optimizer) and grads.dtype == torch.float32 and (scaled or grads.device.type == "cpu")

    def _measure_and_scale(
        self, grads: Gradients, scopes: dict[int, Scope], scale: Tensor | None, *, write: bool
    ) -> dict[int, Clipped]:
        """Clip, or without `write` only find out by how much; norms are in fp64.

        With a loss scale the gradients stay as large as they are by that, and the coefficients say so: the step will
        divide.
        """
        if len(scopes) == 1 and write and scale is None:
            return {TOGETHER: passes.clip_(grads, self._p, self._rule, dtype=torch.float64)}
        clipped = measure_groups(grads, self._p, scopes, None if scale is None else scale.double().reciprocal())
        if write:
            coefs = [_unscaled(own, scopes[number].rule, scale) for number, own in clipped.items()]
            scale_scopes_(grads, list(scopes.values()), coefs)
        return clipped

    def _prepare_skip(self, optimizer: Optimizer, stand_in: StandIn | None, found: Tensor | None) -> None:
        """Show the step whether to skip, in our eyes or a GradScaler's, whose answer to no gradients is a plain 0."""
        flags = [flag for flag in (found, getattr(optimizer, "found_inf", None)) if isinstance(flag, Tensor)]
        if isinstance(self._rule, AdaptiveRule):
            wanted = self._rule.settle(combine_flags(flags))
            flags += [] if wanted is None else [wanted]
        skip = combine_flags(flags)
        if self._skip and stand_in is not None and skip is not None:
            stand_in.found_inf = skip
        if flags and isinstance(optimizer, torch.optim.SGD):
            prepare_momentum(optimizer, stand_in)


def _pre_hooks(optimizer: Optimizer) -> dict[int, Any]:
    # torch has no public way to list them (seen in torch 2.13; one without it is refused as no optimizer).
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    if not isinstance(optimizer, Optimizer) or hooks is None:
        raise TypeError(
            f"clip_on_step takes a torch.optim.Optimizer, got {type(optimizer).__name__}; if that wraps one, pass the "
            "optimizer inside (often .optimizer)"
        )
    return dict(hooks)


def _unscaled(clipped: Clipped, rule: Rule, scale: Tensor | None) -> Tensor:
    """The coefficient without the inverse loss scale."""
    if isinstance(rule, EachRule):
        return clipped.coef if scale is None else clipped.coef * follow(scale, clipped.coef.device)
    return rule(clipped.norm)


def _seen_to_be_one(coef: Tensor) -> bool:
    """Whether the host knows, without waiting for a device, that nothing is clipped."""
    return coef.device.type == "cpu" and coef.item() == 1
