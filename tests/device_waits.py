"""Whether a call waits for the GPU: torch tells of its own waits, a device that is kept busy tells of all others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

CYCLES = 1_000_000_000  # half a second or more: no call takes the host as long


@contextmanager
def no_waits() -> Iterator[None]:
    """Fails if what is called inside waits for the device. It must have run before: first calls load and compile."""
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    busy = torch.cuda.Event()
    busy.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not busy.query(), "the device had time to finish what it was busy with"
    torch.cuda.synchronize()
