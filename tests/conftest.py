"""The `engine` fixture runs a test once per engine and device. FUSEDCLIP_ENGINES=a,b narrows it to some engines."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis
import pytest
import torch

from fusedclip import backends
from fusedclip.backends import ORDER
from fusedclip.dtypes import FLOATING

# Interpreted kernels are slow: there the property tests get fewer examples, by this variable.
EXAMPLES = int(os.environ.get("FUSEDCLIP_EXAMPLES", "2000"))
hypothesis.settings.register_profile(
    "fusedclip", max_examples=EXAMPLES, deadline=None, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.load_profile("fusedclip")


@dataclass(frozen=True)
class Engine:
    name: str
    device: str

    def tensor(self, values: object, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)

    @property
    def host_knows(self) -> bool:
        """Whether the host can tell that nothing was clipped: a kernel on a device keeps that to itself."""
        return self.device == "cpu" and self.name in ("cpu", "reference")

    def ulps(self, dtype: torch.dtype) -> float:
        """How far an element may be from the fp64 answer."""
        # In fp64 the norm's own rounding shows: 1000 ulp are a relative 2e-13.
        return {torch.float64: 1000.0, torch.float32: 1.5}.get(dtype, 1.0)


def _engines() -> list[object]:
    wanted = os.environ.get("FUSEDCLIP_ENGINES", "").split(",")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [
        pytest.param(Engine(b.name, d), id=f"{b.name}-{d}", marks=[pytest.mark.gpu] if d == "cuda" else [])
        for b in ORDER
        for d in devices
        if b.missing() is None and b.refuses(torch.device(d), FLOATING) is None
        if wanted == [""] or b.name in wanted
    ]


@pytest.fixture(params=_engines())
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine and a device that it serves; everything inside the test goes through it."""
    with backends.use(request.param.name):
        yield request.param


def parameters(gradients: list[torch.Tensor | None]) -> list[torch.nn.Parameter]:
    """Parameters that hold these gradients (not copies of them)."""
    made = []
    for gradient in gradients:
        like = torch.zeros(1) if gradient is None else gradient
        parameter = torch.nn.Parameter(torch.empty(like.shape, dtype=like.dtype, device=like.device))
        parameter.grad = gradient
        made.append(parameter)
    return made


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]
