"""`python -m tests.clients.share`: the part of a step that clipping takes, in the loops of the recipes' libraries.

One training run per library, in which torch's function and ours clip every other step, both called by torch's name. A
step is the time from one clip to the next; of both times the median is shown.
"""

import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import pairwise
from time import perf_counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fusedclip import clip, patch

from . import recipes, test_recipes
from .recipes import Names

STEPS, WARM, LIMIT = 40, 4, 1e-5
WIDTH, DEPTH = 256, 12
DDP = "DistributedDataParallel"  # the last: other libraries would see its group


class Alternating:
    """Torch's function and ours in turns; `times` has the start and the end of each call."""

    def __init__(self) -> None:
        torchs = patch._cell("clip_grad_norm_").cell_contents
        self.functions = [torchs, patch._replacement(clip.clip_grad_norm_, torchs)]
        self.times: list[tuple[float, float]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        norm = self.functions[len(self.times) % 2](*args, **kwargs)
        self.times.append((start, perf_counter()))
        assert norm > LIMIT, "the step was not clipped"
        return norm

    def milliseconds(self, which: int) -> tuple[float, float]:
        """Of a clip, and of the step that has it."""
        pairs = [(stop - start, end - start) for (start, stop), (end, _) in pairwise(self.times)]
        clips, steps = zip(*pairs[WARM + which :: 2], strict=True)
        return 1e3 * statistics.median(clips), 1e3 * statistics.median(steps)


def loop(**more: Any) -> Names:
    """A perceptron of 0.8 million parameters in 28 tensors."""
    between = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    model = nn.Sequential(nn.Linear(8, WIDTH), *between, nn.Linear(WIDTH, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    names = {"torch": torch, "model": model, "optimizer": optimizer, "max_norm": LIMIT, **more}
    return names | {"batches": [torch.randn(64, 8) for _ in range(STEPS)]}


def gpt2() -> Names:
    return test_recipes.gpt2(LIMIT, width=128, layers=4, rows=4 * STEPS)


def libraries(folder: str) -> dict[str, Callable[[], Names]]:
    """By the title of their recipe, the names that it needs."""
    import accelerate
    import lightning

    arguments = test_recipes.trainer_arguments(folder) | {"max_steps": STEPS, "learning_rate": 0.01}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)

    def lightnings() -> Names:
        names, module = loop(lightning=lightning), test_recipes.lightning_module(lightning)()
        module.model = names["model"]
        names |= {"module": module, "loader": torch.utils.data.DataLoader(names["batches"], batch_size=None)}
        return names | {"arguments": {"max_epochs": 1, "accelerator": "cpu", **quiet}}

    return {
        "Hugging Face Trainer": lambda: test_recipes.hugging_face_names(gpt2(), arguments),
        "TRL": lambda: test_recipes.trl_names(gpt2(), arguments),
        "peft": lambda: test_recipes.peft_names(gpt2()),
        "Accelerate": lambda: loop(accelerator=accelerate.Accelerator(cpu=True)),
        "Lightning Trainer": lightnings,
        "Fabric": lambda: loop(fabric=lightning.Fabric(accelerator="cpu")),
        "timm": lambda: loop(dispatch_clip_grad=test_recipes.timms_clip(), mode="norm"),
        "Gradient accumulation": loop,
        DDP: lambda: loop(DistributedDataParallel=nn.parallel.DistributedDataParallel),
    }


def measured(title: str, names: Names) -> list[tuple[float, float]]:
    """Of torch's function and of ours: a clip and a step in ms."""
    clips = Alternating()
    with pytest.MonkeyPatch.context() as exchange, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        exchange.setattr(patch._cell("clip_grad_norm_"), "cell_contents", clips)
        exec(recipes.torchs(recipes.recipes()[title]), names)
    return [clips.milliseconds(which) for which in (0, 1)]


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    print(f"{'':24}{'torch: clip':>14}{'step':>8}{'share':>8}{'ours: clip':>14}{'step':>8}{'share':>8}   (ms)")
    with tempfile.TemporaryDirectory() as folder:
        for title, names in libraries(folder).items():
            if title == DDP:
                dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
            shown = "".join(f"{clip:14.3f}{step:8.2f}{clip / step:8.2%}" for clip, step in measured(title, names()))
            print(f"{title:24}{shown}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
