"""Mixed precision: unscaling and clipping in one read pass and one write pass, for torch's GradScaler.

torch's two calls move the gradients five times: `unscale_` reads and writes them, the norm reads them, the clip reads
and writes them. Here the norm of the unscaled gradients is the norm of the scaled ones times the inverse scale, it is
finite if and only if they are, and one write pass applies the inverse scale and the clip's coefficient together.
"""

from typing import Any, SupportsFloat

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from . import passes, reading
from .arguments import check_norm_type
from .gradients import Gradients, gather
from .interrupts import insist
from .norms import Rule
from .optim.skip import combine_flags
from .peers import Elsewhere, Group, check_group
from .rules import AdaptiveRule, as_rule
from .torch_internals import outside_graphs, refuse_tracing
from .transfers import follow


@outside_graphs
def unscale_and_clip_grad_norm_(
    scaler: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    max_norm: SupportsFloat | Tensor | AdaptiveRule,
    norm_type: SupportsFloat = 2.0,
    *,
    error_if_nonfinite: bool = False,
    group: Group | None = None,
    counted_elsewhere: Elsewhere | None = None,
    allow_fp16: bool = False,
) -> Tensor:
    """Divide an optimizer's gradients by the loss scale and clip the result, in one read pass and one write pass.

    Equivalent, but for gradients that torch rounds twice and this once::

        scaler.unscale_(optimizer)
        norm = clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], max_norm, norm_type)

    Afterwards the scaler knows that these gradients are unscaled and whether they were finite: `scaler.step(optimizer)`
    and `scaler.update()` skip, back off and grow as after `unscale_`. (As there, torch's fused SGD with momentum has
    uninitialised buffers if its very first step is skipped; `fusedclip.optim.clip_on_step` mends that.)

    Args:
        scaler: any torch.amp.GradScaler. One that is disabled just clips.
        optimizer: any torch.optim.Optimizer; its gradients as in `fusedclip.clip_grad_norm_`, on several devices too.
            bf16 gradients work, which torch's `unscale_` refuses.
        max_norm, norm_type: as in `fusedclip.clip_grad_norm_`; max_norm is in the unit of the unscaled gradients, and
            with inf they are unscaled only; or an adaptive rule (`fusedclip.adaptive`), which a step that the scaler
            skips does not enter. Orders other than 1, 2 and inf, and fp64 gradients, cost one more read, as
            their norm does not tell whether all gradients are finite.
        error_if_nonfinite: raise if the norm is NaN or inf, rather than let the scaler skip. Waits for the device.
        group, counted_elsewhere: as in `fusedclip.clip_grad_norm_`. All ranks get the same norm and skip the same
            steps.
        allow_fp16: take fp16 gradients. torch's `unscale_` does not, since the unscaled values may underflow.

    Returns:
        The norm of the unscaled gradients before clipping: 0-d, fp32 (fp64 if any gradient is), on the first gradient's
        device; tensor(0.) if there are none. Does not wait for the device unless `error_if_nonfinite`.

    Raises:
        RuntimeError: on a second call, or after `scaler.step`, before the next `scaler.update`, as `unscale_` does.
        ValueError: for fp16 gradients, as `unscale_` does; for a scaler of FSDP without `group`.
        AssertionError: if `scaler.scale` has not been called yet, as `unscale_` does.
        TypeError, ValueError, RuntimeError: as in `fusedclip.clip_grad_norm_`. The gradients and the scaler are then
            as they were.

    Deterministic, as `fusedclip.clip_grad_norm_` is.
    """
    refuse_tracing()
    p, rule = check_norm_type(norm_type), as_rule(max_norm)
    peers = check_group(group, counted_elsewhere)
    if not isinstance(scaler, torch.amp.GradScaler) or not isinstance(optimizer, torch.optim.Optimizer):
        given = f"{type(scaler).__name__} and {type(optimizer).__name__}"
        raise TypeError(f"unscale_and_clip_grad_norm_ takes a GradScaler and an optimizer, in this order, got {given}")
    parameters: list[Tensor] = [parameter for own in optimizer.param_groups for parameter in own["params"]]
    if isinstance(rule, AdaptiveRule):
        rule.bind(parameters)
    if not scaler.is_enabled():
        return _just_clip(gather(parameters, p=p, peers=peers), p, rule, error_if_nonfinite)
    state, inverse = _begin(scaler, optimizer, group)
    grads = gather(parameters, p=p, peers=peers)
    if not allow_fp16 and any(torch.float16 in write.batch.dtypes for write in grads.writes):
        raise ValueError("Attempting to unscale FP16 gradients. allow_fp16=True does it all the same")
    exact: Tensor | None = None

    def note() -> None:
        _note_unscaled(state, grads, p, exact, inverse.device, rule)

    try:
        exact = passes.clip_(
            grads, p, rule, error_if_nonfinite=error_if_nonfinite, multiplier=inverse, dtype=torch.float64
        ).norm
        note()
    except BaseException as error:
        cut_off = grads.is_written if exact is None else isinstance(error, KeyboardInterrupt)
        if cut_off:  # what has been written must not be unscaled twice
            insist(note)
        raise
    if isinstance(rule, AdaptiveRule):
        rule.settle(combine_flags([*state["found_inf_per_device"].values()]))
    return reading.as_result(exact, grads)


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler with one more method: `unscale_and_clip_grad_norm_`.

    Nothing else differs. The same is to be had for any other scaler as the function of that name::

        scaler = fusedclip.amp.GradScaler("cuda")
        scaler.scale(loss).backward()
        norm = scaler.unscale_and_clip_grad_norm_(optimizer, max_norm=1.0)
        scaler.step(optimizer)
        scaler.update()
    """

    unscale_and_clip_grad_norm_ = unscale_and_clip_grad_norm_  # whose first argument is self


def _begin(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, group: Group | None
) -> tuple[dict[str, Any], Tensor]:
    """The scaler's notes on this optimizer and the inverse scale, or the errors of torch's `unscale_` in its words."""
    scale, _ = scaler._check_scale_growth_tracker("unscale_and_clip_grad_norm_")
    if group is None and getattr(scaler, "process_group", None) is not None:
        raise ValueError(
            f"a {type(scaler).__name__} scales gradients that are sharded over ranks; pass group=, so that the norm is "
            "taken over all shards and all ranks skip the same steps"
        )
    state: dict[str, Any] = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"] is OptState.UNSCALED:
        raise RuntimeError("unscale_() has already been called on this optimizer since the last update().")
    if state["stage"] is OptState.STEPPED:
        raise RuntimeError("unscale_() is being called after step().")
    return state, scale.double().reciprocal().float()  # torch's value, which is exact for powers of two


def _note_unscaled(
    state: dict[str, Any], grads: Gradients, p: float, exact: Tensor | None, home: torch.device, rule: Rule
) -> None:
    """Tell the scaler that these gradients are unscaled, and whether they were finite."""
    if exact is None:  # the interrupt took the norm away: read again, without the other ranks, who know by themselves
        found_inf = passes.found_inf_by_reading(grads, alone=True)
    else:
        found_inf = passes.found_inf(grads, p, exact)
    wanted = rule.wants_skipped() if isinstance(rule, AdaptiveRule) else None
    if wanted is not None:
        found_inf = torch.maximum(found_inf, follow(wanted, found_inf.device))
    state["found_inf_per_device"] = _per_device(found_inf, grads, home, needed=not grads.is_local)
    state["stage"] = OptState.UNSCALED


def _just_clip(grads: Gradients, p: float, rule: Rule, error_if_nonfinite: bool) -> Tensor:
    if isinstance(rule, AdaptiveRule) and rule.skips:
        raise ValueError(
            f"{type(rule).__name__} leaves steps out through the scaler, and this one is disabled; give the rule to "
            "fusedclip.optim.clip_on_step instead"
        )
    norm = passes.clip_(grads, p, rule, error_if_nonfinite=error_if_nonfinite).norm
    if isinstance(rule, AdaptiveRule):
        rule.settle()
    return norm


def _per_device(found_inf: Tensor, grads: Gradients, home: torch.device, *, needed: bool) -> dict[torch.device, Tensor]:
    """As `scaler.step` and `scaler.update` want it: a tensor of its own for each device that holds gradients.

    They add these up, and the fused optimizers skip at a sum of exactly 1: one device carries the answer, the others 0.
    `needed`: the scaler's own device carries it where there is no gradient, but other ranks skip or don't.
    """
    devices = [batch.device for batch in grads.reads] or [home] * needed
    return {d: found_inf.to(d) if d == devices[0] else found_inf.new_zeros((), device=d) for d in devices}
