"""The report of a study of 1,000 trials: CPU seconds to write it, and bytes of the page.

    python benchmarks/report.py

Curves, answers and importances are there; the figures stand in benchmarks/report.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the studies of the tests

from record import record

from tests.reporting.test_html_page import curves, many, render

ROUNDS = 5


def main() -> None:
    """Render each size several times; the first rendering also compiles the template."""
    figures = {}
    for count in (12, 100, 1000):
        results = many(count)
        evidence = curves(results)
        seconds = []
        for _ in range(ROUNDS):
            started = time.process_time()
            text = render(results, evidence)
            seconds.append(time.process_time() - started)
        figures[f"{count} trials"] = {
            "cpu_seconds_first": round(seconds[0], 3),
            "cpu_seconds_median": round(statistics.median(seconds), 3),
            "page_kilobytes": round(len(text.encode()) / 1000, 1),
        }
    record("report", figures)


if __name__ == "__main__":
    main()
