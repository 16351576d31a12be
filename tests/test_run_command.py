"""`python -m fusedclip run`: a program as python itself would run it, with torch's functions redirected."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import torch
from torch.nn.utils import clip_grad_norm_
parameter = torch.nn.Parameter(torch.zeros(2))
parameter.grad = torch.tensor([3e30, 4e30])  # torch's own norm is inf
norm = clip_grad_norm_([parameter], 1.0)
print(__name__, sys.argv[1:], sys.argv[0].endswith("program.py"), round(float(norm) / 1e30))
import neighbour
sys.exit(3)
"""


@pytest.mark.parametrize("command", [["program.py"], ["-m", "program"]])
def test_run(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "neighbour.py").write_text("print('found')")
    here = str(Path(__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-m", "fusedclip", "run", *command, "--lr", "-m", "1"],
        cwd=tmp_path, env={"PYTHONPATH": here}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 3, run.stderr
    words, found = run.stdout.splitlines()
    assert words == "__main__ ['--lr', '-m', '1'] True 5"
    assert found == "found"
