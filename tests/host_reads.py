"""Counts the ways in which Python learns a tensor's value: on a GPU each of them waits for the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

READS = [
    "item", "tolist", "numpy", "cpu", "nonzero", "equal", "allclose",
    "__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "__array__",
]  # fmt: skip


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Inside the context, the list names each read as it happens."""
    seen: list[str] = []

    def counting(name: str) -> object:
        original = getattr(torch.Tensor, name)

        def method(self: torch.Tensor, *args: object, **kwargs: object) -> object:
            seen.append(name)
            return original(self, *args, **kwargs)

        return method

    patches = [mock.patch.object(torch.Tensor, name, counting(name)) for name in READS]
    for patch in patches:
        patch.start()
    try:
        yield seen
    finally:
        for patch in reversed(patches):
            patch.stop()
