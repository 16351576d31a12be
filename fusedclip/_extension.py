"""The compiled module, or the reason why there is none. Imported after torch, whose OpenMP runtime it uses."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch

from . import dtypes

C: Any = None  # untyped: a type checker cannot see inside a compiled module
reason: str | None = None


def _load() -> ModuleType:
    module = importlib.import_module("fusedclip._C")
    if module.version != version("fusedclip"):
        raise ImportError(f"it is of version {module.version}, the package of {version('fusedclip')}; install again")
    if getattr(module, "dtypes", ()) != tuple(map(dtypes.name_of, dtypes.LIST)):
        raise ImportError("its dtypes are not those of dtypes.py; build it again")
    module.bind_torch(torch.Tensor, torch.nn.Parameter)
    return module


if importlib.util.find_spec("fusedclip._C") is None:
    reason = "the extension is not built (installed with FUSEDCLIP_EXTENSION=0?); reinstall without that variable"
elif not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    reason = f"torch {torch.__version__} has no DLPack exchange API; torch >= 2.10 has"
else:
    try:
        C = _load()
    except (ImportError, RuntimeError) as error:
        reason = f"the extension is built but did not load: {error}"


def subnormals_count(device: torch.device, threads: int = 0) -> AbstractContextManager[None]:
    """Inside it torch's own operations neither read nor write subnormals as zeros, whatever set_flush_denormal says.

    On so many threads of torch's, all of them unless told otherwise. The compiled engine sees to that by itself.
    """
    if C is None or device.type != "cpu":
        return nullcontext()
    context: AbstractContextManager[None] = C.TeamUnderflow(threads or torch.get_num_threads())
    return context
