"""Where a result comes from: code, packages, machine, command."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import sweeper
from sweeper.redaction import redact

PACKAGES = (
    *("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"),
    *("hydra-core", "optuna", "mlflow"),
)


def provenance(command: str) -> dict[str, str]:
    """Flat facts about this process: versions (without importing anything), git state, machine."""
    versions = {f"package.{name}": metadata.version(name) for name in PACKAGES}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redact(f"python -m sweeper {command}".strip()),
        "sweeper": sweeper.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "executable": Path(sys.executable).name,
        **_git(Path.cwd()),
        **versions,
    }


def _git(folder: Path) -> dict[str, str]:
    """Commit and dirty flag of the working copy the user stands in; nothing outside one."""
    commit = _ask_git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {"git.commit": "none: not a git working copy"}
    dirty = _ask_git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"git.commit": commit, "git.dirty": str(bool(dirty)).lower()}


def _ask_git(folder: Path, *words: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    answer = subprocess.run(
        [git, "-C", str(folder), *words], capture_output=True, text=True, check=False, timeout=10
    )
    return answer.stdout.strip() if answer.returncode == 0 else None
