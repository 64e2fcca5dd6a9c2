"""S4: input that is small to write and endless to read is refused at once, in words."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

MIB = 2**20
CPU_S = 2.0
EXTRA_MIB = 200
MAIN = ("-m", "sweeper")
READ = (
    "-c",
    "import sys; from sweeper.data.row_files import *; from sweeper.data.examples import DropCounts\n"
    "from sweeper.core.errors import SweeperError\n"
    "ledger, name = DropCounts(), sys.argv[1]\n"
    "try: read_file(RowFile(name, lambda: open(name, 'rb')), ledger)\n"
    "except SweeperError as error: sys.exit(str(error))\n"
    "print(ledger)",
)


@dataclass(frozen=True)
class Used:
    """What a program took, and said."""

    exit_code: int
    cpu_s: float
    peak_mib: float
    said: str


def _run(folder: Path, *arguments: str) -> Used:
    """Run Python to its end; it may not take more than a minute of CPU or 4 GiB."""

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        resource.setrlimit(resource.RLIMIT_AS, (4096 * MIB, 4096 * MIB))

    with (folder / "said.txt").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, stdout=said, stderr=said, preexec_fn=limits
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        cpu_s = usage.ru_utime + usage.ru_stime
        return Used(process.returncode, cpu_s, usage.ru_maxrss / 1024, said.read())


def _sound(folder: Path) -> Path:
    path = folder / "sound.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 10)
    return path


def _aliases(folder: Path) -> list[str]:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 10)]
    return _experiment(folder, "\n".join(lines))


def _experiment(folder: Path, text: str) -> list[str]:
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "bomb.yaml").write_text("# @package _global_\n" + text)
    return ["+experiment=bomb", "-m"]


def _range(words: str, *more: str) -> Callable[[Path], list[str]]:
    overrides = ["+experiment=lr_rank_sweep", f"training.max_steps={words}", *more, "-m"]
    return lambda _: overrides


OTHERS = (
    *("training.learning_rate", "adapter.r", "adapter.alpha_over_r", "training.warmup_ratio"),
    "adapter.target_modules",
)
"""Keys that the experiment searches, made a grid of few points."""
CONFIGURATIONS = {
    "aliases": (_aliases, r"bomb.yaml:\d+: more than 20,000 values"),
    "alias_of_itself": (lambda f: _experiment(f, "a: &a [*a]"), "bomb.yaml:2: .* inside itself"),
    "deep_yaml": (
        lambda f: _experiment(f, "a: " + "[" * 5000 + "]" * 5000),
        "bomb.yaml:2: nested deeper than 100 levels",
    ),
    "million_keys": (
        lambda f: _experiment(f, "".join(f"k{n}: 1\n" for n in range(1_000_000))),
        "bomb.yaml: 10 MiB. A configuration has at most 1 MiB",
    ),
    "many_keys": (
        lambda f: _experiment(f, "".join(f"k{n}: 1\n" for n in range(80_000))),
        "bomb.yaml:10001: more than 20,000 values",
    ),
    "grid_of_a_billion": (
        _range("range(1,1000000000)", "sampler=grid", *(f"{key}=1,2" for key in OTHERS)),
        "training.max_steps.*999,999,999 values are no grid",
    ),
    "choice_of_a_billion": (_range("range(1000000000,1,-1)"), "a choice between 999,999,999"),
    "deep_override": (
        lambda _: ["model.base_model=" + "[" * 4000 + "]" * 4000],
        "nested deeper than 50 levels",
    ),
    "many_overrides": (lambda _: [f"+a{n}=1" for n in range(20_000)], "20,000 overrides. At most"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_that_explodes_is_refused(name: str, tmp_path: Path) -> None:
    """Exit 2 with the file or key, within 2 s of CPU and 200 MiB more than any wrong key takes."""
    plain = _run(tmp_path, *MAIN, "no.such.key=1")
    assert (plain.exit_code, "Traceback" in plain.said) == (2, False), plain.said
    write, words = CONFIGURATIONS[name]
    used = _run(tmp_path, *MAIN, *write(tmp_path))
    _check(used, plain, exit_code=2, words=words)


def _zeros(folder: Path) -> Path:
    """A gigabyte in one line, without its disk space."""
    path = folder / "line.jsonl"
    path.touch()
    os.truncate(path, 1024 * MIB)
    return path


def _zipped(kind: str, letter: bytes, mib: int) -> Callable[[Path], Path]:
    """Some hundred kilobytes that unpack to a thousand times as many."""

    def write(folder: Path) -> Path:
        path = folder / f"bomb{kind}.gz"
        with gzip.open(path, "wb", compresslevel=6) as file:
            for _ in range(mib):
                file.write(letter * MIB)
        return path

    return write


def _keys(folder: Path) -> Path:
    path = folder / "keys.jsonl"
    path.write_text(json.dumps({f"k{n}": 1 for n in range(1_000_000)}) + "\n")
    return path


def _deep(folder: Path) -> Path:
    path = folder / "deep.jsonl"
    path.write_text('{"a":' * 1_000_000 + "\n")
    return path


def _deep_list(folder: Path) -> Path:
    path = folder / "deep.json"
    path.write_text("[" * 1_000_000)
    return path


FILES = {
    "line_of_a_gigabyte": (_zeros, 1, "line.jsonl:1: 256 MiB without a line break"),
    "gzip_line": (_zipped(".jsonl", b"\0", 200), 1, "unpacks to more than 300 times its size"),
    "gzip_blank_lines": (_zipped(".jsonl", b"\n", 200), 1, "unpacks to more than 300 times"),
    "gzip_json": (_zipped(".json", b" ", 200), 1, "unpacks to more than 300 times"),
    "gzip_text": (_zipped(".txt", b"a", 200), 1, "unpacks to more than 300 times"),
    "gzip_table": (_zipped(".csv", b'"', 200), 1, "unpacks to more than 300 times its size"),
    "million_keys": (_keys, 0, "more than 10,000 keys in one row.*keys.jsonl:1"),
    "deep_list": (_deep_list, 1, "deep.json: nested deeper than"),
    "deep_json": (_deep, 0, "nested deeper than 100 levels.*deep.jsonl:1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_data_file_that_explodes_is_refused(name: str, tmp_path: Path) -> None:
    """The file, or its row, by name and line, within 2 s of CPU and 200 MiB more than a sound one."""
    plain = _run(tmp_path, *READ, str(_sound(tmp_path)))
    assert plain.exit_code == 0, plain.said
    write, exit_code, words = FILES[name]
    used = _run(tmp_path, *READ, str(write(tmp_path)))
    _check(used, plain, exit_code, words)


def _check(used: Used, plain: Used, exit_code: int, words: str) -> None:
    assert used.exit_code == exit_code, used
    assert re.search(words, used.said, re.DOTALL), used.said[-2000:]
    assert "Traceback" not in used.said
    assert used.cpu_s - plain.cpu_s < CPU_S
    assert used.peak_mib - plain.peak_mib < EXTRA_MIB
