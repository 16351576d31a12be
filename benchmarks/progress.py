"""The progress bar, on stderr; where tqdm is not installed, as may be on a GPU machine, lines in its place."""

import sys
from functools import partial
from typing import Any, TextIO


class Lines:
    """What is done, a line each; what is counted is not told."""

    def __init__(self, desc: str = "", **_: Any) -> None:
        if desc:
            self.set_description(desc)

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, count: int = 1) -> None: ...

    def set_description(self, text: str) -> None:
        self.write(text, sys.stderr)

    def write(self, text: str, file: TextIO) -> None:
        print(text, file=file, flush=True)


try:
    from tqdm import tqdm
except ImportError:
    tqdm = Lines
progress_bar = partial(tqdm, dynamic_ncols=True)
