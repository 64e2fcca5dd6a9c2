"""One study in every format that `sweeper report` knows."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from sweeper.core.paths import StudyFolder, write_json
from sweeper.reporting.report_formats import WRITERS, default_path
from sweeper.reporting.results import from_document, to_document
from tests.conftest import Program
from tests.reporting.studies import LORA_COSTS, make_arm, make_results, make_trial, two_arms

BOTH = [two_arms(4.05, 4.0), two_arms(4.1, None).model_copy(update={"study_name": "other"})]


def test_json_is_a_list_of_results() -> None:
    """Each study's document reads back as the same results, with its verdict beside them."""
    documents = json.loads(WRITERS["json"](BOTH, Path("outputs")))
    assert [document["study_name"] for document in documents] == ["mine", "other"]
    assert documents[0]["verdict"]["duels"][0]["values"] == [4.05, 4.0]
    assert to_document(from_document(documents[0])) == to_document(BOTH[0])


def test_csv_has_one_row_a_trial() -> None:
    """Settings and metrics by their full names; numbers are exact, what is missing is empty."""
    rows = list(csv.DictReader(io.StringIO(WRITERS["csv"](BOTH, Path("outputs")))))
    assert [(row["study"], row["arm"], row["cause"]) for row in rows] == [
        ("mine", "lora", "finished"),
        ("mine", "full", "finished"),
        ("other", "lora", "finished"),
    ]
    assert (
        float(rows[0]["parameters/trainable_percent"]) == LORA_COSTS["parameters/trainable_percent"]
    )
    assert rows[0]["training.learning_rate"] == "0.001"


def test_csv_holds_no_formula() -> None:
    """A text that a spreadsheet would compute is marked as text; negative numbers stay numbers."""
    trial = make_trial("lora", 0, "finished", 4.0, {"gap": -0.5}).model_copy(
        update={"params": {"data.template": "=1+1"}}
    )
    text = WRITERS["csv"]([make_results(make_arm("lora", [trial]))], Path("outputs"))
    row = next(csv.DictReader(io.StringIO(text)))
    assert row["data.template"] == "'=1+1"
    assert row["gap"] == "-0.5"


def test_markdown_and_svg() -> None:
    """Both studies one after the other; the picture is one SVG."""
    text = WRITERS["md"](BOTH, Path("outputs"))
    assert text.index("# mine") < text.index("# other")
    assert WRITERS["svg"](BOTH[:1], Path("outputs")).startswith("<svg")


def test_pages_have_their_place() -> None:
    """One study's page lies in its folder, several studies' above them."""
    outputs = Path("outputs")
    assert default_path(BOTH[:1], outputs) == outputs / "mine" / "report.html"
    assert default_path(BOTH, outputs) == outputs / "report.html"


def test_report_verb_writes_files(in_process: Program, tmp_path: Path) -> None:
    """--format html writes the page and names it; an unknown format lists those that exist."""
    write_json(StudyFolder(tmp_path / "outputs" / "mine").results, to_document(BOTH[0]))
    result = in_process("report", "mine", "--format", "html", "--output", "there/x.html")
    assert result.stdout.strip() == "there/x.html", result.stderr
    assert (tmp_path / "there" / "x.html").read_text().startswith("<!doctype html>")
    refused = in_process("report", "mine", "--format", "pdf")
    assert refused.returncode == 2
    assert "Choose terminal, html, md, json, csv, svg, latex" in refused.stderr
