"""Reports as HTML, Markdown, JSON, CSV, SVG and LaTeX. The terminal's report is in live_view."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from sweeper.core.paths import StudyFolder
from sweeper.reporting.html_page import PageStudy, page
from sweeper.reporting.latex_report import latex_report
from sweeper.reporting.live_view import picture
from sweeper.reporting.report_evidence import gather
from sweeper.reporting.result_tables import markdown_report
from sweeper.reporting.results import StudyResults, to_document
from sweeper.reporting.verdict import judge

Format = Literal["terminal", "html", "md", "json", "csv", "svg", "latex"]
FORMATS = get_args(Format)


def as_html(results: Sequence[StudyResults], output_dir: Path) -> str:
    """Return one HTML page for all studies. `output_dir` is the parent of the studies' folders."""
    return page([_study(found, output_dir) for found in results])


def as_markdown(results: Sequence[StudyResults], _: Path) -> str:
    """Return the studies' Markdown reports, one after the other."""
    return "\n".join(markdown_report(found, judge(found)) for found in results)


def as_json(results: Sequence[StudyResults], _: Path) -> str:
    """Return a JSON list with the results and the verdict of each study."""
    # Always a list, so that scripts need not know how many studies were named.
    documents = [{**to_document(r), "verdict": judge(r).document()} for r in results]
    return json.dumps(documents, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_csv(results: Sequence[StudyResults], _: Path) -> str:
    """Return one CSV row per trial: its settings under their full keys, then its metrics."""
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
    # Arms search different keys, and a column exists for each of them.
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def as_svg(results: Sequence[StudyResults], _: Path) -> str:
    """Return the comparison and the verdict as a picture of a terminal, for a README or a slide."""
    return "\n".join(picture(found) for found in results)


def as_latex(results: Sequence[StudyResults], _: Path) -> str:
    """Return one LaTeX document: a table over all studies, and their protocols."""
    return latex_report(results)


WRITERS: dict[str, Callable[[Sequence[StudyResults], Path], str]] = {
    "html": as_html,
    "md": as_markdown,
    "json": as_json,
    "csv": as_csv,
    "svg": as_svg,
    "latex": as_latex,
}
"""The function that writes each format. The terminal is printed by live_view instead."""


def default_path(results: Sequence[StudyResults], output_dir: Path) -> Path:
    """Return the page's default path: in the study's folder, or in `output_dir` for several studies."""
    if len(results) == 1:
        return StudyFolder(output_dir / results[0].study_name).page
    return output_dir / "report.html"


def _study(results: StudyResults, output_dir: Path) -> PageStudy:
    folder = StudyFolder(output_dir / results.study_name)
    return PageStudy(results, folder, gather(results, folder))


def _cell(value: object) -> object:
    """Return a cell with an apostrophe before text that a spreadsheet would run as a formula."""
    # Excel and LibreOffice run such cells as formulas (CSV injection).
    risky = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if risky else value
