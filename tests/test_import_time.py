"""What `import fusedclip` adds to `import torch`."""

import os
import re
import subprocess
import sys
from itertools import chain

BOUND = 50.0  # ms; 20 measured


def imported() -> str:
    """Python's own account of the time that each module takes, in the order in which they are done."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import torch; import fusedclip"],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""}, capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip


def milliseconds(account: str) -> float:
    """Of fusedclip and what it brings beyond torch."""
    (own,) = re.findall(r"^import time: +\d+ \| +(\d+) \| fusedclip$", account, re.MULTILINE)
    return int(own) / 1000


def test_import_adds_little_and_no_compiler() -> None:
    account = imported()
    assert " fusedclip.clip\n" in account
    assert " torch._dynamo\n" not in account
    # One of a few: the first may have to write byte code, and others have the machine to share.
    assert any(milliseconds(one) < BOUND for one in chain([account], (imported() for _ in range(7))))
