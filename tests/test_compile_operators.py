"""The operators of torch.ops.fusedclip hold what they declare: schema, mutation, fake results, functionalization."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from .conftest import Engine

DTYPES = {"float32": [torch.float32] * 2, "mixed": [torch.bfloat16, torch.float64]}
Arguments = Callable[[list[Tensor]], tuple[object, ...]]
LIMIT = torch.tensor(0.5)
ARGUMENTS: dict[str, Arguments] = {
    "total_norm": lambda grads: (grads, 2.0),
    "norms": lambda grads: (grads, [0, 1, 0], 1.0),
    "clip_norm_": lambda grads: (grads, LIMIT, 2.0, False),
    "clip_each_": lambda grads: (grads, [-1, 0, 1, 1], LIMIT, 3.0),
    "clip_scopes_": lambda grads: (grads, [1, 1], [LIMIT, LIMIT], 2.0, True),
    "scale_": lambda grads: (grads, LIMIT, LIMIT * 3),
    "clamp_": lambda grads: (grads, 0.25),
    "stats": lambda grads: (grads, [0, 1, 0], 2.0),
    "clip_with_stats_": lambda grads: (grads, [-1, 0, 1], LIMIT, 2.0, False),
}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(engine: Engine, name: str, dtypes: str) -> None:
    if engine.name == "triton" and engine.device == "cpu":
        pytest.skip("opcheck hands over tensors that Triton's interpreter cannot read")
    grads = [engine.randn(5 + i, dtype=dtype, seed=i) for i, dtype in enumerate(DTYPES[dtypes])]
    opcheck(getattr(torch.ops.fusedclip, name).default, ARGUMENTS[name](grads))


def test_every_operator_is_checked() -> None:
    here = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusedclip::")}
    assert here == set(ARGUMENTS)


def test_a_tensor_that_is_no_limit_changes_no_gradient() -> None:
    grads = [torch.ones(3)]
    for bad in (torch.tensor(-1.0), torch.tensor(float("nan")), torch.ones(2)):
        with pytest.raises((TypeError, ValueError), match="max_norm"):
            torch.ops.fusedclip.clip_norm_(grads, bad, 2.0, False)
    assert grads[0].tolist() == [1.0, 1.0, 1.0]
