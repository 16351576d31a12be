"""The private names of torch that fusedclip relies on, the versions they were seen in, and what happens without them.

    torch.utils._python_dispatch._is_in_torch_dispatch_mode   this thread's modes are looked up at each call, 0.3 us
    torch._C._is_tracing                                      torch.jit.is_tracing, 80 ns more
    torch._C._get_dispatch_mode, ._TorchDispatchModeKey       AttributeError, inside of a dispatch mode only
    torch._ops.mode_stack_state_for_pre_dispatch              the same
    function._torchdynamo_disable, .._recursive, .._msg       dynamo traces into us: right results, noisy graph breaks
    torch._C._dynamo.eval_frame.set_code_exec_strategy,       dynamo compiles our frames after its graph break: right
        ._FrameExecStrategy, ._FrameAction                    results, slowly at first
    torch._C._increment_version                               torch.autograd.graph.increment_version, which an interrupt
                                                              may end before it has told of a write
    the closures of torch.nn.utils.clip_grad                  patch_torch() raises RuntimeError

and, where they are used (gradients/layouts.py, amp.py, optim/, compile.py, distributed.py, process_groups.py):

    DTensor._local_tensor, ._spec                             AttributeError for DTensors
    Tensor._values, ._indices                                 AttributeError for sparse gradients
    torch._C._disabled_torch_dispatch_impl,                   AttributeError for gradients of a subclass
        .DisableTorchFunctionSubclass
    GradScaler._check_scale_growth_tracker,                   amp cannot be imported, or raises AttributeError
        ._per_optimizer_states, grad_scaler.OptState
    Optimizer._optimizer_step_pre_hooks                       clip_on_step refuses the optimizer
    optimizer.grad_scale, .found_inf of fused optimizers      nothing divides the gradients that were left to them: the
                                                              tests of each would see it
    Optimizer._step_supports_amp_scaling                      a GradScaler unscales before the step, with a wait
    function._torchdynamo_inline                              one graph break for each call in a compiled step
    torch.distributed._functional_collectives                 ImportError under patch_torch() with DTensors
    ProcessGroup._device_types                                AttributeError where ranks communicate
    ProcessGroup._get_backend, backend.options._timeout       groups made here have the backend's own timeout

All of them are in torch 2.13; those of the first list but _increment_version were found in the sources of 2.10, too.
"""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType, SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _python_dispatch

F = TypeVar("F", bound=Callable[..., Any])


class TorchOnly(NotImplementedError):
    """torch's own function can do what was asked for, fusedclip's cannot. `patch_torch` then calls torch's."""


def is_dtensor(tensor: object) -> bool:
    # Looked up by name: importing torch.distributed.tensor takes long, and a build of torch may lack it.
    return type(tensor) is not Tensor and any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


def dispatches(tensor: Tensor) -> bool:
    """Whether it is of a subclass that may keep its elements elsewhere, or have none: a DTensor, a FakeTensor. Another
    subclass is its own memory."""
    return type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


as_torch: ContextVar[bool] = ContextVar("fusedclip_as_torch", default=False)
"""Whether it was torch's function that was called: then collectives are functional ones and norms DTensors, as its."""


is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]
"""Whether torch.jit.trace is at work."""

modes: Any = _python_dispatch
"""Holds a flag that is set while there is a TorchDispatchMode: in any thread, and also one that only watches."""
if not hasattr(modes, "_is_in_torch_dispatch_mode"):
    modes = SimpleNamespace(_is_in_torch_dispatch_mode=True)  # then refuse_tracing() always has a closer look


def refuse_tracing() -> None:
    """Raise where a call would run once, now, and its result get into a recorded graph as a constant."""
    if not is_tracing() and not modes._is_in_torch_dispatch_mode:
        return
    tracer = _tracer()
    if tracer is not None:
        raise TorchOnly(
            f"fusedclip cannot run under {tracer}: it reads the gradients' memory, which no graph records. Call it "
            "outside of what is traced, or call torch.nn.utils.clip_grad_norm_ there, which can be traced and which "
            "patch_torch() leaves as it is while tracing"
        )


def _tracer() -> str | None:
    """What records operators in this thread, in words."""
    if is_tracing():
        return "torch.jit.trace"
    kinds = torch._C._TorchDispatchModeKey
    if torch._C._get_dispatch_mode(kinds.PROXY) is not None or torch._ops.mode_stack_state_for_pre_dispatch().count():  # type: ignore[no-untyped-call]
        return "make_fx or torch.export"
    return "a FakeTensorMode" if torch._C._get_dispatch_mode(kinds.FAKE) is not None else None


def outside_graphs(function: F) -> F:
    """Decorator: under torch.compile a call of this function is one graph break, and nothing below it is compiled.

    That is torch.compiler.disable without its wrapper, which takes 1 us a call and imports torch._dynamo (seconds).
    Dynamo's tracing looks at the attributes; dynamo's frame hook, which sees the call after the break, at the code.
    """
    marked: Any = function
    marked._torchdynamo_disable = marked._torchdynamo_disable_recursive = True
    marked._torchdynamo_disable_msg = "fusedclip reads the gradients' memory, which no graph records"
    if _SKIP is not None:
        torch._C._dynamo.eval_frame.set_code_exec_strategy(marked.__code__, _SKIP)
    return function


def _skip() -> Any:
    """The strategy to run a frame, and those that it calls, as if there were no dynamo."""
    try:
        from torch._C._dynamo import eval_frame

        return eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
    except (ImportError, AttributeError, TypeError):
        return None


_SKIP = _skip()


increment_version: Callable[[list[Tensor]], None] = getattr(
    torch._C, "_increment_version", torch.autograd.graph.increment_version
)
"""Tells autograd that tensors were written: writes through a raw pointer don't bump the version counters."""


def user_stacklevel() -> int:
    """For warnings.warn in the function that asks: the first frame that is neither ours nor torch's, which is between
    us and the user where torch is patched or has called a hook."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _package(frame) in ("fusedclip", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
