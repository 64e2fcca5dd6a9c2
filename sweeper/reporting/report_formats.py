"""A report in any of its formats: for a terminal, a browser, a document, a program or a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from sweeper.core.paths import StudyFolder
from sweeper.reporting.html_page import PageStudy, page
from sweeper.reporting.live_view import picture
from sweeper.reporting.report_evidence import gather
from sweeper.reporting.result_tables import markdown_report
from sweeper.reporting.results import StudyResults, to_document
from sweeper.reporting.verdict import judge

Format = Literal["terminal", "html", "md", "json", "csv", "svg"]
FORMATS = get_args(Format)


def as_html(results: Sequence[StudyResults], output_dir: Path) -> str:
    """One page with everything, for the trials' folders under `output_dir`."""
    return page([_study(found, output_dir) for found in results])


def as_markdown(results: Sequence[StudyResults], _: Path) -> str:
    """report.md, one after the other."""
    return "\n".join(markdown_report(found, judge(found)) for found in results)


def as_json(results: Sequence[StudyResults], _: Path) -> str:
    """A list with results.json of each study."""
    documents = [{**to_document(r), "verdict": judge(r).document()} for r in results]
    return json.dumps(documents, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_csv(results: Sequence[StudyResults], _: Path) -> str:
    """One row a trial: its settings by their full keys, then its metrics; empty where it has none."""
    rows = [
        {
            "study": found.study_name,
            "arm": arm.name,
            "trial": trial.number,
            "cause": trial.outcome.cause,
            "value": trial.value,
            "best_step": trial.outcome.best_step,
            "steps": trial.outcome.steps,
            **trial.params,
            **trial.outcome.metrics,
        }
        for found in results
        for arm in found.arms
        for trial in arm.trials
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def as_svg(results: Sequence[StudyResults], _: Path) -> str:
    """The comparison and the verdict as a picture of a terminal, for a README or a slide."""
    return "\n".join(picture(found) for found in results)


WRITERS: dict[str, Callable[[Sequence[StudyResults], Path], str]] = {
    "html": as_html,
    "md": as_markdown,
    "json": as_json,
    "csv": as_csv,
    "svg": as_svg,
}
"""What a format is written by; the terminal is drawn instead (reporting.view)."""


def default_path(results: Sequence[StudyResults], output_dir: Path) -> Path:
    """Where a page goes if nobody says: beside the study, or beside the studies."""
    if len(results) == 1:
        return StudyFolder(output_dir / results[0].study_name).page
    return output_dir / "report.html"


def _study(results: StudyResults, output_dir: Path) -> PageStudy:
    folder = StudyFolder(output_dir / results.study_name)
    return PageStudy(results, folder, gather(results, folder))


def _cell(value: object) -> object:
    """A text that a spreadsheet would take for a formula is marked as text."""
    risky = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if risky else value
