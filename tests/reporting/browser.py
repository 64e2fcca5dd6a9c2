"""Chromium without a window and without a driver: what it prints, and a page after its scripts ran."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CONSOLE = re.compile(r'CONSOLE[:(]\d+\)?\] "(?P<message>.*)", source: (?P<source>\S*)')
OFFLINE = (
    "--host-resolver-rules=MAP * ~NOTFOUND",  # every name is unknown, as without a network
    *("--disable-background-networking", "--disable-component-update", "--no-first-run"),
)
SCHEMES = {"dark": "0", "light": "1"}
"""Blink's numbers of prefers-color-scheme."""


@dataclass(frozen=True)
class Opened:
    """A page that was opened."""

    dom: str
    messages: tuple[str, ...]
    """Of its console."""


def find_browser() -> str | None:
    """The program, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def open_offline(
    browser: str, path: Path, profile: Path, scheme: str = "light", width: int = 1280
) -> Opened:
    """Open a file from disk with the network off, let its scripts run, and read it."""
    done = subprocess.run(
        [
            *_command(browser, profile, scheme, width),
            *("--virtual-time-budget=20000", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    found = CONSOLE.finditer(done.stderr)
    return Opened(done.stdout, tuple(match["message"] for match in found))


def _command(browser: str, profile: Path, scheme: str, width: int) -> Sequence[str]:
    return (
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={profile}", f"--window-size={width},1000", *OFFLINE),
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        *("--enable-logging=stderr", "--v=0"),
    )
