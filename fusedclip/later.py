"""Numbers that the host reads when they have arrived, never waiting for the device that makes them."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Later:
    """Rows of numbers on their way from a device to the host, in order: a ring of them there, a pinned one here.

    On the CPU they have arrived at once, and are handed out in the same way.
    """

    def __init__(self, slots: int = 64) -> None:
        self._slots = slots
        self._sent = 0
        self._there: Tensor | None = None
        self._here: Tensor | None = None
        self._waiting: deque[tuple[Any, Tensor, Any]] = deque()

    def send(self, row: Tensor, note: Any = None) -> None:
        """A row, fp64 and [W], with a note that stays here. Waits if as many as there are slots are on their way."""
        if row.is_cpu:
            self._waiting.append((note, row.clone(), None))
            return
        if self._there is None or self._here is None or self._there[0].shape != row.shape:
            shape = (self._slots, *row.shape)
            self._there = torch.empty(shape, dtype=torch.float64, device=row.device)
            self._here = torch.empty(shape, dtype=torch.float64, device="cpu", pin_memory=True)
        if len(self._waiting) >= self._slots:
            noted, kept, arrival = self._waiting[-self._slots]
            arrival.synchronize()
            self._waiting[-self._slots] = noted, kept.clone(), None  # out of the ring
        slot, self._sent = self._sent % self._slots, self._sent + 1
        self._there[slot].copy_(row)
        self._here[slot].copy_(self._there[slot], non_blocking=True)
        arrival = torch.Event(row.device)
        arrival.record()
        self._waiting.append((note, self._here[slot], arrival))

    def arrived(self, *, wait: bool = False) -> Iterator[tuple[Any, list[float]]]:
        """Notes and rows, each once. `wait`: for all that have been sent."""
        while self._waiting:
            note, row, arrival = self._waiting[0]
            if arrival is not None and not arrival.query():
                if not wait:
                    return
                arrival.synchronize()
            self._waiting.popleft()
            yield note, row.tolist()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: nothing is on its way."""
        return {"_slots": self._slots, "_sent": 0, "_there": None, "_here": None, "_waiting": deque()}
