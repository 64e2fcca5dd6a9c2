"""A folder of broken inputs: each ends in its stated behaviour, none in a library's stack trace."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sweeper.core.errors import DataError
from sweeper.data import row_files
from sweeper.data.examples import Example
from sweeper.data.splits import load_splits
from tests.data.samples import make_data

SOUND = 20


def sound_lines(count: int = SOUND) -> list[str]:
    """JSON lines that every stage lets through."""
    return [
        json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) for n in range(count)
    ]


def jsonl(bad: bytes) -> bytes:
    """A bad line at line 3 of an otherwise sound file."""
    lines = [line.encode() for line in sound_lines()]
    return b"\n".join([*lines[:2], bad, *lines[2:], b""])


def csv(bad: bytes) -> bytes:
    """A bad line at line 4 (the header is line 1) of an otherwise sound file."""
    lines = [f"What is {n}?,It is {n}.".encode() for n in range(SOUND)]
    return b"\n".join([b"prompt,completion", *lines[:2], bad, *lines[2:], b""])


def parquet(folder: Path) -> bytes:
    """A whole Parquet file."""
    import pyarrow
    from pyarrow import parquet as writer

    table = pyarrow.Table.from_pylist([json.loads(line) for line in sound_lines()])
    writer.write_table(table, folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()


SKIPPED = {
    # name: (content, the drops's reason, what the message shows of it)
    "truncated_object.jsonl": (
        jsonl(b'{"prompt": "a", '),
        "broken JSON",
        r":3 \(Expecting .* at column",
    ),
    "not_json.jsonl": (jsonl(b"hello"), "broken JSON", r":3 .*: hello"),
    "two_objects.jsonl": (
        jsonl(b'{"prompt": "a"}{"prompt": "b"}'),
        "broken JSON",
        r":3 \(Extra data",
    ),
    "raw_control.jsonl": (jsonl(b'{"prompt": "a\x01"}'), "broken JSON", r":3 \(Invalid control"),
    "nul_bytes.jsonl": (jsonl(b"\x00\x00\x00"), "broken JSON", ":3"),
    "huge_number.jsonl": (jsonl(b'{"a": ' + b"9" * 5000 + b"}"), "broken JSON", ":3 .*digits"),
    "list.jsonl": (jsonl(b'["a", "b"]'), "a list, not a JSON object", ":3"),
    "number.jsonl": (jsonl(b"17"), "a int, not a JSON object", ":3"),
    "null.jsonl": (jsonl(b"null"), "a NoneType, not a JSON object", ":3"),
    "twice.jsonl": (
        jsonl(b'{"prompt": "a", "prompt": "b"}'),
        "duplicate key in an object",
        ":3",
    ),
    "nan.jsonl": (
        jsonl(b'{"prompt": "a", "completion": NaN}'),
        "NaN or Infinity, which JSON does not have",
        r":3 \(NaN\)",
    ),
    "invalid_utf8.jsonl": (
        jsonl(b'{"prompt": "\xff"}'),
        "invalid UTF-8",
        r":3 \(byte 13 of the line",
    ),
    "latin1.csv": (csv("é,x".encode("latin-1")), "invalid UTF-8", ":4"),
    "nul_escape.jsonl": (
        jsonl(rb'{"prompt": "a\u0000b", "completion": "c"}'),
        "control characters",
        ":3",
    ),
    "surrogate.jsonl": (
        jsonl(rb'{"prompt": "\ud83d", "completion": "c"}'),
        "half a surrogate pair",
        ":3",
    ),
    "depth_bomb.jsonl": (jsonl(b"[" * 100_000), "nested deeper than 100 levels", ":3"),
    "depth_object.jsonl": (
        jsonl(b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}"),
        "nested deeper than 100 levels",
        ":3",
    ),
    "long_line.jsonl": (
        jsonl(b'{"prompt": "' + b"x" * 2000 + b'"}'),
        "a line of more than 0 MiB",
        ":3",
    ),
    "no_completion.jsonl": (jsonl(b'{"prompt": "a"}'), "no completion", ":3"),
    "empty_completion.jsonl": (
        jsonl(b'{"prompt": "a", "completion": " "}'),
        "completion is empty",
        ":3",
    ),
    "object_completion.jsonl": (
        jsonl(b'{"prompt": "a", "completion": {"text": "b"}}'),
        "completion is a dict, not text",
        ":3",
    ),
    "short.csv": (csv(b"only one"), "another number of fields than the header", r":4 \(1\)"),
    "long.csv": (csv(b"a,b,c"), "another number of fields than the header", r":4 \(3\)"),
    "quote_inside.csv": (csv(b'"a"b,c'), "broken CSV", r":4 \(.*expected after"),
    "item.json": (
        ("[" + ",".join([*sound_lines(), "5"]) + "]").encode(),
        "a int, not a JSON object",
        "row 21",
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_bad_row_is_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Within the tolerance the rest is used and the drops says what and where; beyond it, one error."""
    if name == "long_line.jsonl":
        monkeypatch.setattr(row_files, "MAX_LINE_BYTES", 1024)
    content, reason, shown = SKIPPED[name]
    path = tmp_path / name
    path.write_bytes(content)
    data = make_data(train=str(path), max_bad_fraction=0.05)
    splits = load_splits(data)
    assert splits.dropped == {reason: 1}
    assert splits.counts == {"train": 16, "validation": 2, "test": 2}
    strict = data.model_copy(update={"max_bad_fraction": 0.04})
    with pytest.raises(
        DataError, match=rf"1 of 21 rows cannot be used(.|\n)*1 × .*{shown}"
    ) as caught:
        load_splits(strict)
    assert reason in str(caught.value)
    assert "raise data.max_bad_fraction" in str(caught.value)


TWO_ROWS = "\n".join(sound_lines(2)).encode()
REFUSED: dict[str, tuple[bytes | Callable[[Path], bytes], str]] = {
    "empty.jsonl": (b"", "contains no rows"),
    "blank.jsonl": (b"\n \n\r\n", "contains no rows"),
    "empty.json": (b"", r"broken JSON \(Expecting value"),
    "empty_list.json": (b"[]", "contains no rows"),
    "object.json": (b'{"prompt": "a"}', "a dict, not a list of rows"),
    "truncated.json": (b'[{"prompt": "a"},\n{"prompt": ', r"broken JSON \(.* at line 2 column"),
    "latin1.json": ('[\n"é"]'.encode("latin-1"), r"latin1\.json: invalid UTF-8 \(line 2\)"),
    "utf16.jsonl": (TWO_ROWS.decode().encode("utf-16"), "UTF-16 or UTF-32. Convert the file"),
    "empty.csv": (b"", "contains no rows"),
    "header_only.csv": (b"prompt,completion\n", "contains no rows"),
    "open_quote.csv": (
        b'prompt,completion\na,b\n"c,d\ne,f\n',
        r":3: a quoted field is never closed",
    ),
    "same_column.csv": (b"prompt,prompt\na,b\n", "duplicate column in the header: 'prompt'"),
    "truncated.parquet": (
        lambda folder: parquet(folder)[:-100],
        "the Parquet file is truncated or damaged",
    ),
    "text.parquet": (b"hello", "the Parquet file is truncated or damaged"),
    "truncated.jsonl.gz": (gzip.compress(TWO_ROWS)[:-12], "the gzip file is truncated or damaged"),
    "plain.jsonl.gz": (TWO_ROWS, "the gzip file is truncated or damaged"),
    "empty.txt": (b" \n", "an empty text"),
    "latin1.txt": ("one\ntwo é".encode("latin-1"), r"invalid UTF-8: .*latin1\.txt \(line 2\)"),
    "binary.txt": (b"a\x00b", "control characters"),
    "table.xlsx": (b"PK", r"unknown file ending \.xlsx\. Use \.jsonl, "),
    "model.bin.gz": (gzip.compress(b"x"), r"unknown file ending \.gz\. Use"),
    "unknown_columns.jsonl": (
        b'{"headline": "a", "body": "b"}\n' * 3,
        "no known format has the columns",
    ),
    "one_row.jsonl": (sound_lines(1)[0].encode(), "the train split is empty. Use more rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    """The error names the file and what is wrong with it as a whole."""
    content, message = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content(tmp_path) if callable(content) else content)
    with pytest.raises(DataError, match=message) as caught:
        load_splits(make_data(train=str(path)))
    assert name in str(caught.value)


def test_many_bad_rows_are_one_error_with_counts_and_first_places(tmp_path: Path) -> None:
    """Reasons come by frequency within a stage, each with its first three places."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*sound_lines(), "x", "x", "[1]", "x", "x", '{"prompt": "a"}']))
    with pytest.raises(DataError) as caught:
        load_splits(make_data(train=str(path)))
    head, *lines = str(caught.value).splitlines()
    assert "6 of 26 rows cannot be used, more than the 1.000% that data.max_bad_fraction" in head
    assert lines[0].startswith(f"  4 × broken JSON: {path}:21 (Expecting value")
    assert lines[0].endswith(", …")
    assert [line.split(":")[0] for line in lines[1:3]] == [
        "  1 × a list, not a JSON object",
        "  1 × no completion",
    ]


def test_a_first_row_without_columns_does_not_hide_the_format(tmp_path: Path) -> None:
    """The format is found by the first row that has one; the odd row is a bad row."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(['{"id": 0}', *sound_lines()]))
    splits = load_splits(make_data(train=str(path), max_bad_fraction=0.1))
    assert splits.format == "prompt_completion"
    assert all(isinstance(example, Example) for example in splits.examples["train"])
    assert sum(splits.dropped.values()) == 1
