"""docs/recipes.md, on two ranks: weights as of one process that has the whole model and both ranks' data, or as torch's
own wrapper leaves them."""

import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from ..ranks import on_two_ranks
from .recipes import Names, assert_trains_as_torch, batches, loop, perceptron, recipes, torchs

pytestmark = pytest.mark.filterwarnings("ignore")


def own_data(limit: float) -> Names:
    """Each rank has batches of its own."""
    return loop(limit) | {"batches": [batch * (1 + dist.get_rank()) for batch in batches()], "group": dist.group.WORLD}


def ddp(rank: int) -> None:
    def make(limit: float) -> Names:
        return own_data(limit) | {"DistributedDataParallel": DistributedDataParallel}

    assert_trains_as_torch("DistributedDataParallel", make)


def fsdp2(rank: int) -> None:
    """By our name, and by torch's under `patch_torch()`; both recipes against torch's own."""

    def make(limit: float) -> Names:
        return own_data(limit) | {"fully_shard": fully_shard}

    code = recipes()["FSDP2"]
    plain = torchs(code)
    assert_trains_as_torch("FSDP2", make, plain)
    patched = plain.replace("import torch\n", "import fusedclip\n\nfusedclip.patch_torch()\n", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.clients.recipes.recipes", lambda: {"FSDP2": patched})
        assert_trains_as_torch("FSDP2", make, plain)


DEEPSPEEDS_OWN = """
engine, optimizer, _, _ = deepspeed.initialize(
    model=model, optimizer=optimizer, config={**config, "gradient_clipping": max_norm}
)
for batch in batches:
    engine.backward(engine(batch).square().mean())
    engine.step()
"""


def deepspeed(rank: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("LOCAL_RANK", str(rank))
        import deepspeed

        collectives = sys.modules["deepspeed.comm.torch"]  # whose name `torch` is torch's
        patch.setattr(collectives, "build_shm_op", lambda: None)  # a minute of compiling; gloo does as well

        def make(limit: float) -> Names:
            return own_data(limit) | {"deepspeed": deepspeed, "config": {"train_micro_batch_size_per_gpu": 5}}

        assert_trains_as_torch("DeepSpeed", make, DEEPSPEEDS_OWN)


def fsdp1(rank: int) -> None:
    def make(limit: float) -> Names:
        return own_data(limit) | {"FullyShardedDataParallel": FullyShardedDataParallel}

    own = "model.clip_grad_norm_(max_norm)"
    called = "fusedclip.clip_grad_norm_(model.parameters(), max_norm, group=group)"
    code = recipes()["FSDP1"]
    assert called in code
    assert_trains_as_torch("FSDP1", make, torchs(code.replace(called, own)))


PIPELINE_WHOLE = """
for batch in batches:
    (model(batch) - target).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
model = model[rank]
"""


def pipeline(rank: int) -> None:
    """Two stages; the whole model in one process is what they have to be like."""
    target = torch.zeros(4, 4)

    def make(limit: float) -> Names:
        names = loop(limit)
        whole = perceptron()
        model = nn.Sequential(nn.Sequential(whole[0], whole[1]), nn.Sequential(whole[2]))
        stage = PipelineStage(model[rank], rank, 2, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda y, t: (y - t).square().mean())
        data = [batch[:4] for batch in batches()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        names |= {"model": model, "optimizer": optimizer, "batches": data, "target": target, "rank": rank}
        return names | {"stage": stage.submod, "schedule": schedule, "group": dist.group.WORLD}

    code = recipes()["Pipeline stages"] + "model = stage\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.clients.recipes.recipes", lambda: {"Pipeline stages": code})
        assert_trains_as_torch("Pipeline stages", make, PIPELINE_WHOLE)


NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="could not import 'deepspeed'")


@pytest.mark.parametrize(
    "scenario", [ddp, fsdp1, fsdp2, pipeline, pytest.param(deepspeed, id="deepspeed", marks=NEEDS_DEEPSPEED)]
)
def test_on_two_ranks(scenario: Callable[[int], None]) -> None:
    on_two_ranks(scenario)
