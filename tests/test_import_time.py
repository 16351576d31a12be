"""What `import fusedclip` adds to `import torch`."""

import os
import re
import subprocess
import sys

BOUND = 50.0  # ms; 20 measured


def milliseconds() -> float:
    """Of fusedclip and what it brings beyond torch, by Python's own account."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import torch; import fusedclip"],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (own,) = re.findall(r"^import time: +\d+ \| +(\d+) \| fusedclip$", run.stderr, re.MULTILINE)
    return int(own) / 1000


def test_import_adds_little() -> None:
    # One of a few: the first may have to write byte code, and others have the machine to share.
    assert any(milliseconds() < BOUND for _ in range(8))
