"""What documents and docstrings name is there: commands with their options, files, extras, variables, links."""

import argparse
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest

import fusedclip.__main__
from benchmarks import cli
from tests import fuzz

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("docs/*.md")])
SOURCES = [*(path for name in ("fusedclip", "benchmarks", "tests", "examples") for path in (ROOT / name).rglob("*.py"))]
SOURCES += [ROOT / "setup.py", ROOT / "docs" / "conf.py"]
PROGRAMS: dict[str, Callable[[], int]] = {
    "fusedclip": fusedclip.__main__.main,
    "benchmarks": cli.main,
    "tests.fuzz": fuzz.main,
}
# What stands in a document for something of the reader's.
EXAMPLES = {"N": "2", "S": "1", "COMMAND": "run", "NAME": "claims", "LANE": "lint"}
VARIABLE = re.compile(r"[A-Z_]+=\S+ ")


def commands(path: Path) -> Iterator[str]:
    """Code spans, which may go on in the next line, and lines of blocks of code."""
    text = path.read_text()
    blocks = re.findall(r"```.*?\n(.*?)```", text, re.DOTALL) + re.findall(r"^ {4}\S.*$", text, re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in chain((" ".join(span.split()) for span in spans), *(block.splitlines() for block in blocks)):
        for command in re.sub(r"\s+#.*", "", line).split("&&"):
            while (command := command.strip()) and (variable := VARIABLE.match(command)):
                command = command[variable.end() :]
            yield command


def named(*starts: str) -> list[object]:
    found = {(command, path) for path in DOCUMENTS + SOURCES for command in commands(path)}
    assert found
    one = {command: path for command, path in sorted(found) if command.startswith(starts)}
    return [pytest.param(command, id=f"{path.relative_to(ROOT)}: {command}") for command, path in one.items()]


class Parsed(Exception):
    pass


@pytest.mark.parametrize("command", named("python -m "))
def test_programs_take_what_is_said_of_them(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *words = shlex.split(re.sub(r"[\[\]]|\.\.\.", "", command))[2:]
    words = [EXAMPLES.get(word, word) for word in words]
    assert importlib.util.find_spec(module), module
    if module not in PROGRAMS:
        assert not words or not module.startswith(("tests", "benchmarks")), "it takes no arguments"
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *arguments: object) -> None:
        parse_args(self, *arguments)  # type: ignore[call-overload]
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr("sys.argv", [module, *words])
    with pytest.raises((Parsed, SystemExit)) as ended:
        PROGRAMS[module]()
    complaint = capsys.readouterr().err
    # --help ends by itself; a command may be named without what it requires, but not with what it does not know.
    assert ended.type is Parsed or not complaint or "arguments are required" in complaint, complaint


@pytest.mark.parametrize("command", named("pytest ", "torchrun ", ".ci/", "sphinx-build", "pip install '"))
def test_files_lanes_and_extras_are_there(command: str) -> None:
    words = [EXAMPLES.get(word, word) for word in shlex.split(command)]
    for word in words:
        assert not re.match(r"(tests|examples|benchmarks|docs|\.ci)\b", word) or (ROOT / word).exists(), word
    if words[0] == ".ci/run" and len(words) > 1:
        assert re.search(rf"^  {words[1]}\)", (ROOT / words[0]).read_text(), re.MULTILINE)
    for extra in re.findall(r"\[(\w+)\]", command):
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), extra


def test_variables_are_read_somewhere() -> None:
    read = [path.read_text() for path in SOURCES]
    for path in DOCUMENTS:
        for variable in set(re.findall(r"\bFUSEDCLIP_[A-Z_]+", path.read_text())):
            assert any(f'"{variable}"' in text for text in read), f"{path.name}: {variable}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r'(?:\]\(|src=")([^)":]+)[)"]', re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)):
        name, _, anchor = link.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link
