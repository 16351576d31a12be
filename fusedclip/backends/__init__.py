"""The engines, and which of them serves what.

`ORDER` is the order of preference: each device gets the first engine that is here and does not refuse it. Where the
engine that a device is meant for is missing, a warning says so once: nothing falls back in silence.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial

import torch

from ..dtypes import FLOATING
from ..gradients import Batch
from ..torch_internals import user_stacklevel
from .base import Backend, Written
from .cpu import Cpu
from .cuda import Cuda
from .reference import Reference
from .triton import Triton
from .updater import Streams, Updater

__all__ = [
    "Backend",
    "Streams",
    "Updater",
    "Written",
    "available",
    "explain",
    "for_lists",
    "lacking",
    "serving",
    "updating",
    "use",
]

ORDER: tuple[Backend, ...] = (Cpu(), Cuda(), Triton(), Reference())
_BY_NAME = {backend.name: backend for backend in ORDER}
# The engine that a device's gradients are meant for. torch calls ROCm's devices cuda, too.
_HOME = {"cpu": "cpu", "cuda": "cuda" if torch.version.hip is None else "triton", "xpu": "triton"}
_forced: ContextVar[Backend | None] = ContextVar("fusedclip_backend", default=None)
_chosen: dict[tuple[torch.device, frozenset[torch.dtype]], Backend] = {}  # what was picked for such gradients


def available() -> tuple[str, ...]:
    """Names of the engines that can run on this machine, the preferred one first."""
    return tuple(backend.name for backend in ORDER if backend.missing() is None)


def lacking() -> str | None:
    """Why the engine that every machine should have, the CPU's, is not here; None if it is."""
    return _BY_NAME[_HOME["cpu"]].missing()


def explain() -> str:
    """Each engine, a line: what it serves here, or why it can't."""
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        devices.append(torch.accelerator.current_accelerator() or torch.device("cpu"))
    lines = []
    preferred = {d.type: _first(d, partial(_refusal, device=d, dtypes=FLOATING)) for d in devices}
    for backend in ORDER:
        missing = backend.missing()
        served = [d.type for d in devices if missing is None and backend.refuses(d, FLOATING) is None]
        first = [device for device in served if preferred[device] is backend]
        status = f"not available: {missing}" if missing else f"serves {', '.join(served) or 'no device here'}"
        lines.append(f"{backend.name:<10} {status}" + (f" (preferred on {', '.join(first)})" if first else ""))
    try:
        forced = _forced.get() or _from_environment()
        lines += [f"forced: {forced.name}"] if forced else []
    except (RuntimeError, ValueError) as error:  # every call will raise it; here it is part of the answer
        lines.append(f"forced: {error}")
    return "\n".join(lines)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Inside the context, this engine serves everything in this thread, or the call fails and says why.

    Raises ValueError for an unknown name, RuntimeError for an engine that cannot run on this machine.
    """
    token = _forced.set(_named(name, "fusedclip.backends.use"))
    try:
        yield
    finally:
        _forced.reset(token)


def for_lists() -> Backend | None:
    """The engine that takes an ordinary list of the CPU's whole, before anything is known of its gradients: the forced
    one or the CPU's, if it can."""
    forced = _forced.get()
    return _unforced_for_lists() if forced is None else forced if forced.takes_lists else None


def serving(batch: Batch) -> Backend:
    """The engine for a batch. Raises RuntimeError if a forced one refuses it, or none serves it."""
    forced, kind = _forced.get() or _from_environment(), (batch.device, batch.dtypes)
    if forced is not None:
        refusal = _refusal(forced, *kind)
        if refusal is not None:
            raise RuntimeError(f"the backend {forced.name!r} is forced and does not serve these gradients: {refusal}")
        return forced
    if kind not in _chosen:
        _chosen[kind] = _choose(batch.device, partial(_refusal, device=kind[0], dtypes=kind[1]), "serves gradients")
    return _chosen[kind]


def updating(device: torch.device) -> Updater:
    """The updater for parameters on a device. Raises RuntimeError if a forced engine has none, or refuses it."""
    forced = _forced.get() or _from_environment()
    if forced is None:
        return _chosen_updater(device)
    updater, refusal = forced.updater, _cannot_update(forced, device)
    if refusal is not None or updater is None:
        raise RuntimeError(f"the backend {forced.name!r} is forced and cannot update these parameters: {refusal}")
    return updater


def _cannot_update(backend: Backend, device: torch.device) -> str | None:
    return _refusal(backend, device, frozenset()) or (None if backend.updater else "it has no kernels for optimizers")


@cache
def _chosen_updater(device: torch.device) -> Updater:
    updater = _choose(device, partial(_cannot_update, device=device), "updates parameters").updater
    assert updater is not None
    return updater


@cache
def _refusal(backend: Backend, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
    return backend.missing() or backend.refuses(device, dtypes)


@cache
def _unforced_for_lists() -> Backend | None:
    engine = _from_environment() or _BY_NAME[_HOME["cpu"]]
    return engine if engine.takes_lists and engine.missing() is None else None


Refusal = Callable[[Backend], str | None]


def _choose(device: torch.device, refusal: Refusal, does: str) -> Backend:
    """The preferred engine; if that is not the one which the device is meant for, a warning says so."""
    backend = _first(device, refusal)
    if backend is None:
        reasons = "; ".join(f"{b.name}: {refusal(b)}" for b in ORDER)
        raise RuntimeError(f"no engine {does} on {device}: {reasons}")
    home = _HOME.get(device.type)
    if home is not None and home != backend.name:
        name = f"slow {backend.name}" if backend.name == "reference" else backend.name
        warnings.warn(
            f"fusedclip: the {name} engine {does} on {device}, because the {home} engine is not available: "
            f"{refusal(_BY_NAME[home])}. FUSEDCLIP_BACKEND={backend.name} says that this is wanted.",
            stacklevel=user_stacklevel(),
        )
    return backend


def _first(device: torch.device, refusal: Refusal) -> Backend | None:
    return next((b for b in ORDER if refusal(b) is None and b.volunteers(device)), None)


def _named(name: str, where: str) -> Backend:
    if name not in _BY_NAME:
        raise ValueError(f"{where}: no backend is called {name!r}; there are {', '.join(_BY_NAME)}")
    missing = _BY_NAME[name].missing()
    if missing is not None:
        raise RuntimeError(f"{where}: the backend {name!r} cannot run on this machine: {missing}")
    return _BY_NAME[name]


@cache  # reading os.environ costs 0.6 us, a fifth of a small call
def _from_environment() -> Backend | None:
    name = os.environ.get("FUSEDCLIP_BACKEND")
    return _named(name, "FUSEDCLIP_BACKEND") if name else None
