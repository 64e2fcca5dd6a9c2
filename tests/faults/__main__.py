"""Run the scorecard: every test that docs/reliability.md names, and which case passed.

python -m tests.faults [--times 3] [R1 R2 …]
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from sweeper.core.paths import write_json
from tests.faults.scorecard import ROOT, Case, read_scorecard, write_results

RESULTS = ROOT / "benchmarks" / "faults.json"
SOAK = "R24"
"""Runs for half an hour: `make soak`."""


def main(arguments: Sequence[str]) -> int:
    """Exit 0 if every case passed in every run."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("cases", nargs="*", help="cases to run; all if none is named")
    parser.add_argument("--times", type=int, default=1, help="how many runs in a row")
    chosen = parser.parse_args(arguments)
    cases = [case for case in read_scorecard() if case.name != SOAK]
    cases = [case for case in cases if not chosen.cases or case.name in chosen.cases]
    runs = [_run(cases) for _ in range(chosen.times)]
    passed = [case.name for case in cases if all(run[case.name] == "pass" for run in runs)]
    _print(cases, runs, passed)
    if not chosen.cases:
        write_json(RESULTS, {**_provenance(), "runs": runs, "passed": passed})
        write_results({case.name: _in_a_row(case, runs) for case in cases})
    return 0 if len(passed) == len(cases) else 1


def _run(cases: Sequence[Case]) -> dict[str, str | float]:
    """Run all tests of the cases once; returns pass, fail or skip by case, and the seconds."""
    tests = dict.fromkeys(test for case in cases for test in case.tests)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "3", "--dist", "loadfile"]
        started = time.monotonic()
        subprocess.run(
            [*command, "-p", "no:cacheprovider", f"--junitxml={report}", *tests],
            cwd=ROOT,
            check=False,
        )
        seconds = time.monotonic() - started
        ended = _outcomes(report)
    found = {case.name: _verdict([ended.get(test, []) for test in case.tests]) for case in cases}
    return {**found, "seconds": round(seconds, 1)}


def _outcomes(report: Path) -> dict[str, list[str]]:
    """What became of each test, once per set of parameters."""
    outcomes: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        path = case.attrib["classname"].replace(".", "/") + ".py"
        name = case.attrib["name"].partition("[")[0]
        tags = {child.tag for child in case}
        outcome = "fail" if tags & {"failure", "error"} else "skip" if "skipped" in tags else "pass"
        outcomes.setdefault(f"{path}::{name}", []).append(outcome)
    return outcomes


def _verdict(tests: Sequence[Sequence[str]]) -> str:
    """A case passes if each of its tests ran and passed."""
    outcomes = {outcome for test in tests for outcome in (test or ["fail"])}
    return next(word for word in ("fail", "skip", "pass") if word in outcomes or not outcomes)


def _in_a_row(case: Case, runs: Sequence[dict[str, str | float]]) -> str:
    """`pass ×3`, or how often what was found."""
    found = Counter(str(run[case.name]) for run in runs)
    return ", ".join(f"{word} ×{count}" for word, count in found.items())


def _print(
    cases: Sequence[Case], runs: Sequence[dict[str, str | float]], passed: list[str]
) -> None:
    for case in cases:
        print(f"{case.name:>4}{'★' if case.must_pass else ' '}", *(run[case.name] for run in runs))
    missing = [case.name for case in cases if case.must_pass and case.name not in passed]
    print(
        f"{len(passed)} of {len(cases)} pass; must-pass that do not: {', '.join(missing) or 'none'}"
    )


def _provenance() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
