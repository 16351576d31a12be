"""docs/recipes.md: with each library the weights that torch's functions give, within `assert_trains_as_torch`'s bar."""

import importlib
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from . import recipes, share
from .recipes import Names, assert_trains_as_torch, batches, loop

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def test_each_recipe_is_run() -> None:
    tests = Path(__file__).read_text() + (Path(__file__).parent / "test_recipes_on_ranks.py").read_text()
    assert [title for title in recipes.recipes() if f'"{title}"' not in tests] == []


def gpt2(limit: float, width: int = 16, layers: int = 1, rows: int = 24) -> Names:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=width, n_layer=layers, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    tokens = torch.randint(0, 40, (rows, 16), generator=torch.Generator().manual_seed(0))
    return {"model": transformers.GPT2LMHeadModel(config), "tokens": tokens, "max_norm": limit, "torch": torch}


@pytest.fixture
def arguments(tmp_path: Path) -> Names:
    return trainer_arguments(str(tmp_path))


def trainer_arguments(folder: str) -> Names:
    """Of Hugging Face's trainers."""
    return {
        "output_dir": folder, "per_device_train_batch_size": 4, "max_steps": 5, "learning_rate": 0.5,
        "optim": "sgd", "lr_scheduler_type": "constant", "use_cpu": True, "report_to": "none", "seed": 0,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def hugging_face_names(names: Names, arguments: Names) -> Names:
    transformers = pytest.importorskip("transformers")
    data = [{"input_ids": row, "labels": row} for row in names["tokens"]]
    names |= {"Trainer": transformers.Trainer, "TrainingArguments": transformers.TrainingArguments}
    return names | {"arguments": arguments, "data": data}


def test_hugging_face_trainer(arguments: Names) -> None:
    logged: list[Any] = []

    def make(limit: float) -> Names:
        names = hugging_face_names(gpt2(limit), arguments)
        logged.append(names)
        return names

    assert_trains_as_torch("Hugging Face Trainer", make)
    norms = [
        [entry["grad_norm"] for entry in one["trainer"].state.log_history if "grad_norm" in entry] for one in logged
    ]
    assert len(norms[-1]) == 5
    assert norms[-1] == pytest.approx(norms[0], rel=1e-5)


def trl_names(names: Names, arguments: Names) -> Names:
    """With text and a tokenizer for the tokens of `gpt2`."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {f"w{i}": i for i in range(38)} | {"[end]": 38, "[unknown]": 39}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[unknown]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[end]", pad_token="[end]")
    text = [" ".join(f"w{token % 38}" for token in row) for row in names["tokens"].tolist()]
    names |= {"arguments": {**arguments, "max_length": 16}, "data": datasets.Dataset.from_dict({"text": text})}
    return names | {"SFTConfig": trl.SFTConfig, "SFTTrainer": trl.SFTTrainer, "tokenizer": tokenizer}


def test_trl(arguments: Names) -> None:
    assert_trains_as_torch("TRL", lambda limit: trl_names(gpt2(limit), arguments))


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")

    def make(limit: float) -> Names:
        return loop(limit) | {"accelerator": accelerate.Accelerator(cpu=True)}

    assert_trains_as_torch("Accelerate", make)


def test_accelerate_in_the_step() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = """
model, optimizer = accelerator.prepare(model, optimizer)
for batch in batches:
    with accelerator.accumulate(model):
        accelerator.backward(model(batch).square().mean())
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
"""

    def make(limit: float) -> Names:
        return loop(limit) | {"accelerator": accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)}

    assert_trains_as_torch("Accelerate, in the step", make, plain)


def lightning_module(lightning: Any) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = recipes.perceptron()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(batch).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.5, fused=True)

    return Module


PLAIN_LIGHTNING = """
trainer = lightning.Trainer(gradient_clip_val=max_norm, **arguments)
trainer.fit(module, loader)
"""


@pytest.mark.parametrize("title", ["Lightning Trainer", "Lightning, by a function of ours", "Lightning, in the step"])
def test_lightning(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lightning = pytest.importorskip("lightning")
    arguments = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip

    def make(limit: float) -> Names:
        module = lightning_module(lightning)
        names = {
            "lightning": lightning,
            "Module": module,
            "module": module(),
            "loader": DataLoader(batches(), batch_size=None),
            "max_norm": limit,
        }
        return names | {"arguments": arguments, "model": names["module"]}

    if title != "Lightning Trainer":  # these define the module's class
        fit = "module = model = Clipped()\nlightning.Trainer(**arguments).fit(module, loader)\n"
        code = recipes.recipes()[title] + fit
        monkeypatch.setattr(recipes, "recipes", lambda: {title: code})
    assert_trains_as_torch(title, make, PLAIN_LIGHTNING)


def test_fabric() -> None:
    fabric = pytest.importorskip("lightning.fabric")
    assert_trains_as_torch("Fabric", lambda limit: loop(limit) | {"fabric": fabric.Fabric(accelerator="cpu")})


def test_torchtitan() -> None:
    pytest.importorskip("torchtitan")
    assert_trains_as_torch("torchtitan", loop)


def test_a_step_of_torchtitans_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trainer wants a GPU to be built, its step does not; the norm is logged."""
    trainers = pytest.importorskip("torchtitan.trainer")
    logs = []

    def make(limit: float) -> Names:
        names = loop(limit)
        trainer = MagicMock(model_parts=[names["model"]], optimizers=names["optimizer"], device=torch.device("cpu"))
        trainer.gradient_accumulation_steps = trainer.num_pipeline_parallel_microbatches = 1
        trainer.config.training.max_norm = limit
        trainer.lr_schedulers.get_metrics.return_value = {}
        trainer.parallel_dims = MagicMock(dp_enabled=False, pp_enabled=False, dp_cp_enabled=False, ep_enabled=False)
        trainer.parallel_dims.get_optional_mesh.return_value = None

        def forward_backward_step(*, input_dict: Names, labels: Tensor, global_valid_tokens: Tensor) -> Tensor:
            loss: Tensor = names["model"](input_dict["input"]).square().mean()
            loss.backward()
            return loss

        trainer.forward_backward_step = forward_backward_step
        logs.append(trainer.metrics_processor.log)
        return names | {"trainer": trainer, "train_step": trainers.Trainer.train_step}

    plain = "for batch in batches:\n    train_step(trainer, iter([({'input': batch}, torch.ones(5))]))\n"
    title = "torchtitan's step"
    patched = f"import fusedclip\nfusedclip.patch_torch()\n{plain}"
    monkeypatch.setattr(recipes, "recipes", lambda: {title: patched})
    assert_trains_as_torch(title, make, plain)
    norms = [[call.args[3] for call in log.call_args_list] for log in logs]
    assert len(norms[-1]) == 6
    assert norms[-1] == pytest.approx(norms[0], rel=1e-5)


def peft_names(names: Names) -> Names:
    peft = pytest.importorskip("peft")
    lora = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "gaussian"}
    names |= {"get_peft_model": peft.get_peft_model, "LoraConfig": peft.LoraConfig, "lora": lora}
    return names | {"batches": names["tokens"].split(4)}


def test_peft() -> None:
    assert_trains_as_torch("peft", lambda limit: peft_names(gpt2(limit / 2)))


def timms_clip() -> Any:
    """timm's `dispatch_clip_grad`, without the rest of timm, which wants a torchvision for the same build of torch."""
    spec = find_spec("timm")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("no timm")
    root = Path(spec.submodule_search_locations[0])
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in (("timm", root), ("timm.utils", root / "utils")):
            package = types.ModuleType(name)
            package.__path__ = [str(folder)]
            patch.setitem(sys.modules, name, package)
        return importlib.import_module("timm.utils.clip_grad").dispatch_clip_grad


@pytest.mark.parametrize("mode", ["norm", "value"])
def test_timm(mode: str) -> None:
    names = {"dispatch_clip_grad": timms_clip(), "mode": mode}
    assert_trains_as_torch("timm", lambda limit: loop(limit) | names)


def test_gradient_accumulation() -> None:
    assert_trains_as_torch("Gradient accumulation", loop)


def test_share_times_both_functions() -> None:
    with recipes.Calls() as calls:
        for clip, step in share.measured("Gradient accumulation", share.loop()):
            assert 0 < clip < step
    assert calls.count == share.STEPS // 4  # half of the clips, of which there is one in two batches


def test_the_bar_can_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program without us, and by a clip to another limit."""
    code = recipes.recipes()["Gradient accumulation"]
    for wrong in (recipes.torchs(code), code.replace("max_norm)", "max_norm * (1 + 1e-4))")):
        monkeypatch.setattr(recipes, "recipes", lambda wrong=wrong: {"wrong": wrong})
        with pytest.raises(AssertionError):
            assert_trains_as_torch("wrong", loop, recipes.torchs(code))
