"""Show the data of a configuration: formats, columns, drops, lengths, and rows with their loss mask.

Loads the tokenizer and the configuration of the base model, and no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import ModelError
from sweeper.data.data_card import show
from sweeper.data.encode import EncodedSplit
from sweeper.data.examples import DropCounts
from sweeper.modeling.model_source import find_source, load_config, load_tokenizer
from sweeper.reporting.console import say
from sweeper.training.prepared_data import PreparedData, positions, prepare_rows

BAR = 40
"""Characters of the longest bar of the histogram."""
BINS = 8
SHOWN_CHARS = 1200
"""Characters shown of one row."""


def report_data(settings: Iterable[TrialSettings], console: Console, rows: int) -> None:
    """Print the report of every different data section.

    Args:
        settings: Settings of the trials, or of the arms of a study.
        console: Console to print to.
        rows: Number of rows of each split that are shown.

    Raises:
        DataError: The data cannot be read or encoded. The message has the reasons.
        ModelError: The base model has no tokenizer, or does not exist.
    """
    # Arms often differ only in settings that leave the rows as they are.
    different = {
        (each.data.model_dump_json(), each.model.base_model, each.evaluation.over_length): each
        for each in settings
    }
    for each in different.values():
        for line in _lines(prepared_rows(each), rows):
            say(console, line)


def prepared_rows(settings: TrialSettings) -> PreparedData:
    """Return the data of a trial, tokenized without loading a model.

    Raises:
        DataError: The data cannot be read or encoded.
        ModelError: The base model has no tokenizer, or does not exist.
    """
    config = load_config(settings.model)
    where = f"model.base_model={settings.model.base_model!r}"
    tokenizer = load_tokenizer(find_source(settings.model).folder, where)
    # As complete_tokenizer does once the model is loaded, which a report does without.
    if tokenizer.eos_token_id is None:
        known = getattr(config, "eos_token_id", None)
        token_id = known[0] if isinstance(known, list) else known
        if token_id is None:
            raise ModelError(
                f"{where}: neither tokenizer nor configuration names an end-of-text token"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token_id)
    return prepare_rows(
        settings.data, tokenizer, positions(config), settings.evaluation.over_length
    )


def _lines(prepared: PreparedData, rows: int) -> Iterable[str]:
    splits = prepared.splits
    yield f"source: {splits.source}"
    yield f"format: {splits.format}"
    yield f"columns read: {', '.join(_columns(prepared)) or 'none'}"
    unread = (f"{name or repr(name)} ({count:,} rows)" for name, count in splits.unread.items())
    yield f"columns not read: {', '.join(unread) or 'none'}"
    yield ""
    yield f"{'split':<12}{'examples':>10}{'rows':>10}{'tokens':>12}{'with loss':>12}{'longest':>10}"
    for name, split in prepared.encoded.items():
        longest = max(len(row["input_ids"]) for row in split.rows)
        counts = f"{split.examples:>10,}{len(split.rows):>10,}{split.tokens:>12,}"
        yield f"{name:<12}{counts}{split.target_tokens:>12,}{longest:>10,}"
    limit = "no limit named" if prepared.limit is None else f"{prepared.limit:,} positions"
    yield f"max_length of train: {prepared.train.max_length:,} tokens (the model: {limit})"
    yield ""
    yield from _account("all", splits.drops)
    for name, split in prepared.encoded.items():
        yield from _account(name, split.drops)
        if split.truncated:
            yield f"cut ({name}): {split.truncated:,} rows to the maximum length"
    for name, split in prepared.encoded.items():
        yield ""
        yield f"tokens per row, {name} (before rows are dropped, cut or packed)"
        yield from _histogram(split.lengths)
    for name, split in prepared.encoded.items():
        yield from _shown(name, split, prepared, rows)


def _columns(prepared: PreparedData) -> list[str]:
    """Return the columns that hold a value in some row and are read."""
    examples = (each for found in prepared.splits.examples.values() for each in found)
    present = {
        name: None
        for example in examples
        for name, value in example.row.values.items()
        if value not in (None, "", [], {})
    }
    ignored = prepared.settings.ignore_columns
    return [name for name in present if name not in prepared.splits.unread and name not in ignored]


def _account(name: str, drops: DropCounts) -> Iterable[str]:
    for stage, counts in drops.counts.items():
        for reason, count in counts.most_common():
            places = drops.places.get((stage, reason), [])
            where = f": {', '.join(places)}{', …' if count > len(places) else ''}" if places else ""
            yield f"dropped ({name}, {stage}): {count:,} × {reason}{where}"
    for what, count in drops.changed.most_common():
        yield f"kept ({name}): {count:,} × {what}"


def _histogram(lengths: Sequence[int]) -> Iterable[str]:
    if not lengths:
        return
    low, width = min(lengths), max(1, -(-(max(lengths) - min(lengths) + 1) // BINS))
    counts = [0] * BINS
    for length in lengths:
        counts[(length - low) // width] += 1
    for at, count in enumerate(counts):
        first = low + at * width
        if first > max(lengths):
            return
        # rounded up, so that no bin with rows is without a bar
        bar = "█" * -(-BAR * count // max(counts))
        last = "" if width == 1 else f" to {first + width - 1:>7,}"
        yield f"  {first:>7,}{last}{count:>9,}  {bar}".rstrip()


def _shown(name: str, split: EncodedSplit, prepared: PreparedData, rows: int) -> Iterable[str]:
    for number, row in enumerate(split.rows[:rows], start=1):
        text = show(row, prepared.tokenizer)
        cut = f"… ({len(text):,} characters)" if len(text) > SHOWN_CHARS else ""
        yield ""
        yield f"{name}, row {number} (loss on the text between « and »)"
        yield text[:SHOWN_CHARS] + cut
