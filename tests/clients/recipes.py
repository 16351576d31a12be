"""The recipes of docs/recipes.md, and what they have to be no worse than: the same program with torch's functions."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusedclip import passes, patch

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
LIMIT = 0.05  # below the norms of all these programs
Names = dict[str, Any]


def recipes() -> dict[str, str]:
    """Code by title."""
    return dict(re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))


def torchs(code: str) -> str:
    """The same program without us."""
    code = re.sub(r"^fusedclip\.patch_torch\(\)\n", "", code, flags=re.MULTILINE)
    code = code.replace("fusedclip.clip_grad_norm_(", "torch.nn.utils.clip_grad_norm_(")
    return code.replace("import fusedclip\n", "import torch\n")


def weights(names: Names) -> Tensor:
    model = names["model"]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = [each.full_tensor() if isinstance(each, DTensor) else each for each in parameters]
    return torch.cat([each.detach().double().flatten() for each in whole])


def trained(code: str, names: Names) -> Tensor:
    try:
        exec(compile(code, str(PAGE), "exec"), names)
    finally:
        for handle in list(patch._active):
            handle.remove()
    return weights(names)


def assert_trains_as_torch(title: str, make: Callable[[float], Names], plain: str | None = None) -> None:
    """No further from torch's weights than torch's own move if `max_norm` moves by 2e-6."""
    code, plain = recipes()[title], plain or torchs(recipes()[title])
    assert "fusedclip" not in plain
    assert code.count("\n") - code.count("\n\n") <= 10, "a recipe has ten lines"
    expected, moved = trained(plain, make(LIMIT)), trained(plain, make(LIMIT * (1 + 2e-6)))
    assert (trained(plain, make(1.5 * LIMIT)) - expected).norm() > 1e-3, "nothing was clipped"
    with Calls() as calls:
        ours = trained(code, make(LIMIT))
    assert calls.count > 1, "torch's functions were called"
    rounding = 1e-7 * expected.abs().max()
    assert (ours - expected).abs().max() <= (moved - expected).abs().max() + rounding


class Calls:
    """How often the doors to the engines are used."""

    DOORS = ("clip_list_", "scale_list_", "clip_", "measure", "scale_", "clamp_")

    def __enter__(self) -> "Calls":
        self.count = 0
        self.before = {name: getattr(passes, name) for name in self.DOORS}
        for name in self.DOORS:
            setattr(passes, name, self._counting(name))
        return self

    def _counting(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self.before[name](*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, function in self.before.items():
            setattr(passes, name, function)


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))


def batches(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 8, generator=generator) * 10 for _ in range(count)]


def loop(limit: float) -> Names:
    """Names of a training loop without a library."""
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return {"torch": torch, "model": model, "optimizer": optimizer, "batches": batches(), "max_norm": limit}
