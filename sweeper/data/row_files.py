"""Read: the bytes of one file into rows; a broken row is left out and counted, with file and line.

Knows the kinds of files (JSON lines, JSON, CSV, TSV, Parquet, plain text; the text kinds also gzipped),
not where files lie (`sources`) and not what their columns mean (`formats`). datasets' own JSON reader
names neither file nor line, so text is read here.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from sweeper.core.errors import DataError
from sweeper.data.examples import DropCounts, RawRow

STAGE = "read"
MIB = 2**20
MAX_LINE_BYTES = 16 * MIB
"""A longer line is a bad row; it is skipped in pieces and never held in memory."""
MAX_SKIPPED_BYTES = 256 * MIB
"""After that much without a line break a file is not read on."""
MAX_FILE_BYTES = 512 * MIB
"""A .json, .txt or .md file is read whole, up to this size."""
MAX_EXPANSION = 300
"""Times its size that a gzip file may unpack to; text reaches 20, and only zeros a thousand."""
FREE_BYTES = MIB
"""Unpacked without a look at the expansion: small files may be very regular."""
PACKED_BYTES, UNZIPPED_BYTES = 8 * 1024, 4 * MIB
"""Of a gzip file, read and unpacked at a time: expanded MAX_EXPANSION times, the one is less than the
other, so that a bomb is seen before its first line is read."""
MAX_KEYS = 10_000
"""Of all objects in one row."""
MAX_DEPTH = 100
"""Lists and objects inside each other in one row."""
SHOWN_CHARS = 80

_UNUSABLE = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\ud800-\udfff]")
"""What no tokenizer should meet: control characters but for tab, line breaks, form feed and escape
(terminal logs), and halves of surrogate pairs, which cannot be written as UTF-8."""


class BadRow(Exception):
    """Why one row is left out; `shown` is what people need to find it."""

    def __init__(self, reason: str, shown: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.shown = f" ({shown})" if shown else ""


@dataclass(frozen=True)
class RowFile:
    """A file to read, wherever it lies."""

    name: str
    """As the user knows it; its ending says what kind it is."""
    open: Callable[[], BinaryIO]


def read_file(file: RowFile, ledger: DropCounts) -> list[RawRow]:
    """All sound rows of one file.

    Raises:
        DataError: the file as a whole cannot be read: another kind, truncated, not UTF-8, a broken list.
    """
    kind, zipped = kind_of(file.name)
    if kind is None:
        raise DataError(f"{file.name}: {unknown_kind(file.name)}")
    try:
        with file.open() as stream:
            source = unzipped(stream, file.name) if zipped else stream
            return list(READERS[kind](source, file.name, ledger))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file.name}: not a whole gzip file ({error}); fetch it again") from None


class _SmallReads(io.RawIOBase):
    """A stream that is read a little at a time, however much is asked for."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._stream.read(min(len(buffer), PACKED_BYTES))
        buffer[: len(piece)] = piece
        return len(piece)


class _BoundedGzip(io.RawIOBase):
    """What a gzip file unpacks to, unless it is far more than any text would."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._zip = gzip.GzipFile(fileobj=cast(BinaryIO, _SmallReads(stream)), mode="rb")
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._zip.readinto(buffer)
        self._count += count
        packed = max(1, self._stream.tell())
        if self._count > FREE_BYTES and self._count > MAX_EXPANSION * packed:
            raise DataError(
                f"{self._name}: unpacks to more than {MAX_EXPANSION} times its size, as no data does; "
                "if it is yours, give it unpacked"
            )
        return count


def unzipped(stream: BinaryIO, name: str) -> BinaryIO:
    """A gzip file's content.

    Raises:
        DataError: from reading it, if it is a bomb.
    """
    return cast(BinaryIO, io.BufferedReader(_BoundedGzip(stream, name), UNZIPPED_BYTES))


def kind_of(name: str) -> tuple[str | None, bool]:
    """The kind of a file by its ending (None: none that is read here), and whether it is gzipped."""
    plain = name.split("?")[0].lower()
    zipped = plain.endswith(".gz")
    plain = plain.removesuffix(".gz")
    kind = next((suffix for suffix in READERS if plain.endswith(suffix)), None)
    return (None if zipped and kind == ".parquet" else kind), zipped


def unknown_kind(name: str) -> str:
    """What is wrong with the ending of a file's name."""
    last = name.rstrip("/").rsplit("/", 1)[-1]
    ending = "." + last.rsplit(".", 1)[1] if "." in last else "nameless"
    return f"a {ending} file; give {', '.join(READERS)} (all but .parquet also with .gz)"


def checked(values: object) -> Mapping[str, Any]:
    """A record as a row's values.

    Raises:
        BadRow: no object, nested too deeply, or text that no tokenizer should meet.
    """
    if not isinstance(values, dict):
        raise BadRow(f"a {type(values).__name__}, not a JSON object")
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


def _json_lines(stream: BinaryIO, name: str, ledger: DropCounts) -> Iterator[RawRow]:
    for number, line in _lines(stream, name):
        where = f"{name}:{number}"
        try:
            text = _decoded(line).strip()
            if text:
                yield RawRow(checked(_parsed(text)), where)
        except BadRow as bad:
            ledger.drop(STAGE, bad.reason, where + bad.shown)


def _json(stream: BinaryIO, name: str, ledger: DropCounts) -> Iterator[RawRow]:
    """One list of objects; many files of this name hold one object a line, and are read as such."""
    content = _whole(stream, name)
    try:
        records = _parsed(_decoded_whole(content))
    except BadRow as bad:
        if bad.reason != "broken JSON" or not content.lstrip().startswith(b"{"):
            raise DataError(f"{name}: {bad.reason}{bad.shown}") from None
        yield from _json_lines(io.BytesIO(content), name, ledger)
        return
    if not isinstance(records, list):
        raise DataError(f"{name}: a {type(records).__name__}, not a list of rows")
    for number, record in enumerate(records, start=1):
        where = f"{name}: row {number}"
        try:
            yield RawRow(checked(record), where)
        except BadRow as bad:
            ledger.drop(STAGE, bad.reason, where + bad.shown)


def _comma(stream: BinaryIO, name: str, ledger: DropCounts) -> Iterator[RawRow]:
    return _separated(stream, name, ledger, ",")


def _tab(stream: BinaryIO, name: str, ledger: DropCounts) -> Iterator[RawRow]:
    return _separated(stream, name, ledger, "\t")


def _separated(stream: BinaryIO, name: str, ledger: DropCounts, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(MAX_LINE_BYTES)
    # what is no UTF-8 arrives as half surrogate pairs, and its row is found to be bad below
    lines = (
        (line or b"").decode("utf-8", errors="surrogateescape") for _, line in _lines(stream, name)
    )
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = _header(reader, name)
    while True:
        where = f"{name}:{reader.line_num + 1}"
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
            if "unexpected end" in str(error):
                raise DataError(f"{where}: a quoted field opens and never closes") from None
            ledger.drop(STAGE, "broken CSV", f"{where} ({error})")
        except BadRow as bad:
            ledger.drop(STAGE, bad.reason, where + bad.shown)


def _header(reader: Iterator[list[str]], name: str) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{name}:1: broken CSV header ({error})") from None
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(f"{name}:1: the header names {', '.join(map(repr, twice))} twice")
    return header


def _checked_text(values: dict[str, str]) -> Mapping[str, Any]:
    try:
        return checked(values)
    except BadRow as bad:
        if "surrogate" in bad.reason:
            raise BadRow("invalid UTF-8") from None
        raise


def _parquet(stream: BinaryIO, name: str, ledger: DropCounts) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=4096):
            for values in batch.to_pylist():
                number += 1
                where = f"{name}: row {number}"
                try:
                    yield RawRow(checked(values), where)
                except BadRow as bad:
                    ledger.drop(STAGE, bad.reason, where + bad.shown)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(f"{name}: not a whole Parquet file ({reason}); fetch it again") from None


def _text(stream: BinaryIO, name: str, ledger: DropCounts) -> Iterator[RawRow]:
    """A plain text is one row, with the whole of it in the column `text`."""
    try:
        text = _decoded_whole(_whole(stream, name))
        if not text.strip():
            raise BadRow("an empty text")
        yield RawRow(checked({"text": text.replace("\r\n", "\n")}), name)
    except BadRow as bad:
        ledger.drop(STAGE, bad.reason, name + bad.shown)


READERS: dict[str, Callable[[BinaryIO, str, DropCounts], Iterator[RawRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _comma,
    ".tsv": _tab,
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers, from 1; None for one that is too long."""
    number = 0
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
                    f"{name}:{number}: {MAX_SKIPPED_BYTES // MIB} MiB without a line break; "
                    "is this one row a line?"
                )
            line = stream.readline(MAX_LINE_BYTES)
            skipped += len(line)
        yield number, None


def _without_mark(start: bytes, name: str) -> bytes:
    """Without the byte-order mark of UTF-8; that of another encoding is an error."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name}: UTF-16 or UTF-32; convert the file to UTF-8")
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
            f"{name}: more than {MAX_FILE_BYTES // MIB} MiB; give rows as .jsonl, texts in several files"
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
    except ValueError as error:  # a number of more than 4300 digits
        raise BadRow("broken JSON", str(error).split(";")[0]) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise BadRow("a key stands twice in an object")
    return values


def _no_number(word: str) -> Any:
    raise BadRow("NaN or Infinity, which JSON does not have", word)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)
