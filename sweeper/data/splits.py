"""Split: where train, validation and test come from, what they hold, and a digest of it all.

Every stage takes examples by source and a ledger. The judges' rows come first: test and validation are
settled before train is shaped, and what train shares with them leaves train. Knows no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sweeper.builtin.docstring_pairs import docstring_pairs, held_out_pairs
from sweeper.config.settings import EMBEDDED, SPLIT_KEYS, DataSettings, DataSource, sources
from sweeper.core.errors import DataError
from sweeper.data import cleaning
from sweeper.data import row_files as rows
from sweeper.data import row_formats as formats
from sweeper.data.duplicates import SeenTexts
from sweeper.data.examples import DropCounts, Example, RawRow
from sweeper.data.mixture import shape
from sweeper.data.partition import Pools, partition
from sweeper.data.row_formats import FORMATS, detect_format, to_examples
from sweeper.data.sources import describe_sources, read_source

STAGE = "split"
DETECTION_ROWS = 100
"""How many rows are tried before their columns count as unknown: the first may be a broken one."""


@dataclass(frozen=True)
class DataSplits:
    """Examples by split (train, validation, test), and what there is to say about them."""

    examples: dict[str, list[Example]]
    formats: tuple[str, ...]
    """Each format that occurs, once."""
    source: str
    ledger: DropCounts
    """What was left out on the way, by stage and reason."""
    passed: dict[str, int]
    """Rows that came out of each stage, in order; from `train` on they are train's."""
    ordered: bool
    """Train stands in the order it is to be trained in (data.order_by): do not shuffle it."""

    @property
    def format(self) -> str:
        """The formats in one word for people."""
        return ", ".join(self.formats)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows left out by reason, over all stages."""
        return self.ledger.total

    @property
    def counts(self) -> dict[str, int]:
        """Examples by split."""
        return {name: len(found) for name, found in self.examples.items()}

    @property
    def digest(self) -> str:
        """sha256 over the examples of all splits, in order."""
        digest = hashlib.sha256()
        for name, examples in sorted(self.examples.items()):
            for example in examples:
                turns = [[turn.role, turn.content, turn.input] for turn in example.messages]
                digest.update(json.dumps([name, turns], ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()


@dataclass
class _Reading:
    """What the sources of a configuration have given so far."""

    ledger: DropCounts
    formats: dict[str, None]  # a set that keeps its order
    read: int = 0


def load_splits(data: DataSettings) -> DataSplits:
    """The examples of a data configuration.

    Raises:
        DataError: a source is missing or broken, too many rows are unusable, or a split is empty.
    """
    reading = _Reading(DropCounts(), {})
    passed: dict[str, int] = {}
    if [item.path for item in sources(data.train)] == [EMBEDDED]:
        pools, source = _embedded(data, reading)
    else:
        source = describe_sources(data)
        pools = _files(data, reading, passed)
    _remove_leaks(pools, seen_texts(data, near=False), reading.ledger)
    passed["train"] = _size(pools["train"])
    weights = [item.weight for item in sources(data.train) if item.weight is not None]
    examples = {
        name: [example for pool in found for example in pool] for name, found in pools.items()
    }
    examples["train"] = shape(pools["train"], weights or None, data)
    passed["train as shaped"] = len(examples["train"])
    _refuse_empty(examples, source, reading.ledger)
    ordered = data.order_by is not None
    return DataSplits(examples, tuple(reading.formats), source, reading.ledger, passed, ordered)


def load_examples(path: str, data: DataSettings) -> list[Example]:
    """The usable examples of one more source, in the format of `data`: a split that no stage shapes.

    `embedded` is pairs of modules that no split of the embedded pairs takes its rows from.

    Raises:
        DataError: it is missing or broken, or holds too many unusable rows.
    """
    if path == EMBEDDED:
        rows = [
            RawRow(values, f"{path}:{number}") for number, values in enumerate(held_out_pairs(), 1)
        ]
        return to_examples(rows, "alpaca", {}, DropCounts())
    return _examples(DataSource(path=path), "gate", data, _Reading(DropCounts(), {}))


def _refuse_empty(
    examples: Mapping[str, Sequence[Example]], source: str, ledger: DropCounts
) -> None:
    for name in ("train", "validation"):
        if not examples[name]:
            reasons = ", ".join(f"{count} {why}" for why, count in ledger.total.items())
            raise DataError(
                f"{source}: the {name} split is empty; give more rows or a source of its own "
                f"(data.{name}=FILE)" + (f"; left out: {reasons}" if reasons else "")
            )


def _embedded(data: DataSettings, reading: _Reading) -> tuple[Pools, str]:
    """The pairs bring their own splits, by module, already clean."""
    for name in ("validation", "test"):
        if getattr(data, name) is not None:
            raise DataError(
                f"data.{name} needs data.train=FILE; the embedded pairs bring their own"
            )
    pairs = docstring_pairs()
    source = f"docstring pairs of {platform.python_implementation()} {platform.python_version()}"
    for reason, count in pairs.dropped.items():
        if count:
            reading.ledger.counts[cleaning.STAGE][reason.replace("_", " ")] += count
    reading.formats["alpaca"] = None
    pools: Pools = {}
    for name, records in pairs.rows.items():
        found = [
            RawRow(values, f"{source}: {name} row {number}")
            for number, values in enumerate(records, start=1)
        ]
        pools[name] = [to_examples(found, "alpaca", {}, reading.ledger)]
    return pools, source


def _files(data: DataSettings, reading: _Reading, passed: dict[str, int]) -> Pools:
    pools = {
        key: [_examples(source, key, data, reading) for source in sources(given)]
        for key in SPLIT_KEYS
        if (given := getattr(data, key)) is not None
    }
    passed["read"] = reading.read
    passed["usable"] = sum(_size(found) for found in pools.values())
    seen = seen_texts(data)
    # the judges' own files stay whole: what they hold is what the user wants to be good at
    pools["train"] = [
        cleaning.clean(pool, data.cleaning, seen, reading.ledger) for pool in pools["train"]
    ]
    passed["clean"] = sum(_size(found) for found in pools.values())
    if len(pools) > 1:  # before a test split could be drawn from rows of a validation file
        _remove_leaks(pools, seen_texts(data), reading.ledger)
    passed["disjoint"] = sum(_size(found) for found in pools.values())
    return partition(pools, data)


def _examples(source: DataSource, key: str, data: DataSettings, reading: _Reading) -> list[Example]:
    """The usable, redacted examples of one source.

    Raises:
        DataError: the source cannot be read, or more than max_bad_fraction of its rows are bad.
    """
    if source.path == EMBEDDED:
        raise DataError(f"data.{key}: {EMBEDDED} stands alone, it cannot be one of several sources")
    ledger = DropCounts()
    found = read_source(source, key, ledger)
    columns = data.columns if source.columns is None else source.columns
    examples: list[Example] = []
    read = len(found) + sum(ledger.total.values())
    if found:
        format_name = _format(source.format or data.format, found, columns)
        reading.formats[format_name] = None
        examples = to_examples(found, format_name, columns, ledger)
    _tolerate(source, ledger, read, data.max_bad_fraction)
    reading.ledger.add(ledger)
    reading.read += read
    return cleaning.redact(examples, data.cleaning.redact)


def _format(name: str, found: Sequence[RawRow], columns: Mapping[str, str]) -> str:
    if name != "auto":
        if name not in FORMATS:
            raise DataError(f"format={name}: no such format; formats: auto, {', '.join(FORMATS)}")
        return name
    problem: DataError | None = None
    for row in found[:DETECTION_ROWS]:
        try:
            return detect_format(row, columns)
        except DataError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _tolerate(source: DataSource, ledger: DropCounts, read: int, limit: float) -> None:
    """Stop where more rows are bad than data.max_bad_fraction allows, with all that is known."""
    counts_by_stage = {stage: ledger.counts[stage] for stage in (rows.STAGE, formats.STAGE)}
    bad = sum(counts.total() for counts in counts_by_stage.values())
    if read == 0:
        raise DataError(f"{source.path}: holds no rows")
    if bad <= limit * read:
        return
    lines = [
        f"  {count} × {reason}: {', '.join(ledger.places[stage, reason])}"
        + (", …" if count > len(ledger.places[stage, reason]) else "")
        for stage, counts in counts_by_stage.items()
        for reason, count in counts.most_common()
    ]
    raise DataError(
        "\n".join(
            [
                f"{source.path}: {bad} of {read} rows cannot be used, more than the "
                f"{limit:.3%} that data.max_bad_fraction allows:",
                *lines,
                "mend or delete them, or raise data.max_bad_fraction to skip and count them",
            ]
        )
    )


def _remove_leaks(pools: Pools, seen: SeenTexts, ledger: DropCounts) -> None:
    """Out of train what validation or test holds as well, out of validation what test holds."""
    for name in ("test", "validation", "train"):
        if name in pools and name != "test":
            pools[name] = [_without(pool, seen, f"{name} leak", ledger) for pool in pools[name]]
        if name in pools and name != "train":
            for pool in pools[name]:
                for example in pool:
                    seen.add(example.text)


def _without(
    pool: Sequence[Example], seen: SeenTexts, reason: str, ledger: DropCounts
) -> list[Example]:
    kept = []
    for example in pool:
        if (kind := seen.kind(example.text)) is None:
            kept.append(example)
        else:
            ledger.drop(STAGE, f"{reason} ({kind})", example.row.where)
    return kept


def seen_texts(data: DataSettings, *, near: bool = True) -> SeenTexts:
    """Compares as data.cleaning says; near duplicates are gone once the pools are disjoint."""
    near = near and data.cleaning.deduplicate == "near"
    return SeenTexts(data.cleaning.near_threshold if near else None)


def _size(pools: Iterable[Sequence[Example]]) -> int:
    return sum(len(pool) for pool in pools)
