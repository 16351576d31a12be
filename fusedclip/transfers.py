"""Numbers on their way from the host to a device, or between devices, for which the host does not wait."""

from collections.abc import Sequence

import torch
from torch import Tensor


def follow(scalar: Tensor, device: torch.device) -> Tensor:
    """The scalar on this device, without waiting unless that is the host, which would read memory yet to be filled."""
    return scalar.to(device, non_blocking=device.type != "cpu")


def on_device(value: float | Tensor, device: torch.device) -> Tensor:
    """As fp64, 0-d. A number is filled in by the device itself: copying it there would make the host wait."""
    if isinstance(value, Tensor):
        return follow(value, device).double()
    return torch.full((), value, dtype=torch.float64, device=device)


def index_on(places: Sequence[int], device: torch.device) -> Tensor:
    """Places as an index that the host need not wait for."""
    return sent(torch.tensor(places, dtype=torch.int64, device="cpu"), device)


def sent(index: Tensor, device: torch.device) -> Tensor:
    """From the host to a device, without waiting for that."""
    return index if device.type == "cpu" else index.pin_memory().to(device, non_blocking=True)
