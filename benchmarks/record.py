"""Write a benchmark's figures beside it, with what is needed to judge them."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sweeper.tracking.provenance import provenance


def record(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and write benchmarks/<name>.json."""
    origin = provenance("")
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": origin.get("git.commit", ""),
        "machine": f"{origin['machine']}, {_processor()}",
        "python": platform.python_version(),
        "torch": origin["package.torch"],
        "figures": figures,
    }
    path = Path(__file__).with_name(f"{name}.json")
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
