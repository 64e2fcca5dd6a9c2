"""Reading, recognising, rendering and splitting data files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sweeper.data.formats import FORMATS, Example, detect_format, render
from sweeper.data.rows import read_rows
from sweeper.data.splits import load_splits
from sweeper.errors import DataError
from tests.conftest import make_settings


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: broken JSON .* at column"),
        ("a.jsonl", b'{"a": 1}\n\n[1]\n', r"a\.jsonl:3: a list, not a JSON object"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"not UTF-8 at byte 7"),
        ("a.jsonl", b"\n\n", r"holds no rows"),
        ("a.json", b'{"a": 1}', r"a dict, not a list of rows"),
        ("a.xlsx", b"", r"a \.xlsx file; give \.jsonl or \.json"),
    ],
)
def test_broken_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    """What is wrong with a data file comes with the file, the line and the reason."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A path that does not exist is answered with that path."""
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        read_rows(tmp_path / "gone.jsonl")


def test_line_separators_inside_json_strings_do_not_split_rows(tmp_path: Path) -> None:
    """U+2028 is text, not the end of a line; a byte-order mark is skipped."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\ufeff".encode() + json.dumps({"a": "x\u2028y"}, ensure_ascii=False).encode())
    assert read_rows(path) == [{"a": "x\u2028y"}]


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_detected_by_its_columns(name: str) -> None:
    """A row with the required columns of a format is recognised as that format."""
    assert detect_format(dict.fromkeys(FORMATS[name].required, "x"), "here") == name


def test_unknown_columns_list_what_is_known() -> None:
    """An unknown format names the columns found and those of every format."""
    with pytest.raises(
        DataError, match=r"columns body, title .*prompt_completion: prompt, completion"
    ):
        detect_format({"body": "", "title": ""}, "here")


def test_alpaca_renders_the_template_of_the_reports() -> None:
    """With an input there are three sections, without one there are two; the answer is apart."""
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": None, "output": "Hello"},
    ]
    assert render(rows, "alpaca", "here") == [
        Example("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "3"),
        Example("### Instruction:\nGreet.\n\n### Response:\n", "Hello"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a"}, "row 1: has no output"),
        ({"instruction": "a", "output": 5}, "output is a int, not text"),
        ({"instruction": "a", "output": "  "}, "output is empty"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "input is a list, not text"),
    ],
)
def test_bad_row_is_named(row: dict[str, object], message: str) -> None:
    """A row that cannot be rendered is an error with its number and its column."""
    with pytest.raises(DataError, match=message):
        render([row], "alpaca", "here")


def test_one_file_is_split_by_row_without_overlap(rows_file: Path) -> None:
    """Validation and test are taken off train: every row in one split, the same every time."""
    settings = make_settings(f"data.train={rows_file}", "data.test_ratio=0.25").data
    splits = load_splits(settings)
    assert splits.counts == {"train": 26, "validation": 4, "test": 10}
    prompts = [example.prompt for examples in splits.examples.values() for example in examples]
    assert len(set(prompts)) == 40
    assert load_splits(settings).digest == splits.digest
    assert load_splits(settings.model_copy(update={"split_seed": 1})).digest != splits.digest


def test_duplicate_rows_do_not_leak_across_the_split(tmp_path: Path, rows_file: Path) -> None:
    """A file with every row twice is split as if each stood there once, and the count is told."""
    twice = tmp_path / "twice.jsonl"
    twice.write_text(rows_file.read_text() * 2)
    once = load_splits(make_settings(f"data.train={rows_file}").data)
    splits = load_splits(make_settings(f"data.train={twice}").data)
    assert splits.counts == once.counts
    assert splits.dropped == {"duplicate": 40}


def test_validation_file_is_taken_whole(rows_file: Path) -> None:
    """A separate validation file is used as it is; only the test split comes off train."""
    settings = make_settings(f"data.train={rows_file}", f"data.validation={rows_file}").data
    assert load_splits(settings).counts == {"train": 36, "validation": 40, "test": 4}


def test_max_samples_limits_training_only(rows_file: Path) -> None:
    """max_samples draws from train with the split's seed and leaves the judges alone."""
    settings = make_settings(f"data.train={rows_file}", "data.max_samples=5").data
    assert load_splits(settings).counts == {"train": 5, "validation": 4, "test": 4}


def test_a_missing_data_file_is_found_before_any_model_loads() -> None:
    """The plan of a study and of a trial names the key and the path."""
    from sweeper.errors import ConfigError
    from sweeper.search.plan import single, studies

    for plan, first in ((single, []), (studies, ["+experiment=lr_rank_sweep"])):
        with pytest.raises(ConfigError, match=r"data\.train=gone\.jsonl: no such file"):
            plan([*first, "data.train=gone.jsonl"])


def test_the_smallest_file_that_can_be_split(tmp_path: Path) -> None:
    """Two rows are one to learn from and one to be judged on; one row is refused with a way out."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    settings = make_settings(f"data.train={path}").data
    assert load_splits(settings).counts == {"train": 1, "validation": 1, "test": 0}
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="train split is empty; give more rows"):
        load_splits(settings)
