"""Read the rows of one file, and drop and count broken rows with their file and line.

Reads JSON lines, JSON, CSV, TSV, Parquet and plain text, the text formats also gzipped. Does not know
where files are stored (`sources`) or what their columns mean (`row_formats`).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, cast

from sweeper.core.errors import DataError
from sweeper.data.examples import DropCounts, RawRow

# datasets' JSON and CSV readers stop at the first bad line and name neither the file nor the line, so
# text formats are read by this module. pyarrow reads Parquet without a second copy in a cache.

STAGE = "read"
MIB = 2**20
MAX_LINE_BYTES = 16 * MIB
"""Maximum bytes of a line. A longer line is a bad row, skipped in pieces and never held in memory."""
MAX_SKIPPED_BYTES = 256 * MIB
"""Bytes without a line break after which reading the file fails."""
MAX_FILE_BYTES = 512 * MIB
"""Maximum bytes of a .json, .txt or .md file, which are read whole."""
MAX_EXPANSION = 300
"""Maximum ratio of unpacked to packed bytes of a gzip file. Text reaches 20, all zeros about 1,000."""
FREE_BYTES = MIB
"""Unpacked bytes below which the ratio is not checked, because small files may be very regular."""
PACKED_BYTES, UNZIPPED_BYTES = 8 * 1024, 4 * MIB
"""Packed bytes read, and unpacked bytes buffered, at a time."""
# PACKED_BYTES times MAX_EXPANSION is less than UNZIPPED_BYTES, so a gzip bomb is detected before its
# first line is returned.
MAX_KEYS = 10_000
"""Maximum number of keys of all objects in one row."""
MAX_DEPTH = 100
"""Maximum nesting of lists and objects in one row."""
SHOWN_CHARS = 80
SHOWN_KEYS = 10
ROW_KEYS = ("data", "rows", "records", "examples", "instances", "samples", "train")
"""Keys under which a JSON object may hold the rows."""
SEPARATOR_LINE = re.compile(r"sep[=](.)\s*")
"""First line of a CSV file that names the separator to Excel."""
OTHER_DELIMITERS = (";", "\t", "|", ",")
"""Separators of columns that are recognised in the header of a .csv or .tsv file."""

_UNUSABLE = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\ud800-\udfff]")
"""Characters that make a row unusable.

These are control characters except tab, line breaks, form feed and escape (which occurs in terminal
logs), and lone surrogates, which cannot be encoded as UTF-8.
"""


class BadRow(Exception):
    """Reason for dropping one row. `shown` is the detail that helps people find the fault."""

    def __init__(self, reason: str, shown: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.shown = f" ({shown})" if shown else ""


@dataclass(frozen=True)
class RowFile:
    """A local or remote file to read."""

    name: str
    """Path or URL for messages. Its ending determines the kind of file."""
    open: Callable[[], BinaryIO]


def read_file(file: RowFile, drops: DropCounts) -> list[RawRow]:
    """Return all usable rows of one file, and count the bad ones in `drops`.

    Raises:
        DataError: The file as a whole cannot be read: an unknown ending, a truncated file, an encoding
            other than UTF-8, or a broken JSON list.
    """
    kind, zipped = file_kind(file.name)
    if kind is None:
        raise DataError(f"{file.name}: {unknown_kind_problem(file.name)}")
    try:
        with file.open() as stream:
            source = unzipped(stream, file.name) if zipped else stream
            return list(READERS[kind](source, file.name, drops))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{file.name}: the gzip file is truncated or damaged ({error}). Download it again."
        ) from None


class _SmallReads(io.RawIOBase):
    """Stream that reads at most PACKED_BYTES at a time."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._stream.read(min(len(buffer), PACKED_BYTES))
        buffer[: len(piece)] = piece
        return len(piece)


class _BoundedGzip(io.RawIOBase):
    """Unpacked content of a gzip file, with a limit on the expansion."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._zip = gzip.GzipFile(fileobj=cast(BinaryIO, _SmallReads(stream)), mode="rb")
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # A file that is read whole asks for all of it at once, and gzip would unpack all of it before
        # the ratio is checked.
        with memoryview(buffer) as view:
            count = self._zip.readinto(view[:UNZIPPED_BYTES])
        self._count += count
        packed = max(1, self._stream.tell())
        if self._count > FREE_BYTES and self._count > MAX_EXPANSION * packed:
            raise DataError(
                f"{self._name}: unpacks to more than {MAX_EXPANSION} times its size, which is typical "
                "of a gzip bomb. If you trust the file, unpack it first."
            )
        return count


def unzipped(stream: BinaryIO, name: str) -> BinaryIO:
    """Return a stream of a gzip file's content.

    Raises:
        DataError: The content expands far more than text does. Raised while reading the stream.
    """
    return cast(BinaryIO, io.BufferedReader(_BoundedGzip(stream, name), UNZIPPED_BYTES))


def file_kind(name: str) -> tuple[str | None, bool]:
    """Return the kind of a file by its ending (None if unknown), and True if the file is gzipped."""
    # signed URLs carry a query after the name
    plain = (name.split("?")[0] if "://" in name else name).lower()
    zipped = plain.endswith(".gz")
    plain = plain.removesuffix(".gz")
    kind = next((suffix for suffix in READERS if plain.endswith(suffix)), None)
    # Parquet is compressed inside and needs random access, which a gzip stream does not offer.
    return (None if zipped and kind == ".parquet" else kind), zipped


def unknown_kind_problem(name: str) -> str:
    """Describe why a file cannot be read, given its name with an unknown ending."""
    last = name.rstrip("/").rsplit("/", 1)[-1]
    fault = f"unknown file ending .{last.rsplit('.', 1)[1]}" if "." in last else "no file ending"
    return f"{fault}. Use {', '.join(READERS)} (all but .parquet also with .gz)"


def checked_values(values: object) -> Mapping[str, Any]:
    """Return a record as a row's values.

    Raises:
        BadRow: The record is not an object, is nested too deeply, or holds unusable characters.
    """
    if not isinstance(values, dict):
        raise BadRow(f"a {type(values).__name__}, not a JSON object")
    # Levels are walked in a loop: recursion would hit Python's limit on a nesting bomb.
    level: list[object] = [values]
    count = 0
    for _ in range(MAX_DEPTH):
        count += sum(len(node) for node in level if isinstance(node, dict))
        if count > MAX_KEYS:
            raise BadRow(f"more than {MAX_KEYS:,} keys in one row")
        inner = [item for node in level for item in _inside(node)]
        for item in inner:
            if isinstance(item, str) and (found := _UNUSABLE.search(item)):
                half = found[0] >= "\ud800"
                raise BadRow("half a surrogate pair" if half else "control characters")
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return values
    raise BadRow(f"nested deeper than {MAX_DEPTH} levels")


def _inside(node: object) -> Iterator[object]:
    if isinstance(node, dict):
        yield from node
        yield from node.values()
    elif isinstance(node, list):
        yield from node


def _json_lines(stream: BinaryIO, name: str, drops: DropCounts) -> Iterator[RawRow]:
    lines = _lines(stream, name)
    for number, line in lines:
        # people give a JSON array the ending of JSON lines
        if number == 1 and line is not None and line.lstrip().startswith(b"["):
            yield from _json(_Rest(line, stream), name, drops)  # type: ignore[arg-type]
            return
        where = f"{name}:{number}"
        try:
            text = _decoded(line).strip()
            if text:
                yield RawRow(checked_values(_parsed(text)), where)
        except BadRow as bad:
            drops.drop(STAGE, bad.reason, where + bad.shown)


class _Rest:
    """A stream from a line on that was already read."""

    def __init__(self, line: bytes, stream: BinaryIO) -> None:
        self._line = line
        self._stream = stream

    def read(self, size: int) -> bytes:
        return self._line + self._stream.read(max(0, size - len(self._line)))


def _json(stream: BinaryIO, name: str, drops: DropCounts) -> Iterator[RawRow]:
    """Read a JSON list of objects, or JSON lines, which many .json files hold."""
    content = _whole(stream, name)
    try:
        records = _parsed(_decoded_whole(content))
    except BadRow as bad:
        # JSON lines start with `{` and are not one JSON document.
        if bad.reason != "broken JSON" or not content.lstrip().startswith(b"{"):
            raise DataError(f"{name}: {bad.reason}{bad.shown}") from None
        yield from _json_lines(io.BytesIO(content), name, drops)
        return
    if isinstance(records, dict):
        records = _rows_inside(records, name, drops)
    if not isinstance(records, list):
        raise DataError(f"{name}: the file holds a {type(records).__name__}, not a list of rows")
    # Lines are not known after parsing, so rows of a JSON list are named by their number.
    for number, record in enumerate(records, start=1):
        where = f"{name}: row {number}"
        try:
            yield RawRow(checked_values(record), where)
        except BadRow as bad:
            drops.drop(STAGE, bad.reason, where + bad.shown)


def _rows_inside(found: dict[str, Any], name: str, drops: DropCounts) -> list[Any]:
    """Return the rows that an object holds under one of the usual keys.

    Raises:
        DataError: No such key, or no other than it, holds the rows. The message says what to do.
    """
    lists = [key for key, value in found.items() if _is_rows(value)]
    if len(lists) == 1 and lists[0] in ROW_KEYS:
        drops.changed[f"rows taken from the key {lists[0]!r} of the JSON object"] += 1
        return list(found[lists[0]])
    keys = ", ".join(list(found)[:SHOWN_KEYS]) + (", …" if len(found) > SHOWN_KEYS else "")
    remedy = (
        f"Store each of {', '.join(lists)} in a file of its own"
        if len(lists) > 1
        else "Store one object a line, or one list of objects (pandas: orient='records')"
    )
    raise DataError(
        f"{name}: the file holds a dict, not a list of rows. Its keys are {keys}. {remedy}"
    )


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _separated(stream: BinaryIO, name: str, drops: DropCounts, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(MAX_LINE_BYTES)  # the default of 128 KiB is too small for documents
    # Bytes that are not UTF-8 become lone surrogates here, so that only their row is dropped below.
    lines = (
        (line or b"").decode("utf-8", errors="surrogateescape") for _, line in _lines(stream, name)
    )
    first = next(lines, "")
    named = SEPARATOR_LINE.fullmatch(first)
    delimiter = named[1] if named else _delimiter(first, delimiter, drops)
    reader = csv.reader(lines if named else chain([first], lines), delimiter=delimiter, strict=True)
    before = 1 if named else 0
    header = _header(reader, name)
    while True:
        where = f"{name}:{before + reader.line_num + 1}"
        try:
            fields = next(reader)
            if not fields:
                continue
            if len(fields) != len(header):
                raise BadRow("another number of fields than the header", f"{len(fields)}")
            yield RawRow(_checked_text(dict(zip(header, fields, strict=True))), where)
        except StopIteration:
            return
        except csv.Error as error:
            # An open quote swallows the rest of the file, so the remaining rows cannot be trusted.
            if "unexpected end" in str(error):
                raise DataError(f"{where}: a quoted field is never closed") from None
            drops.drop(STAGE, "broken CSV", f"{where} ({error})")
        except BadRow as bad:
            drops.drop(STAGE, bad.reason, where + bad.shown)


def _delimiter(header: str, usual: str, drops: DropCounts) -> str:
    """Return the delimiter of a header: the usual one, or another one if the usual does not occur."""
    counts = Counter({other: header.count(other) for other in OTHER_DELIMITERS})
    [(other, count)] = counts.most_common(1)
    if usual in header or not count:
        return usual
    drops.changed[f"columns separated by {other!r}"] += 1
    return other


def _header(reader: Iterator[list[str]], name: str) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{name}:1: broken CSV header ({error})") from None
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(f"{name}:1: duplicate column in the header: {', '.join(map(repr, twice))}")
    return header


def _checked_text(values: dict[str, str]) -> Mapping[str, Any]:
    try:
        return checked_values(values)
    except BadRow as bad:
        # the lines were decoded with surrogateescape, so a
        # surrogate stands for a byte that is no UTF-8
        if "surrogate" in bad.reason:
            raise BadRow("invalid UTF-8") from None
        raise


def _parquet(stream: BinaryIO, name: str, drops: DropCounts) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=4096):
            for values in batch.to_pylist():
                number += 1
                where = f"{name}: row {number}"
                try:
                    yield RawRow(checked_values(values), where)
                except BadRow as bad:
                    drops.drop(STAGE, bad.reason, where + bad.shown)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(
            f"{name}: the Parquet file is truncated or damaged ({reason}). Download it again."
        ) from None


def _text(stream: BinaryIO, name: str, drops: DropCounts) -> Iterator[RawRow]:
    """Read a plain-text file as one row, with all of its text in the column `text`."""
    try:
        text = _decoded_whole(_whole(stream, name))
        if not text.strip():
            raise BadRow("an empty text")
        values = checked_values({"text": text.replace("\r\n", "\n")})
        yield RawRow(values, name, whole_file=True)
    except BadRow as bad:
        drops.drop(STAGE, bad.reason, name + bad.shown)


READERS: dict[str, Callable[[BinaryIO, str, DropCounts], Iterator[RawRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_separated, delimiter=","),
    ".tsv": partial(_separated, delimiter="\t"),
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines with their numbers, from 1. A line that is too long is yielded as None."""
    number = 0
    # One byte more than allowed tells a line that is too long from one that just fits.
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = _without_mark(line, name)
        if len(line) <= MAX_LINE_BYTES:
            yield number, line
            continue
        skipped = len(line)
        while line and not line.endswith(b"\n"):
            if skipped > MAX_SKIPPED_BYTES:
                raise DataError(
                    f"{name}:{number}: {MAX_SKIPPED_BYTES // MIB} MiB without a line break. "
                    "The file must hold one row per line."
                )
            line = stream.readline(MAX_LINE_BYTES)
            skipped += len(line)
        yield number, None


def _without_mark(start: bytes, name: str) -> bytes:
    """Return a file's first bytes without the byte-order mark of UTF-8.

    Raises:
        DataError: The mark is that of UTF-16 or UTF-32.
    """
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name}: encoded as UTF-16 or UTF-32. Convert the file to UTF-8.")
    return start.removeprefix(codecs.BOM_UTF8)


def _decoded(line: bytes | None) -> str:
    if line is None:
        raise BadRow(f"a line of more than {MAX_LINE_BYTES // MIB} MiB")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("invalid UTF-8", f"byte {error.start + 1} of the line") from None


def _whole(stream: BinaryIO, name: str) -> bytes:
    content = stream.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise DataError(
            f"{name}: larger than {MAX_FILE_BYTES // MIB} MiB. Store rows as .jsonl and split plain "
            "text into several files."
        )
    return _without_mark(content, name)


def _decoded_whole(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadRow("invalid UTF-8", f"line {line}") from None


def _parsed(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        start = max(0, error.pos - SHOWN_CHARS // 2) if line else 0
        shown = text[start:].strip()
        shown = shown[:SHOWN_CHARS] + ("…" if len(shown) > SHOWN_CHARS else "")
        place = f"{error.msg} at {line}column {error.colno}"
        raise BadRow("broken JSON", f"{place}: {shown}") from None
    except RecursionError:
        raise BadRow(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # Python rejects integers of more than 4300 digits
        raise BadRow("broken JSON", str(error).split(";")[0]) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    # Python's json keeps the last of two values without notice.
    if len(values) < len(pairs):
        raise BadRow("duplicate key in an object")
    return values


def _no_number(word: str) -> Any:
    raise BadRow("NaN or Infinity, which JSON does not have", word)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)
