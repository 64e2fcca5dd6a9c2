"""The structure holds: one-way imports, one seam for each foreign library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "sweeper").rglob("*.py")) + sorted((ROOT / "hydra_plugins").rglob("*.py"))

LAYERS = (
    # lower first; a package may import its own row and the rows above it in this list
    {
        "errors",
        "folders",
        "space",
        "outcome",
        "settings",
        "embedded",
        "interrupt",
        "stand_ins",
        "redaction",
        "manifest",
        "yaml_bounds",
        "noise",
    },
    {"grammar"},
    {"config"},
    {"compose", "data"},
    {"modeling", "evaluation"},
    {"tracking", "training"},
    {"workers"},
    {"search"},
    {"reporting"},
    {
        "session",
        "single",
        "sync",
        "retention",
        "doctor",
        "dry_run",
        "answers",
        "steer",
        "reproduce",
    },
    {"nightly"},
    {"cli", "cli_study", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
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
}
SEAMS["omegaconf"] = SEAMS["hydra"] - {"sweeper/config/grammar.py"}


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "sweeper":
                names |= {f"sweeper.{alias.name}" for alias in node.names}
    return names


def _part(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "sweeper" and len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    """A module imports its own package and lower ones, never a higher one."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] != "sweeper" or path.name == "__init__.py":
        return
    own = relative.parts[1].removesuffix(".py")
    for module in _imports(path):
        part = _part(module)
        if part is not None and part in LEVEL and part != own:
            assert LEVEL[part] <= LEVEL[own], f"{relative} imports {module}"


@pytest.mark.parametrize("library", sorted(SEAMS))
def test_foreign_library_has_one_seam(library: str) -> None:
    """Hydra, MLflow, typer, multiprocessing and Ray are each touched at their seam only."""
    users = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(name.split(".")[0] == library for name in _imports(path))
    }
    assert users == SEAMS[library]


def test_every_module_has_a_layer() -> None:
    """A new package must be given its place."""
    names = {path.stem for path in (ROOT / "sweeper").glob("*.py")} | {
        path.parent.name for path in (ROOT / "sweeper").glob("*/__init__.py")
    }
    assert names - {"__init__"} == set(LEVEL)


def test_orchestration_imports_no_torch() -> None:
    """Search, session, tracking, reporting and the engines load without torch and transformers."""
    modules = [
        *("compose", "session", "cli", "search.driver", "search.plan", "search.study", "single"),
        *("doctor", "dry_run", "sync", "steer", "nightly.run", "retention"),
        *(
            "tracking.mlflow_tracker",
            "reporting.formats",
            "reporting.winner",
            "workers.local",
            "workers.engines",
        ),
    ]
    code = "import sys\n" + "".join(f"import sweeper.{name}\n" for name in modules)
    code += "print(*{m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'mlflow'})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
