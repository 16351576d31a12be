"""The example, among ranks that are there; .ci/run launches it as its first lines say, too."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from ..conftest import ALL, EXAMPLES
from ..ranks import in_one_worker, on_ranks

ROOT = Path(__file__).resolve().parents[2]


def check(shown: str) -> None:
    norms = [float(norm) for norm in re.findall(r"norm (\d\S+)", shown)]
    assert len(norms) == 5
    assert all(0 < norm < 100 for norm in norms)
    assert "the same norm on all 4 ranks" in shown


def example(rank: int) -> None:
    shown = io.StringIO()
    with (
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
        mock.patch.dict(os.environ, RANK=str(rank)),
        contextlib.redirect_stdout(shown),
    ):
        runpy.run_path(str(ROOT / "examples/distributed.py"), run_name="__main__")
    if rank == 0:
        check(shown.getvalue())


@in_one_worker
def test_the_example() -> None:
    on_ranks(4, example)


@pytest.mark.skipif(EXAMPLES < ALL, reason=f"FUSEDCLIP_EXAMPLES={ALL} launches four processes, as .ci/run does")
def test_the_example_is_launched() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launch, "examples/distributed.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check(done.stdout)
