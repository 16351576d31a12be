"""`python -m fusedclip check`: every engine of this machine against the reference, on small lists of every kind.

The reference is plain torch in fp64 (`backends/reference.py`). What differs from it is printed: the list, the call, and
by how much.
"""

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import amp, backends, clip, stats
from .dtypes import FLOATING

BOUND = 3e-6  # of a norm, and so of a coefficient
SHOWN = 20  # differences of one engine
INF = math.inf
MANY, LARGE = 1600, 1 << 20
# An interpreter takes some 20 ms for each tensor of a list and each step through one: all calls would take it an hour.
MANY_INTERPRETED, LARGE_INTERPRETED = 40, 1 << 14
ORDERS = (2.0, 1.0, 3.0, INF, 0.0)

Norms = dict[float, float]  # of a list, by order; 1 where that is 0, NaN or inf
Call = Callable[[list[Tensor], Norms], Tensor | None]  # what is done to parameters


def _clip(p: float) -> Call:
    return lambda params, norm: clip.clip_grad_norm_(params, norm[p] / 3, p)


def _scopes(params: list[Tensor], norm: Norms) -> Tensor:
    scopes = {"clipped": params[::2], "measured": params[1::2]}
    return torch.stack([*clip.clip_grad_norm_scopes_(scopes, {"clipped": norm[2] / 20, "measured": None}).values()])


def _unscale(params: list[Tensor], norm: Norms) -> Tensor:
    scaler = torch.amp.GradScaler(params[0].device.type, init_scale=4.0)
    scaler.scale(torch.zeros((), device=params[0].device))
    return amp.unscale_and_clip_grad_norm_(scaler, torch.optim.SGD(params), norm[2] / 20, allow_fp16=True)


def _stats(params: list[Tensor], norm: Norms) -> Tensor:
    found = stats.clip_grad_norm_with_stats_(params, norm[2] / 3)
    rows = (found.norm, found.abs_sum, found.abs_max, found.zeros, found.nonfinite)
    return torch.stack([row.to(found.norm.dtype) for row in rows])


CALLS: dict[str, Call] = {
    **{f"clip_grad_norm_, p = {p:g}": _clip(p) for p in ORDERS},
    "clip_grad_norm_, not clipped": lambda params, norm: clip.clip_grad_norm_(params, 2 * norm[2]),
    "on_nonfinite='zero'": lambda params, norm: clip.clip_grad_norm_(params, norm[2] / 3, on_nonfinite="zero"),
    "get_total_norm": lambda params, norm: clip.get_total_norm([p.grad for p in params if p.grad is not None]),
    "clip_grads_with_norm_": lambda params, norm: clip.clip_grads_with_norm_(params, 0.5, 1.0),
    "clip_grad_norm_per_tensor_": lambda params, norm: clip.clip_grad_norm_per_tensor_(params, norm[2] / 20, 2.0),
    "clip_grad_norm_scopes_": _scopes,
    "clip_grad_norm_with_stats_": _stats,
    "unscale_and_clip_grad_norm_": _unscale,
    "clip_grad_value_": lambda params, norm: clip.clip_grad_value_(params, norm[INF] / 3),
}


def lists(device: torch.device, interpreted: bool = False) -> Iterator[tuple[str, list[Tensor]]]:
    """Gradients by name; the longest list and the largest tensor are smaller for an interpreter."""

    def randn(count: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, odd: float | None = None) -> Tensor:
        values = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64) * scale
        if odd is not None:
            values[count // 2] = odd
        return values.to(dtype).to(device)

    dtypes = sorted(FLOATING, key=str)
    for dtype in dtypes:
        name, info = str(dtype), torch.finfo(dtype)
        yield name, [randn(n, dtype) for n in (1, 7, 64, 257, 20_001)]
        yield f"{name}, misaligned", [randn(9003, dtype)[1:9000], randn(0, dtype), randn(999, dtype)[3:]]
        yield f"{name}, strided", [randn(900, dtype)[::3], randn(600, dtype).view(20, 30).t(), randn(8, dtype)]
        yield f"{name}, subnormal", [randn(9000, dtype, info.tiny / 4), randn(5, dtype, info.tiny)]
        yield f"{name}, huge", [randn(9000, dtype, min(info.max / 1e4, 1e90)), randn(9, dtype)]
        for odd in (math.nan, -INF):
            yield f"{name}, with {odd}", [randn(300, dtype), randn(9000, dtype, odd=odd), randn(20, dtype)]
    yield "mixed dtypes", [randn(1000 + i, dtype) for i, dtype in enumerate(dtypes * 2)]
    many, large = (MANY_INTERPRETED, LARGE_INTERPRETED) if interpreted else (MANY, LARGE)
    yield f"{many:,} tensors", list(torch.split(randn(5 * many), 5))
    yield f"{large + 1:,} elements", [randn(large + 1, torch.bfloat16)]
    yield "complex", [torch.complex(randn(500), randn(500)), torch.complex(randn(60), randn(60))[::2]]
    places = torch.tensor([[1, 5, 1]], device=device)
    yield "sparse", [torch.sparse_coo_tensor(places, randn(12).view(3, 4), (9, 4), check_invariants=True)]
    yield "two gradients in one memory", [(shared := randn(70)), randn(9), shared.view(7, 10)]


def outcome(engine: str, grads: list[Tensor], call: Call, norm: Norms) -> dict[str, Tensor]:
    """What a call returns, and all the memory that the gradients lie in afterwards."""
    grads = copy.deepcopy(grads)  # with their strides, offsets and shared memory
    params: list[Tensor] = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    with backends.use(engine):
        result = call(params, norm)
    found = {} if result is None else {"the result": result}
    seen = set()
    for i, grad in enumerate(grads):
        whole = grad.to_dense() if grad.is_sparse else _whole_storage(grad)
        if whole.data_ptr() not in seen:
            found[f"memory of gradient {i}"] = whole
            seen.add(whole.data_ptr())
    return found


def _whole_storage(grad: Tensor) -> Tensor:
    return grad.as_strided((grad.untyped_storage().nbytes() // grad.element_size(),), (1,), 0)


def difference(got: Tensor, want: Tensor) -> str | None:
    """Where `got` is not `want` within the bound and a rounding, in words. NaN equals NaN alone, inf equals inf."""
    if got.dtype != want.dtype:
        return f"is of {got.dtype} instead of {want.dtype}"
    info, wide = torch.finfo(want.dtype), torch.promote_types(want.dtype, torch.float64)
    relative, least = BOUND + info.eps, info.eps * info.tiny
    try:
        torch.testing.assert_close(got.to(wide), want.to(wide), rtol=relative, atol=least, equal_nan=True)
    except AssertionError as error:
        return " ".join(str(error).split())
    return None


def differences(engine: str, device: torch.device) -> Iterator[str]:
    """Every list and call for which the engine differs from the reference, with the first thing in which it does."""
    for name, grads in lists(device, engine == "triton" and device.type == "cpu"):
        with backends.use("reference"):
            exact = {p: float(clip.get_total_norm(grads, p)) for p in ORDERS}
        norm = {p: value if 0 < value < INF else 1.0 for p, value in exact.items()}
        for call in CALLS:
            if call == "clip_grad_value_" and grads[0].is_complex():
                continue  # refused
            try:
                want, got = (outcome(one, grads, CALLS[call], norm) for one in ("reference", engine))
                wrong = next((f"{what} {said}" for what in want if (said := difference(got[what], want[what]))), None)
            except Exception as error:  # a kernel that fails is found as well
                wrong = f"{type(error).__name__}: {error}"
            if wrong is not None:
                yield f"{name}: {call}: {wrong}"


def main() -> int:
    """Print for every engine and device what differs; 1 if anything does, or the CPU's engine is not here."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = [torch.device("cpu"), *([accelerator] if accelerator else [])]
    here = [engine for engine in backends.ORDER if engine.name != "reference" and not engine.missing()]
    pairs = [(engine.name, device) for device in devices for engine in here if not engine.refuses(device, FLOATING)]
    if not pairs:
        print("check: there is no engine here to compare with the reference")
    lacking = backends.lacking()
    if lacking is not None:
        print(f"check: the cpu engine, which this machine should have, is not available: {lacking}")
    different = lacking is not None
    for engine, device in pairs:
        count = 0
        for count, found in enumerate(differences(engine, device), start=1):
            if count <= SHOWN:
                print(f"  {found}", flush=True)
        said = f"differs from the reference in {count} calls" if count else "agrees with the reference"
        print(f"check: {engine} on {device} {said}", flush=True)
        different |= count > 0
    return int(different)
