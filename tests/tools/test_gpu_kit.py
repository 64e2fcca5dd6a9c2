"""The kit for GPUs names what exists, although no test runs its parts."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from sweeper.data.padding_free import PaddingFreeCollator
from sweeper.data.tokens import PaddingCollator
from sweeper.evaluation.token_loss import target_nll
from tests.modeling.models import CONFIGS, save

KIT = Path(__file__).parents[2] / "benchmarks" / "gpu"
SOURCES = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in KIT.glob("*.py")}


NOT_IMPORTED = {
    # MLflow's server and its deployments
    *("docker", "flask", "flask-cors", "graphene", "gunicorn", "huey", "skops", "cryptography"),
    # Databricks' sign-in
    "google-auth",
    # nltk's reader of XML corpora
    "defusedxml",
}
"""Packages that others require for a feature which sweeper does not use."""


def load(name: str) -> ModuleType:
    """Return a program of the kit as a module."""
    spec = importlib.util.spec_from_file_location(name, KIT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kit() -> ModuleType:
    """The kit's program as a module."""
    return load("gpu_check")


@pytest.fixture
def collector() -> ModuleType:
    """The program that collects wheels as a module."""
    return load("collect_wheels")


def test_the_kit_imports_what_exists() -> None:
    """Each name that a part imports from sweeper is there: a rehearsal takes minutes, a GPU is rare."""
    imported = [
        (node.module, alias.name)
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sweeper.")
        for alias in node.names
    ]
    assert len(imported) > 8
    for module, name in imported:
        assert hasattr(importlib.import_module(str(module)), name), f"{module}.{name}"


def test_every_part_has_its_function_and_its_line() -> None:
    """A part of the list is a function of the kit, and README says what it proves."""
    tree, readme = SOURCES["gpu_check.py"], (KIT / "README.md").read_text(encoding="utf-8")
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    (parts,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PARTS"
    )
    assert len(parts) > 15
    for name, seconds in parts:
        assert f"part_{name}" in functions
        assert name in readme
        assert seconds > 0


@pytest.mark.parametrize(
    ("name", "entry", "problems"),
    [
        ("smoke", {"nf4": {"cause": "finished"}, "_rc": 0}, []),
        ("smoke", {"nf4": [{"cause": "finished"}, {"cause": "PROBE"}]}, ["nf4[1].cause is PROBE"]),
        ("smoke", {}, ["the part has no result"]),
        ("study", {"study": {"rc": 2}, "_rc": 0}, ["study.rc is 2"]),
        ("resume", {"resume": {"same_bits": False}}, ["resume.same_bits is False"]),
        ("oom", {"infeasible": {"cause": "oom"}, "_rc": 0}, []),
    ],
)
def test_a_part_whose_trials_failed_is_not_proven(
    kit: ModuleType, name: str, entry: dict[str, Any], problems: list[str]
) -> None:
    """The exit code of a part says nothing of its trials; parts that provoke failures may have some."""
    assert kit.unproven(name, entry) == problems


def test_results_have_no_path_of_the_machine(
    kit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders of the run become symbols, because results are committed and sent."""
    monkeypatch.setenv("SITE", "/somewhere/site")
    kit.say("log", [f"{kit.WORK.resolve()}/models", "/somewhere/site/torch", f"{Path.cwd()}/conf"])
    (line,) = capsys.readouterr().out.splitlines()
    given = json.loads(line.removeprefix(kit.MARK))
    assert given == {"log": ["WORK/models", "SITE/torch", "PROJECT/conf"]}


def test_what_travels_is_pinned_as_here() -> None:
    """Each wheel that is collected has the version of constraints.txt and at least one hash."""
    pinned = dict(_pin(line) for line in _lines(KIT.parents[1] / "constraints.txt"))
    wanted = _lines(KIT / "wheels.txt")
    assert len(wanted) > 40
    for line in wanted:
        name, version = _pin(line)
        assert pinned.get(name, version) == version, line
        hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})(?= |$)", line)
        assert len(hashes) == line.count("--hash=") > 0, line


def test_every_package_that_sweeper_needs_travels_or_is_there() -> None:
    """The needs of sweeper, and their needs, are in wheels.txt, in image.txt, or not imported."""
    project = tomllib.loads((KIT.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    carried = {_pin(line)[0] for line in _lines(KIT / "wheels.txt")}
    there = {canonicalize_name(line) for line in _lines(KIT / "image.txt")} | {"torch"}
    waiting = [Requirement(text) for text in project["project"]["dependencies"]]
    known: set[str] = set()
    nowhere = []
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        if name in known or (need.marker is not None and not need.marker.evaluate({"extra": ""})):
            continue
        known.add(name)
        if name not in carried | there | NOT_IMPORTED:
            nowhere.append(name)
        if name not in NOT_IMPORTED and name != "torch":
            waiting += [Requirement(text) for text in metadata.requires(need.name) or []]
    assert nowhere == []
    assert known >= NOT_IMPORTED


def test_wheels_lose_only_what_a_gpu_cannot_use(tmp_path: Path, collector: ModuleType) -> None:
    """Libraries of other CUDA releases and their lines in RECORD go, and two results are equal."""
    names = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda118", "cuda130")]
    record = "bitsandbytes-1.dist-info/RECORD"
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, name)
        archive.writestr(record, "".join(f"{name},sha256=a,1\n" for name in [*names, record]))
    patterns = collector.left_out(wheel, "cuda130")
    assert patterns == [names[1]]
    first, second = tmp_path / "first.whl", tmp_path / "second.whl"
    for target in (first, second):
        collector.repack(wheel, target, patterns)
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == [names[0], names[2], record]
        lines = archive.read(record).decode().splitlines()
        assert lines == [f"{name},sha256=a,1" for name in archive.namelist()]


def test_the_kit_calls_varlen_kernels_by_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a pretended kernel the loss of a batch without padding is that of the padded batch."""
    calls: list[int] = []

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        others: Tensor,
        longest: int,
        *_: int,
        window_size: tuple[int, int],
    ) -> Tensor:
        assert window_size == (-1, 0)
        assert torch.equal(bounds, others)
        calls.append(longest)
        lengths = bounds.diff().tolist()
        assert max(lengths) <= longest
        parts = zip(*(torch.split(each, lengths) for each in (query, key, value)), strict=True)
        rows = [[each.transpose(0, 1) for each in part] for part in parts]
        found = [scaled_dot_product_attention(*row, is_causal=True).transpose(0, 1) for row in rows]
        return torch.cat(found)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    parts = load("larger_parts")
    save(CONFIGS["qwen3"], tmp_path)
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in ([5, 6, 7, 8], [9, 3])]
    losses = {
        form: target_nll(parts.load_for(str(tmp_path), form), collate(rows)).item()
        for form, collate in (
            ("padded", PaddingCollator(0)),
            ("torch_varlen", PaddingFreeCollator()),
        )
    }
    assert len(calls) == CONFIGS["qwen3"].num_hidden_layers
    assert losses["torch_varlen"] == pytest.approx(losses["padded"], rel=1e-5)


def _lines(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and line[0] not in "# "]


def _pin(line: str) -> tuple[str, str]:
    name, _, rest = line.partition("==")
    return canonicalize_name(name), rest.split()[0] if rest else ""
