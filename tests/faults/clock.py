"""A clock on the wall that a test sets, for real programs (clock.c, preloaded)."""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("clock.c")


@dataclass(frozen=True)
class WallClock:
    """What programs started with `environment` take for the time."""

    library: Path
    shift: Path

    @classmethod
    def build(cls, folder: Path) -> WallClock:
        """Compile it; skips the test where there is no C compiler."""
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("setting a program's clock needs a C compiler")
        library = folder / "clock.so"
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE)]
        subprocess.run(command, check=True)
        clock = cls(library, folder / "clock_shift")
        clock.shift.write_bytes(struct.pack("l", 0))
        return clock

    @property
    def environment(self) -> dict[str, str]:
        """For a program that is to live by it."""
        return {"LD_PRELOAD": str(self.library), "FAULT_CLOCK": str(self.shift)}

    def set_back_or_forth(self, seconds: int) -> None:
        """From now on this far from the true time; running programs see it at once."""
        with self.shift.open("r+b") as file:
            file.write(struct.pack("l", seconds))

    def set_to(self, moment: float) -> None:
        """As above, by the Unix time that it shall show now."""
        self.set_back_or_forth(round(moment - time.time()))
