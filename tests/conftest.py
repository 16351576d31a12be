"""The `engine` fixture runs a test once per engine and device; `engines` narrows it to some. So does, for a whole run,
FUSEDCLIP_ENGINES=a,b. What was not run is told in a line at the end.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

# Before torch loads OpenMP. Threads that spin while they wait take three times as long where others want their core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

from fusedclip import backends
from fusedclip.backends import ORDER
from fusedclip.dtypes import FLOATING

# Of each property test. Enough to find what breaks often; .ci/run draws ALL on the CPU's engines.
EXAMPLES, ALL = int(os.environ.get("FUSEDCLIP_EXAMPLES", "100")), 1000
NO_GPU = "no NVIDIA GPU"
NO_INTERPRETER = "no Triton interpreter: TRITON_INTERPRET=1 is not set"
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

    def same(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Norms of the same gradients by two functions: on a GPU each may add in an order of its own."""
        return bool((a == b) | (self.device != "cpu" and (a / b - 1).abs() < 2e-7))

    def ulps(self, dtype: torch.dtype) -> float:
        """How far an element may be from the fp64 answer."""
        # In fp64 the norm's own rounding shows: 1000 ulp are a relative 2e-13.
        return {torch.float64: 1000.0, torch.float32: 1.5}.get(dtype, 1.0)


def found(names: tuple[str, ...] = (), on: str = "") -> list[Engine]:
    """The engines of this machine, with each device that they serve."""
    wanted = os.environ.get("FUSEDCLIP_ENGINES", "").split(",")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [
        Engine(b.name, d)
        for b in ORDER
        for d in devices
        if b.missing() is None and b.refuses(torch.device(d), FLOATING) is None
        if wanted == [""] or b.name in wanted
        if (not names or b.name in names) and on in ("", d)
    ]


def _params(engines: list[Engine]) -> list[object]:
    return [
        pytest.param(one, id=f"{one.name}-{one.device}", marks=[pytest.mark.gpu] if one.device == "cuda" else [])
        for one in engines
    ]


@pytest.fixture(params=_params(found()))
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine and a device that it serves; everything inside the test goes through it."""
    with backends.use(request.param.name):
        yield request.param


def engines(*names: str, on: str = "") -> pytest.MarkDecorator:
    """Runs a test with these engines alone, on that device alone."""
    reason = f"no {' or '.join(names)} engine for a GPU" if torch.cuda.is_available() else NO_GPU
    nothing = pytest.param(None, id="gpu", marks=[pytest.mark.gpu, pytest.mark.skip(reason=reason)])
    return pytest.mark.parametrize("engine", _params(found(names, on)) or [nothing], indirect=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """`pytest -m gpu` without a GPU has shown nothing, and says so by its status, too."""
    if session.config.option.markexpr == "gpu" and not torch.cuda.is_available() and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", [])
    why = Counter(str(report.longrepr[-1]).removeprefix("Skipped: ") for report in reports)
    if why:
        told = "; ".join(f"{count} tests ({reason})" for reason, count in why.most_common())
        terminalreporter.write_line(f"not run here: {told}")


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
