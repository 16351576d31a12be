"""A few calls of everything, for compute-sanitizer, which takes a hundred times as long:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck  --report-api-errors no --error-exitcode 1 python -m tests.sanitizer_script
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.sanitizer_script
    compute-sanitizer --tool initcheck --error-exitcode 1 python -m tests.sanitizer_script

Without torch's cache memcheck sees the ends of each tensor, and initcheck memory that nobody has written; torch's own
probing of the driver is not to count as an error. racecheck looks at shared memory only.
"""

import math

import torch

from fusedclip.backends import cuda
from fusedclip.gradients import Batch
from fusedclip.norms import ClipRule

DEVICE = torch.device("cuda")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def gradients(count: int) -> list[torch.Tensor]:
    """Every dtype; aligned, misaligned and empty."""
    grads = [torch.ones(0, device=DEVICE)]
    for i in range(count):
        grads.append(torch.ones(1 + 997 * i % 30_000, device=DEVICE, dtype=DTYPES[i % 4])[i % 3 :])
    return grads


def main() -> None:
    engine = cuda.Cuda()
    for count in (12, 400, 1600):
        batch = Batch(gradients(count), DEVICE)
        for p in (0.0, 1.0, 2.0, 3.0, math.inf, -math.inf):
            engine.lift(batch, p)
            engine.norm(batch, p, torch.float32)
            for cuda.form in ("two launches", "auto"):
                engine.clip_(batch, p, ClipRule(0.5), torch.float32, multiplier=torch.ones((), device=DEVICE))
        coefs = torch.linspace(0.5, 1, len(batch.tensors), dtype=torch.float64, device=DEVICE)
        engine.scale_(batch, coefs, zero=True)
        engine.clamp_(batch, 0.01)
        torch.cuda.synchronize()
        print(f"{count} tensors: done")


if __name__ == "__main__":
    main()
