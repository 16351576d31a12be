"""The registry: what is available, what is forced, what is refused, and that nothing falls back in silence."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fusedclip
from fusedclip import _extension, backends, dtypes

PACKAGE = Path(fusedclip.__file__).parent


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else ["-m", "fusedclip"])],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_cpu_engine_is_preferred_and_the_reference_is_always_there() -> None:
    names = backends.available()
    assert names[-1] == "reference"
    assert "cpu" in names
    assert backends.serving(fusedclip.gradients.Batch([torch.ones(1)], torch.device("cpu"))).name == "cpu"


def test_an_extension_with_another_list_of_dtypes_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "LIST", dtypes.LIST[::-1])
    with pytest.raises(ImportError, match="build it again"):
        _extension._load()


def test_use_forces_an_engine_and_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    reference = next(b for b in backends.ORDER if b.name == "reference")
    lift = type(reference).lift
    monkeypatch.setattr(type(reference), "lift", lambda self, *a: calls.append(1) or lift(self, *a))
    with backends.use("reference"):
        fusedclip.get_total_norm([torch.ones(3)])
        with backends.use("cpu"):
            fusedclip.get_total_norm([torch.ones(3)])
    fusedclip.get_total_norm([torch.ones(3)])
    assert len(calls) == 1


def test_use_is_per_thread() -> None:
    seen = []
    with backends.use("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.explain()))
        thread.start()
        thread.join()
        assert "forced: reference" in backends.explain()
    assert "forced" not in seen[0]


def test_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match=r"no backend is called 'gpu'; there are .*cpu.*reference"),
        backends.use("gpu"),
    ):
        pass


def test_a_forced_engine_that_cannot_serve_says_why() -> None:
    meta = fusedclip.gradients.Batch([torch.ones(1, device="meta")], torch.device("meta"))
    with backends.use("cpu"), pytest.raises(RuntimeError, match=r"'cpu' is forced .* serves the CPU, not meta"):
        backends.serving(meta)


def test_explain_has_a_line_for_each_engine() -> None:
    text = backends.explain()
    for backend in backends.ORDER:
        assert backend.name in text
    assert "preferred on cpu" in text


@pytest.fixture
def started_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Has FUSEDCLIP_BACKEND read again, which a process does once."""
    readers = (backends._from_environment, backends._unforced_for_lists)

    def start(name: str) -> None:
        monkeypatch.setenv("FUSEDCLIP_BACKEND", name)
        for reader in readers:
            reader.cache_clear()

    yield start
    for reader in readers:
        reader.cache_clear()


def test_environment_variable(started_with: Callable[[str], None]) -> None:
    ones = [torch.ones(1)]
    started_with("reference")
    assert "forced: reference" in backends.explain()
    assert backends.serving(fusedclip.gradients.Batch(ones, ones[0].device)).name == "reference"
    assert backends.for_lists() is None
    started_with("quick")
    with pytest.raises(ValueError, match="FUSEDCLIP_BACKEND: no backend is called 'quick'"):
        fusedclip.get_total_norm(ones)


def test_the_module_always_prints() -> None:
    """What the environment asks for, the possible and the impossible; without any of it, see test_check.py."""
    shown = run(
        "", FUSEDCLIP_BACKEND="quick", FUSEDCLIP_CPU_PATTERN="2,2048,line/4,65536,page", THP_MEM_ALLOC_ENABLE="1"
    )
    assert shown.returncode == 0
    assert torch.__version__ in shown.stdout
    assert "cpu        serves cpu" in shown.stdout
    assert "no backend is called 'quick'" in shown.stdout
    assert "read in 2 streams turn about, asking for each line 2,048 bytes ahead" in shown.stdout
    assert "written in 4 streams turn about, asking for each page 65,536 bytes ahead" in shown.stdout
    assert "pages      " in shown.stdout


def test_without_the_extension_the_reference_serves_and_says_so(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "fusedclip", ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]  # it knows another place\n"
        "import fusedclip, torch, warnings; warnings.simplefilter('always')\n"
        "print(fusedclip.__file__, fusedclip.backends.available())\n"
        "with fusedclip.backends.use('reference'): fusedclip.get_total_norm([torch.ones(4)])\n"
        "print('as was asked', file=sys.stderr)\n"
        "for _ in range(2): print(fusedclip.get_total_norm([torch.ones(4)]))\n"
        "try:\n"
        "    with fusedclip.backends.use('cpu'): pass\n"
        "except RuntimeError as error: print(error)\n"
    )
    shown = run(code)
    assert shown.returncode == 0, shown.stderr
    assert str(tmp_path) in shown.stdout
    assert "'cpu'" not in shown.stdout.splitlines()[0]
    assert shown.stdout.count("tensor(2.)") == 2
    assert shown.stderr.count("the slow reference engine serves gradients on cpu") == 1
    assert "'cpu' cannot run on this machine: the extension is not built" in shown.stdout
    assert shown.stderr.startswith("as was asked")
