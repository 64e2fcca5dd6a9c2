"""`sweeper data` shows what becomes of each row and column before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from sweeper.commands.data_report import _histogram, report_data
from sweeper.core.errors import DataError
from tests.conftest import make_settings
from tests.data.samples import write_rows


def _report(path: Path, *overrides: str) -> str:
    console = Console(record=True, width=160, file=(path / "out.txt").open("w"))
    report_data([make_settings(*overrides)] * 2, console, rows=1)
    return console.export_text()


def test_report_accounts_for_rows_columns_and_loss(tmp_path: Path) -> None:
    """Columns read and unread, splits, drops with places, changes, lengths, and rows with their mask."""
    rows = [
        {
            "instruction": f"Add {n} and 1",
            "output": f"It is {n + 1}.",
            "topic": "sums",
            "idle": None,
        }
        for n in range(40)
    ]
    rows += [rows[0], {**rows[1], "output": "Another."}]
    report = _report(tmp_path, f"data.train={write_rows(tmp_path / 'r.jsonl', rows)}")
    lines = [line.rstrip() for line in report.splitlines()]
    assert lines.count("format: alpaca") == 1, "the same data are reported once"
    assert "columns read: instruction, output" in lines
    assert "columns not read: topic (42 rows)" in lines
    assert any(line.startswith("dropped (all, clean): 1 × duplicate: ") for line in lines)
    assert [line.split()[:3] for line in lines if line.startswith(("train  ", "test  "))] == [
        ["train", "33", "33"],
        ["test", "4", "4"],
    ]
    assert "tokens per row, train (before rows are dropped, cut or packed)" in lines
    assert sum("█" in line for line in lines) >= 3
    assert report.count("### Response:\n«It is ") == 3


def test_report_of_rows_that_cannot_be_used_is_their_reason(tmp_path: Path) -> None:
    """Data that a training would refuse are refused here with the same words."""
    path = write_rows(tmp_path / "r.jsonl", [{"text": f"t{n}", "label": n} for n in range(9)])
    with pytest.raises(DataError, match=r"data.ignore_columns=\[label\]"):
        _report(tmp_path, f"data.train={path}")


@pytest.mark.parametrize(
    ("lengths", "names"),
    [
        ([43], ["43"]),
        ([43, 43, 45], ["43", "44", "45"]),
        ([1, 16], ["1 to 2", "15 to 16"]),
        ([1234, 1250], ["1,234 to 1,236", "1,249 to 1,251"]),
    ],
)
def test_a_bin_of_the_histogram_is_named_by_its_lengths(
    lengths: list[int], names: list[str]
) -> None:
    """A bin of one length has one number, and a wider one has its two ends."""
    found = [" ".join(line.split("█")[0].split()[:-1]) for line in _histogram(lengths)]
    assert [name for name in found if name in names] == names
    assert all(
        name.split(" to ")[0] != name.split(" to ")[-1] or " to " not in name for name in found
    )
