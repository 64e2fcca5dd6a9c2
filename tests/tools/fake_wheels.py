"""Small wheels that pip accepts, for the tests of the tools that read wheels."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from tools.pinned_wheel import PinnedWheel, sha256

SENTENCE = "Words are made of letters, and this sentence has enough of them to be a paragraph."
HEAD = "Metadata-Version: 2.1\n"
DESCRIPTION = f"""# Words

[badge](https://example.org/badge.svg) and so many words that only the link tells it apart.

{SENTENCE}

pip install words
"""


def write_wheel(folder: Path, package: str, files: Mapping[str, bytes]) -> PinnedWheel:
    """Write a wheel of version 1.0 with some files, and return its pin."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    facts = {
        f"{info}/METADATA": f"{HEAD}Name: {package}\nVersion: 1.0\n\n{DESCRIPTION}".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/LICENSE": b"Do what you like.\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, **facts}.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return PinnedWheel(path.name, sha256(path), "MIT")
