"""Load the train, validation and test examples of a data configuration, and their digest.

Test and validation are fixed first, and train loses every row that it shares with them. Only then is
train sampled and ordered. Does not know tokenizers.
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
from sweeper.data.duplicates import SeenTexts, normalised
from sweeper.data.examples import DropCounts, Example, RawRow
from sweeper.data.mixture import shape_train
from sweeper.data.partition import Pools, partition
from sweeper.data.row_formats import FORMATS, detect_format, to_examples
from sweeper.data.sources import describe_sources, own_splits, read_source

STAGE = "split"
DETECTION_ROWS = 100
"""Number of rows tried to detect the format, because the first ones may be broken."""


@dataclass(frozen=True)
class DataSplits:
    """Examples by split (train, validation, test), with their origin and the counts of dropped rows."""

    examples: dict[str, list[Example]]
    formats: tuple[str, ...]
    """Names of the formats that occur, without duplicates."""
    source: str
    """Origin of the training rows for people."""
    drops: DropCounts
    """Dropped rows by stage and reason."""
    passed: dict[str, int]
    """Rows that each stage let through, in order. From `train` on the counts are of train only."""
    ordered: bool
    """True if train is in its training order (data.order_by) and must not be shuffled."""

    @property
    def format(self) -> str:
        """The formats as text for people."""
        return ", ".join(self.formats)

    @property
    def dropped(self) -> dict[str, int]:
        """Dropped rows by reason, over all stages."""
        return self.drops.total

    @property
    def unread(self) -> dict[str, int]:
        """Columns and keys of turns that no format reads, with the number of rows that have a value."""
        return dict(self.drops.unread)

    @property
    def changed(self) -> dict[str, int]:
        """Rows that were kept, by what was changed in them or is remarkable about them."""
        return dict(self.drops.changed)

    @property
    def counts(self) -> dict[str, int]:
        """Number of examples by split."""
        return {name: len(found) for name, found in self.examples.items()}

    @property
    def digest(self) -> str:
        """The sha256 over the examples of all splits, in order."""
        digest = hashlib.sha256()
        for name, examples in sorted(self.examples.items()):
            for example in examples:
                # Only texts are hashed, so that moved files give the same digest.
                line = json.dumps([name, example.identity], ensure_ascii=False)
                digest.update(line.encode() + b"\n")
        return digest.hexdigest()


@dataclass
class _Reading:
    """Running totals while the sources of a configuration are read."""

    drops: DropCounts
    formats: dict[str, None]  # a set that keeps its order
    read: int = 0


def load_splits(data: DataSettings) -> DataSplits:
    """Return the examples of a data configuration.

    Raises:
        DataError: A source is missing or broken, too many rows are unusable, or a split is empty.
    """
    reading = _Reading(DropCounts(), {})
    passed: dict[str, int] = {}
    if [item.path for item in sources(data.train)] == [EMBEDDED]:
        pools, source = _embedded(data, reading)
    else:
        source = describe_sources(data)
        pools = _files(data, reading, passed)
    # Near duplicates were removed before validation was split off train. A later exact check suffices.
    _remove_leaks(pools, seen_texts(data, near=False), reading.drops)
    passed["train"] = _size(pools["train"])
    weights = [item.weight for item in sources(data.train) if item.weight is not None]
    examples = {
        name: [example for pool in found for example in pool] for name, found in pools.items()
    }
    examples["train"] = shape_train(pools["train"], weights or None, data)
    passed["train as shaped"] = len(examples["train"])
    _refuse_empty(examples, source, reading.drops)
    _count_near_leaks(examples, reading.drops)
    ordered = data.order_by is not None
    return DataSplits(examples, tuple(reading.formats), source, reading.drops, passed, ordered)


def load_examples(path: str, data: DataSettings) -> list[Example]:
    """Return the usable examples of an additional source (a night's gate) in the format of `data`.

    The examples are neither cleaned, sampled nor ordered.

    Args:
        path: A path, URL or hub id. `embedded` means docstring pairs of the held-out modules, which no
            split of the embedded data set uses.
        data: Data settings: format, columns, max_bad_fraction and redaction.

    Raises:
        DataError: The source is missing or broken, or has too many unusable rows.
    """
    if path == EMBEDDED:
        rows = [
            RawRow(values, f"{path}:{number}") for number, values in enumerate(held_out_pairs(), 1)
        ]
        return to_examples(rows, "alpaca", {}, DropCounts())
    return _examples(DataSource(path=path), "gate", data, _Reading(DropCounts(), {}))


def _refuse_empty(
    examples: Mapping[str, Sequence[Example]], source: str, drops: DropCounts
) -> None:
    for name in ("train", "validation"):
        if not examples[name]:
            reasons = ", ".join(f"{count} {why}" for why, count in drops.total.items())
            raise DataError(
                f"{source}: the {name} split is empty. Use more rows, or give the split a source of "
                f"its own (data.{name}=FILE)." + (f" Dropped: {reasons}." if reasons else "")
            )


def _embedded(data: DataSettings, reading: _Reading) -> tuple[Pools, str]:
    """Return the examples of the embedded docstring pairs and the name of their source."""
    # The pairs come already cleaned and split by module, so partition and cleaning are skipped.
    for name in ("validation", "test"):
        if getattr(data, name) is not None:
            raise DataError(
                f"data.{name} needs data.train=FILE, because the embedded data set has its own "
                f"{name} split"
            )
    pairs = docstring_pairs()
    source = f"docstring pairs of {platform.python_implementation()} {platform.python_version()}"
    for reason, count in pairs.dropped.items():
        # Counted under cleaning, so that the data card reads like that of a file.
        if count:
            reading.drops.counts[cleaning.STAGE][reason.replace("_", " ")] += count
    reading.formats["alpaca"] = None
    pools: Pools = {}
    for name, records in pairs.rows.items():
        found = [
            RawRow(values, f"{source}: {name} row {number}")
            for number, values in enumerate(records, start=1)
        ]
        pools[name] = [to_examples(found, "alpaca", {}, reading.drops)]
    return pools, source


def _files(data: DataSettings, reading: _Reading, passed: dict[str, int]) -> Pools:
    pools = {
        key: [_examples(source, key, data, reading) for source in found]
        for key in SPLIT_KEYS
        if (found := _sources(data, key))
    }
    for key, pool in pools.items():
        if getattr(data, key) is None:
            reading.drops.changed[f"{key} rows from the folder's own {key} files"] = _size(pool)
    passed["read"] = reading.read
    passed["usable"] = sum(_size(found) for found in pools.values())
    seen = seen_texts(data)
    # Validation and test files are not cleaned: their rows define what the user wants to be good at.
    pools["train"] = [
        cleaning.clean(pool, data.cleaning, seen, reading.drops) for pool in pools["train"]
    ]
    passed["clean"] = sum(_size(found) for found in pools.values())
    if len(pools) > 1:
        # Leaks are removed before the partition, or a test split drawn from train could hold rows of
        # the validation file.
        _remove_leaks(pools, seen_texts(data), reading.drops)
    passed["disjoint"] = sum(_size(found) for found in pools.values())
    return partition(pools, data)


def _sources(data: DataSettings, key: str) -> list[DataSource]:
    """Return the sources of a split: those of the configuration, or a training folder's own files."""
    if (given := getattr(data, key)) is not None:
        return sources(given)
    return [
        source.model_copy(update={"split": key, "weight": None})
        for source in sources(data.train)
        if key in own_splits(source)
    ]


def _examples(source: DataSource, key: str, data: DataSettings, reading: _Reading) -> list[Example]:
    """Return the usable, redacted examples of one source.

    Raises:
        DataError: The source cannot be read, or more than data.max_bad_fraction of its rows are bad.
    """
    if source.path == EMBEDDED:
        raise DataError(f"data.{key}: {EMBEDDED} cannot be combined with other sources")
    drops = DropCounts()
    found = read_source(source, key, drops)
    columns = data.columns if source.columns is None else source.columns
    used = [str(name) for name in (data.group_by, data.balance_by, data.order_by) if name]
    examples: list[Example] = []
    read = len(found) + sum(drops.total.values())
    if found:
        format_name = _format(source.format or data.format, found, columns)
        examples = to_examples(
            found,
            format_name,
            columns,
            drops,
            ignored=data.ignore_columns,
            elsewhere=used,
            train_history=data.train_history,
        )
        reading.formats |= dict.fromkeys([each.format for each in examples] or [format_name])
    _tolerate(source, drops, read, data.max_bad_fraction)
    for name in used:
        drops.unread.pop(name, None)
    reading.drops.add(drops)
    reading.read += read
    return cleaning.redact(examples, data.cleaning.redact)


def _format(name: str, found: Sequence[RawRow], columns: Mapping[str, str]) -> str:
    if name != "auto":
        if name not in FORMATS:
            raise DataError(f"format={name}: no such format. Use auto, {', '.join(FORMATS)}")
        return name
    problem: DataError | None = None
    for row in found[:DETECTION_ROWS]:
        try:
            return detect_format(row, columns)
        except DataError as error:
            problem = problem or error  # the first row's columns are the most useful to report
    assert problem is not None
    raise problem


def _tolerate(source: DataSource, drops: DropCounts, read: int, limit: float) -> None:
    """Raise if more rows are bad than data.max_bad_fraction allows, with all reasons and some places."""
    counts_by_stage = {stage: drops.counts[stage] for stage in (rows.STAGE, formats.STAGE)}
    bad = sum(counts.total() for counts in counts_by_stage.values())
    if read == 0:
        raise DataError(f"{source.path}: contains no rows")
    if bad <= limit * read:
        return
    lines = [
        f"  {count} × {reason}: {', '.join(drops.places[stage, reason])}"
        + (", …" if count > len(drops.places[stage, reason]) else "")
        for stage, counts in counts_by_stage.items()
        for reason, count in counts.most_common()
    ]
    if any("invalid UTF-8" in counts for counts in counts_by_stage.values()):
        lines.append(
            "The file has another encoding: iconv -f WINDOWS-1252 -t UTF-8 FILE converts it."
        )
    raise DataError(
        "\n".join(
            [
                f"{source.path}: {bad} of {read} rows cannot be used, more than the "
                f"{limit:.3%} that data.max_bad_fraction allows:",
                *lines,
                "Fix or delete these rows, or raise data.max_bad_fraction to skip them.",
            ]
        )
    )


def _remove_leaks(pools: Pools, seen: SeenTexts, drops: DropCounts) -> None:
    """Remove from train the rows of validation and test, and from validation the rows of test."""
    for name in ("test", "validation", "train"):
        if name in pools and name != "test":
            pools[name] = [_without(pool, seen, f"{name} leak", drops) for pool in pools[name]]
        if name in pools and name != "train":
            for pool in pools[name]:
                for example in pool:
                    seen.add(example.text)


def _count_near_leaks(examples: Mapping[str, Sequence[Example]], drops: DropCounts) -> None:
    """Count training rows with the prompt of a judged row and another answer, which are kept."""
    for name in ("validation", "test"):
        asked = {_prompt(example) for example in examples[name]} - {""}
        if count := sum(_prompt(example) in asked for example in examples["train"]):
            what = f"train rows with the prompt of a {name} row and another answer (near leak)"
            drops.changed[what] += count


def _prompt(example: Example) -> str:
    return normalised("\n".join(turn.text for turn in example.messages[:-1]))


def _without(
    pool: Sequence[Example], seen: SeenTexts, reason: str, drops: DropCounts
) -> list[Example]:
    kept = []
    for example in pool:
        if (kind := seen.kind(example.text)) is None:
            kept.append(example)
        else:
            drops.drop(STAGE, f"{reason} ({kind})", example.row.where)
    return kept


def seen_texts(data: DataSettings, *, near: bool = True) -> SeenTexts:
    """Return an empty set of texts that compares as data.cleaning says.

    Args:
        data: Data settings: cleaning.deduplicate and cleaning.near_threshold.
        near: False to find exact duplicates only.
    """
    near = near and data.cleaning.deduplicate == "near"
    return SeenTexts(data.cleaning.near_threshold if near else None)


def _size(pools: Iterable[Sequence[Example]]) -> int:
    return sum(len(pool) for pool in pools)
