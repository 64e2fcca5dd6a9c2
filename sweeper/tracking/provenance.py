"""Describe the provenance of a result: code, packages, machine and command."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import sweeper
from sweeper.core.outcome import ArmBaseline
from sweeper.core.redaction import redact

PACKAGES = (
    *("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"),
    *("hydra-core", "optuna", "mlflow"),
)

GIT_SECONDS = 10
"""Time limit of one git command, which takes milliseconds. A judgement for slow network disks."""


def provenance(command: str) -> dict[str, str]:
    """Return the provenance of this process: versions, git state, machine and command."""
    # Package metadata instead of imports, because the driver must not import torch.
    versions = {f"package.{name}": _version(name) for name in PACKAGES}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redact(f"python -m sweeper {command}".strip()),
        "sweeper": sweeper.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu": _cpu(),
        "executable": Path(sys.executable).name,
        **_git(Path.cwd()),
        **versions,
    }


def origin(process: Mapping[str, str], facts: ArmBaseline) -> dict[str, str]:
    """Return a trial's provenance: that of the process, plus data, base and device."""
    commit = {} if facts.base_commit is None else {"base.commit": facts.base_commit}
    return {
        **process,
        "data.digest": facts.data_digest,
        "base.digest": facts.base_digest,
        **commit,
        "device": facts.device,
        "dtype": facts.dtype,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a stripped installation; training does without it
        return "unknown: no metadata installed"


def _cpu() -> str:
    """Return the processor's name, because results differ in the last bits between processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _git(folder: Path) -> dict[str, str]:
    """Return commit and dirty flag of the git working copy that contains `folder`."""
    try:
        commit = _git_output(folder, "rev-parse", "HEAD")
        if commit is None:
            return {"git.commit": "none: not a git working copy"}
        dirty = _git_output(folder, "status", "--porcelain", "--untracked-files=no")
    except subprocess.TimeoutExpired:  # a slow network disk must not keep anything from training
        return {"git.commit": f"unknown: git did not answer within {GIT_SECONDS} s"}
    return {"git.commit": commit, "git.dirty": str(bool(dirty)).lower()}


def _git_output(folder: Path, *words: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    answer = subprocess.run(
        [git, "-C", str(folder), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=GIT_SECONDS,
    )
    return answer.stdout.strip() if answer.returncode == 0 else None
