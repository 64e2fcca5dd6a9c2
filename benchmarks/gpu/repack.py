"""Rewrite a wheel without the files that match any of the patterns; RECORD is rewritten to match."""

import fnmatch
import sys
import zipfile
from pathlib import Path


def repack(source: Path, target: Path, patterns: list[str]) -> tuple[int, int]:
    gone = lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new,
    ):
        names = [name for name in old.namelist() if not gone(name)]
        for name in names:
            data = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = [
                    line for line in data.decode().splitlines() if not gone(line.split(",")[0])
                ]
                data = ("\n".join(lines) + "\n").encode()
            new.writestr(name, data)
    return source.stat().st_size, target.stat().st_size


if __name__ == "__main__":
    print(*repack(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
