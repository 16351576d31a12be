"""Where records go: a file, TensorBoard, Weights & Biases, a logger, any function."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..arguments import shown
from .history import few
from .record import Record, header

Sink = Callable[[Record], object]


def as_sink(given: Any, names: Sequence[str], sizes: Sequence[int]) -> Sink:
    """What a user named, as a function of a record. Raises TypeError or ValueError for what is none."""
    if isinstance(given, str | Path):
        return JsonLines(Path(given), names, sizes)
    if isinstance(given, logging.Logger):
        return Log(given)
    if callable(getattr(given, "add_scalar", None)) and callable(getattr(given, "add_histogram", None)):
        return TensorBoard(given)
    if callable(getattr(given, "log", None)):
        return WeightsAndBiases(given)
    if callable(given):
        return given  # type: ignore[no-any-return]
    raise TypeError(
        "a sink is a path that ends in .jsonl, a TensorBoard SummaryWriter, a Weights & Biases run, a logging.Logger "
        f"or a function of a record, got {shown(given)}"
    )


class JsonLines:
    """A line for each record, added to the file; it is there when the call returns."""

    def __init__(self, path: Path, names: Sequence[str], sizes: Sequence[int]) -> None:
        if path.suffix != ".jsonl":
            raise ValueError(f"a sink's path must end in .jsonl, got {str(path)!r}")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"the directory of the sink {str(path)!r} does not exist; make it first")
        stopped = _ends_within_a_line(path)
        self._file = path.open("a", buffering=1)
        self._file.write("\n" * stopped + header(names, sizes) + "\n")

    def __call__(self, record: Record) -> None:
        self._file.write(record.as_json() + "\n")

    def close(self) -> None:
        self._file.close()


def _ends_within_a_line(path: Path) -> bool:
    """Whether an earlier run was stopped while it wrote."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


class TensorBoard:
    """Scalars below grad/, and a histogram of the logarithms of the layers' norms."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __call__(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.step)
        logarithms = [math.log10(norm) for norm in record.layers or () if norm is not None and 0 < norm < math.inf]
        if logarithms:
            self._writer.add_histogram("grad/log10 of layer norms", torch.tensor(logarithms, device="cpu"), record.step)

    def flush(self) -> None:
        self._writer.flush()


class WeightsAndBiases:
    """One `run.log` for each record, over grad/step, as records come later than the run's own step."""

    def __init__(self, run: Any) -> None:
        self._run = run
        if callable(getattr(run, "define_metric", None)):
            run.define_metric("grad/step", hidden=True)
            run.define_metric("grad/*", step_metric="grad/step")

    def __call__(self, record: Record) -> None:
        self._run.log({**scalars(record), "grad/step": record.step})


class Log:
    """A line at level INFO, a WARNING where the norm is not finite, with the parameters where that began."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def __call__(self, record: Record) -> None:
        if not math.isfinite(record.norm):
            self._logger.warning(
                "step %d: the gradient norm is %s; not finite are %s",
                record.step,
                record.norm,
                few(record.nonfinite, "parameter", 8) or "none of the parameters by itself",
            )
        elif record.clipped:
            self._logger.info("step %d: gradient norm %.4g, clipped by %.4g", record.step, record.norm, record.coef)
        else:
            self._logger.info("step %d: gradient norm %.4g", record.step, record.norm)


def scalars(record: Record) -> dict[str, float]:
    """By the names that TensorBoard and Weights & Biases show."""
    values = {
        "grad/norm": record.norm,
        "grad/coef": record.coef,
        "grad/clipped": float(record.clipped),
        "grad/zeros": float(record.zeros),
        "grad/largest": record.largest,
        "grad/nonfinite parameters": float(len(record.nonfinite)),
    }
    return values if record.limit is None else {**values, "grad/limit": record.limit}
