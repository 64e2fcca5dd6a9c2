"""The structure holds: imports go one way, modules form no circle, one seam for each foreign library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sweeper"

LAYERS = (
    # Lowest first. A room may import itself and the rooms of the rows before its own.
    ("core",),
    ("config", "builtin"),
    ("data",),
    ("modeling", "evaluation"),
    ("training", "tracking"),
    ("workers",),
    ("search",),
    ("reporting",),
    ("driver",),
    ("commands",),
    ("nightly",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
SEAMS = {
    "hydra": {
        "sweeper/config/compose.py",
        "sweeper/config/grammar.py",
        "sweeper/__main__.py",
        "hydra_plugins/sweeper_study/study_sweeper.py",
    },
    "mlflow": {
        "sweeper/tracking/tracking_server.py",
        "sweeper/tracking/shipment.py",
        "sweeper/tracking/run_pages.py",
        "sweeper/tracking/baseline_runs.py",
        "sweeper/tracking/registry.py",
        "sweeper/tracking/store.py",
    },
    "typer": {"sweeper/cli/verbs.py", "sweeper/cli/study_verbs.py"},
    "multiprocessing": {"sweeper/workers/local_engine.py", "sweeper/workers/followers.py"},
    "datasets": {"sweeper/data/sources.py"},
    "fsspec": {"sweeper/data/sources.py"},
    "datasketch": {"sweeper/data/duplicates.py"},
    "ray": {"sweeper/workers/ray_engine.py"},
    "sklearn": {"sweeper/search/surface_model.py"},
}
SEAMS["omegaconf"] = SEAMS["hydra"] - {"sweeper/config/grammar.py"}


def sources(root: Path) -> dict[str, str]:
    """Return the text of each module of sweeper/ and hydra_plugins/ by its path from `root`."""
    files = (file for top in ("sweeper", "hydra_plugins") for file in (root / top).rglob("*.py"))
    return {
        file.relative_to(root).as_posix(): file.read_text(encoding="utf-8")
        for file in sorted(files)
    }


def imports(path: str, text: str, modules: Iterable[str]) -> set[str]:
    """Return the dotted names that a module imports anywhere; relative ones are made absolute.

    `from a.b import c` counts as a.b.c where that is a module, else as a.b.
    """
    known = set(modules)
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.split("/")[: -node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module or "") if part)
            whole = {f"{source}.{alias.name}" for alias in node.names}
            names |= {name if name in known else source for name in whole}
    return names


def module_of(path: str) -> str:
    """Return the dotted name of a module's path."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def graph(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """Return which modules of `texts` each of them imports."""
    modules = {module_of(path) for path in texts}
    return {
        module_of(path): (imports(path, text, modules) & modules) - {module_of(path)}
        for path, text in texts.items()
    }


def room_of(module: str) -> str | None:
    """Return the room of a module; None for the package itself, `__main__` and the plugin."""
    parts = module.split(".")
    return parts[1] if parts[0] == "sweeper" and len(parts) > 1 and parts[1] in LEVEL else None


def upward(texts: Mapping[str, str]) -> list[str]:
    """Return every import that leads from a room into a higher one, or into another of its row."""
    found = []
    for module, targets in graph(texts).items():
        own = room_of(module)
        for target in sorted(targets):
            other = room_of(target)
            if own and other and own != other and LEVEL[other] >= LEVEL[own]:
                found.append(f"{module} imports {target}")
    return found


def circle(texts: Mapping[str, str]) -> list[str]:
    """Return the modules of one import circle, or nothing; imports inside functions count."""
    try:
        TopologicalSorter(graph(texts)).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_go_one_way() -> None:
    """No module imports one of a higher room."""
    assert upward(sources(ROOT)) == []


def test_no_modules_import_each_other() -> None:
    """The modules form no circle, within a room or across rooms."""
    assert circle(sources(ROOT)) == []


@pytest.mark.parametrize(
    "line", ["from ..cli import verbs", "from sweeper.cli import verbs", "import sweeper.cli.verbs"]
)
def test_an_upward_import_is_found(line: str) -> None:
    """An import of a higher room is found in each of its three spellings."""
    texts = sources(ROOT)
    texts["sweeper/core/errors.py"] += f"\n{line}\n"
    assert upward(texts) == ["sweeper.core.errors imports sweeper.cli.verbs"]


@pytest.mark.parametrize("line", ["from . import errors", "from sweeper.core.errors import CLI"])
def test_a_circle_inside_a_room_is_found(line: str) -> None:
    """Two modules of one room that import each other are found, also where one import is relative."""
    texts = sources(ROOT)
    texts["sweeper/core/value.py"] += f"\ndef late():\n    {line}\n"
    assert {"sweeper.core.value", "sweeper.core.errors"} <= set(circle(texts))


@pytest.mark.parametrize("library", sorted(SEAMS))
def test_foreign_library_has_one_seam(library: str) -> None:
    """Hydra, MLflow, typer, multiprocessing, Ray and others are each touched at their seam only."""
    texts = sources(ROOT)
    users = {
        path
        for path, text in texts.items()
        if library in {name.split(".")[0] for name in imports(path, text, ())}
    }
    assert users == SEAMS[library], (
        f"import {library} in one of {sorted(SEAMS[library])}, or change SEAMS with the reason"
    )


def test_one_loop_listens_to_workers() -> None:
    """`next_event` has one caller outside the engines: the dispatcher."""
    callers = [
        path
        for path, text in sources(ROOT).items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "next_event"
    ]
    # The time limits are an engine themselves, around another one.
    assert callers == ["sweeper/driver/dispatcher.py", "sweeper/workers/time_limits.py"]


def test_every_module_has_a_room() -> None:
    """No file lies loose at the top of the package, and every room has its row."""
    loose = {path.stem for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__", "__main__"}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(LEVEL), "give the room its row in LAYERS and in docs/architecture.md"


def test_module_names_are_unique() -> None:
    """A module's name is that of one file, so that it can be spoken of without its room."""
    stems = [path.stem for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    assert sorted({stem for stem in stems if stems.count(stem) > 1}) == []


def test_public_class_names_are_unique() -> None:
    """A public class name stands for one class of the package."""
    names = [
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert len(names) > 200
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_orchestration_imports_no_torch() -> None:
    """What reads, searches, drives, tracks and reports loads without torch, transformers and MLflow."""
    torch_rooms = {"data", "modeling", "evaluation", "training"}
    modules = [
        *("config.compose", "commands.run_study", "commands.run_trial", "cli.verbs"),
        *("search.study_plan", "search.study", "driver.dispatcher", "nightly.night_run"),
        *("commands.doctor", "commands.dry_run", "commands.sync", "commands.steer"),
        *("commands.retention", "tracking.mlflow_tracker", "reporting.report_formats"),
        *("reporting.winner", "workers.local_engine", "workers.engines"),
    ]
    assert not torch_rooms & {name.split(".")[0] for name in modules}
    code = "import sys\n" + "".join(f"import sweeper.{name}\n" for name in modules)
    code += "print(*{m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'mlflow'})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
