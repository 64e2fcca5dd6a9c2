"""General text: what a model could before it was tuned, to measure what tuning makes it forget.

Plain text that is not about the task, packed into windows of one length, with loss on every token but
a window's first. Knows where the text lies and what the task's rows say; judges nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sweeper.builtin.docstring_pairs import first_sentence, normalised
from sweeper.builtin.stdlib_text import HELD_OUT_MODULES, documented
from sweeper.config.settings import EMBEDDED, GeneralTextSettings, sources
from sweeper.core.errors import DataError
from sweeper.data.encode import encode_text
from sweeper.data.examples import DropCounts, Example
from sweeper.data.row_formats import to_examples
from sweeper.data.sources import GENERAL_SPLIT, GENERAL_TEXT, read_source
from sweeper.data.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_WINDOWS = 8
"""Of fewer no interval is worth its name."""


def general_rows(
    settings: GeneralTextSettings,
    task: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
) -> list[Tokens]:
    """The first whole windows of the general text, at most `tokens` of it.

    Args:
        settings: with a source.
        task: examples of every split; a document that one of them gives as its answer, or whose first
            sentence it gives, is left out.
        tokenizer: the base's.
        limit: the model's positions, or None where it has no limit.

    Raises:
        DataError: the source cannot be read, is no text or too short, or the window does not fit.
    """
    if limit is not None and settings.window > limit:
        raise DataError(
            f"{GENERAL_TEXT}.window={settings.window}: the model has {limit} positions; give {limit} "
            "or less"
        )
    answers = {normalised(example.completion) for example in task}
    texts = [
        text
        for text in _documents(settings)
        if answers.isdisjoint((normalised(text), normalised(first_sentence(text))))
    ]
    rows = encode_text(texts, tokenizer, settings.window, settings.tokens)
    whole = [row for row in rows if len(row["input_ids"]) == settings.window]
    kept = whole[: settings.tokens // settings.window]
    if len(kept) < MIN_WINDOWS:
        raise DataError(
            f"{GENERAL_TEXT}: {len(kept)} windows of {settings.window} tokens, and at least "
            f"{MIN_WINDOWS} are needed; give a longer text, more tokens or a smaller window"
        )
    return kept


def digest(rows: Sequence[Tokens]) -> str:
    """sha256 over the windows' tokens: losses on windows of one digest compare."""
    ids = [row["input_ids"] for row in rows]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _documents(settings: GeneralTextSettings) -> list[str]:
    (source,) = sources(settings.source)
    if source.path == EMBEDDED:
        return embedded_documents()
    ledger = DropCounts()
    rows = read_source(source, GENERAL_SPLIT, ledger)
    examples = to_examples(rows, "text", source.columns or {}, ledger)
    if not examples:
        reasons = "; ".join(f"{count} × {why}" for why, count in ledger.total.items())
        raise DataError(
            f"{GENERAL_TEXT}.source={source.path}: holds no text ({reasons or 'no rows'}); give plain "
            "text, or rows with a column `text`"
        )
    return [example.completion for example in examples]


def embedded_documents() -> list[str]:
    """Docstrings of the running Python's modules that the embedded base was not pre-trained on.

    They are of the kind it was pre-trained on, and in no split of the embedded data set, which takes
    its rows from other modules.
    """
    return list(dict.fromkeys(found.docstring for found in documented(HELD_OUT_MODULES)))
