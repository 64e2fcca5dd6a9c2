"""Reading files into rows."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from sweeper.data import row_files
from sweeper.data.examples import DropCounts, RawRow
from sweeper.data.row_files import RowFile, read_file


def read(name: str, content: bytes) -> tuple[list[RawRow], DropCounts]:
    """Rows and drops of a file that exists in memory only."""
    drops = DropCounts()
    return read_file(RowFile(name, lambda: io.BytesIO(content)), drops), drops


def values(name: str, content: bytes) -> list[dict[str, Any]]:
    """The values of a file without bad rows."""
    found, drops = read(name, content)
    assert drops.total == {}
    return [dict(row.values) for row in found]


TWO = [{"q": "Is “it” good?", "a": "yes"}, {"q": "two\nlines", "a": "no"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "".join(json.dumps(row) + "\n" for row in TWO)),
        ("a.ndjson", "\r\n\r\n".join(json.dumps(row) for row in TWO)),
        ("a.JSONL", "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in TWO)),
        ("a.json", json.dumps(TWO, indent=2)),
        ("a.json", "".join(json.dumps(row) + "\n" for row in TWO)),
        ("a.csv", 'q,a\r\n"Is “it” good?",yes\r\n\r\n"two\nlines",no\r\n'),
        ("a.tsv", 'q\ta\nIs “it” good?\tyes\n"two\nlines"\tno\n'),
        ("https://x.org/a.jsonl?download=true", "".join(json.dumps(row) + "\n" for row in TWO)),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_text_kind_gives_the_same_rows(name: str, content: str, zipped: bool) -> None:
    """JSON lines, JSON, CSV and TSV, with a mark, CRLF or blank lines, plain or gzipped."""
    data = content.encode()
    if zipped:
        path, question, query = name.partition("?")
        name, data = path + ".gz" + question + query, gzip.compress(data)
    assert values(name, data) == TWO


def test_parquet_rows_keep_lists_and_objects(tmp_path: Path) -> None:
    """A Parquet file gives its nested columns as Python lists and dicts."""
    import pyarrow
    from pyarrow import parquet

    conversation = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"conversations": [conversation], "score": [0.5]}), path)
    drops = DropCounts()
    [row] = read_file(RowFile(str(path), lambda: path.open("rb")), drops)
    assert row.values == {"conversations": conversation, "score": 0.5}
    assert row.where == f"{path}: row 1"


def test_a_text_file_is_one_row() -> None:
    """A book is one row, its line ends made uniform."""
    assert values("book.txt", b"One.\r\n\r\nTwo.\n") == [{"text": "One.\n\nTwo.\n"}]


def test_line_separators_inside_json_strings_do_not_split_rows() -> None:
    """U+2028 is text, not the end of a line."""
    line = json.dumps({"a": "x\u2028y"}, ensure_ascii=False).encode()
    assert values("a.jsonl", line) == [{"a": "x\u2028y"}]


def test_rows_know_their_lines() -> None:
    """Blank lines and quoted line breaks count as lines; a row is named by its first one."""
    found, _ = read("a.jsonl", b'{"a": 1}\n\n{"a": 2}\n')
    assert [row.where for row in found] == ["a.jsonl:1", "a.jsonl:3"]
    found, _ = read("a.csv", b'a,b\n"x\ny",1\nz,2\n')
    assert [row.where for row in found] == ["a.csv:2", "a.csv:4"]


class Endless(io.RawIOBase):
    """One line of `size` bytes and a sound one, made as it is read; remembers the largest request."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.largest = 0
        self.tail = io.BytesIO(b'\n{"a": "sound"}\n')

    def readline(self, size: int | None = -1, /) -> bytes:  # type: ignore[override]
        assert size is not None
        assert size > 0
        self.largest = max(self.largest, size)
        taken = min(size, self.left)
        self.left -= taken
        return b"x" * taken if taken == size else b"x" * taken + self.tail.readline()


def test_a_line_that_is_too_long_is_skipped_in_pieces() -> None:
    """The line costs one bad row and never more memory than the limit; the next one is read."""
    stream, drops = Endless(200 * 2**20), DropCounts()
    [row] = read_file(RowFile("a.jsonl", lambda: stream), drops)  # type: ignore[arg-type,return-value]
    assert row == RawRow({"a": "sound"}, "a.jsonl:2")
    assert drops.total == {"a line of more than 16 MiB": 1}
    assert stream.largest <= row_files.MAX_LINE_BYTES + 1
