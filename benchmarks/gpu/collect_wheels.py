"""Collect the wheels that a CUDA machine without a network lacks into the folder .whl, each checked by its hash.

wheels.txt names each package with its version and the hashes of the files as they are published, and pip refuses
any other file. What the image of such a machine has (torch, numpy, ...) is not collected. Wheels are
carried over a slow link, so files that a GPU run cannot need are left out of three of them. SHA256SUMS in the folder
lists what travels, and gpu_check.sh checks it before it installs.

    python benchmarks/gpu/collect_wheels.py                     # for Python 3.12 with CUDA 13.0
    python benchmarks/gpu/collect_wheels.py --python 3.11       # for a rehearsal on Python 3.11
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

WANTED = Path(__file__).with_name("wheels.txt")
SOURCE_ONLY = ("antlr4-python3-runtime", "rouge_score")
"""Packages that are published as source only. Their code is Python alone, so pip builds their wheels here."""
GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
LEFT_OUT = {"mlflow": ["mlflow/server/js/*"], "nltk": ["nltk/test/*", "nltk/app/*"]}
"""Patterns of files without which a package imports and works on a machine that has no browser."""
EPOCH = (1980, 1, 1, 0, 0, 0)


def main() -> None:
    """Fill the target folder, and print how much travels."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default="3.12", help="version of the target's Python")
    parser.add_argument("--cuda", default="cuda130", help="the CUDA build of bitsandbytes to keep")
    parser.add_argument("--target", type=Path, default=Path(".whl"))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/sweeper-gpu-wheels")
    given = parser.parse_args()
    downloads = given.cache / given.python
    download(requirements(WANTED.read_text(encoding="utf-8")), given.python, downloads)
    shutil.rmtree(given.target, ignore_errors=True)
    given.target.mkdir(parents=True)
    for wheel in sorted(downloads.glob("*.whl")):
        repack(wheel, given.target / wheel.name, left_out(wheel, given.cuda))
    sums = [f"{sha256(wheel)}  {wheel.name}\n" for wheel in sorted(given.target.glob("*.whl"))]
    (given.target / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    size = sum(path.stat().st_size for path in given.target.iterdir())
    print(f"{len(sums)} wheels in {given.target}, {size / 2**20:.1f} MiB")


def requirements(text: str) -> list[str]:
    """Return the lines of a requirements file that name a package."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def download(wanted: Sequence[str], python: str, folder: Path) -> None:
    """Fill a folder with exactly the wanted wheels. Files whose hash is not listed are refused."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sources = [line for line in wanted if name_of(line) in SOURCE_ONLY]
    platforms = [f"--platform={glibc}_x86_64" for glibc in GLIBC]
    pip(
        *("download", "--only-binary=:all:", f"--python-version={python}", "--dest", str(folder)),
        *("--implementation=cp", *platforms),
        lines=[line for line in wanted if line not in sources],
        folder=folder,
    )
    pip("wheel", "--wheel-dir", str(folder), lines=sources, folder=folder)


def pip(*words: str, lines: Sequence[str], folder: Path) -> None:
    """Run pip on the packages of some lines of wheels.txt, without what they depend on."""
    file = folder / "requirements.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--quiet", *words, "--no-deps", "--require-hashes"]
    dated = {**os.environ, "SOURCE_DATE_EPOCH": "315532800"}  # a built wheel has the same bytes
    subprocess.run([*command, "--requirement", str(file)], check=True, env=dated)
    file.unlink()


def name_of(line: str) -> str:
    """Return the package that a line of wheels.txt names."""
    return re.split("==", line, maxsplit=1)[0]


def left_out(wheel: Path, cuda: str) -> list[str]:
    """Return patterns of the files of a wheel that need not travel."""
    package = wheel.name.split("-")[0].lower()
    if package != "bitsandbytes":
        return LEFT_OUT.get(package, [])
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if "libbitsandbytes_" in name]
    return [name for name in libraries if cuda not in name and "_cpu" not in name]


def repack(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy a wheel without the files that match a pattern, and without their lines in its RECORD."""
    if not patterns:
        shutil.copy(source, target)
        return
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new,
    ):
        for name in old.namelist():
            if matches(name, patterns):
                continue
            data = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                kept = [line for line in lines if not matches(line.split(",")[0], patterns)]
                data = "".join(kept).encode()
            new.writestr(zipfile.ZipInfo(name, EPOCH), data, zipfile.ZIP_DEFLATED, 9)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a file's name matches one of some patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
