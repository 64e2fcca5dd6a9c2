"""General text: plain text unrelated to the task, to measure what fine-tuning makes a model forget.

The text is packed into windows of one length, with loss on every token but a window's first. This
module reads the text and excludes the task's own answers. It computes no loss.
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
"""Minimum number of windows. With fewer, a confidence interval would be meaningless."""


def general_rows(
    settings: GeneralTextSettings,
    task: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
) -> list[Tokens]:
    """Return the first full windows of the general text, at most `settings.tokens` tokens.

    Args:
        settings: General-text settings with a source.
        task: Examples of every split. A document is excluded if it, or its first sentence, is the
            answer of one of them.
        tokenizer: Tokenizer of the base model.
        limit: Number of positions of the model in tokens, or None if it has no limit.

    Raises:
        DataError: The source cannot be read, holds no text or too little, or the window exceeds the
            model's positions.
    """
    if limit is not None and settings.window > limit:
        raise DataError(
            f"{GENERAL_TEXT}.window={settings.window}: the model has only {limit} positions. Use "
            f"{limit} or less."
        )
    # Text that the task teaches would measure the task, not forgetting.
    answers = {normalised(example.completion) for example in task}
    texts = [
        text
        for text in _documents(settings)
        if answers.isdisjoint((normalised(text), normalised(first_sentence(text))))
    ]
    rows = encode_text(texts, tokenizer, settings.window, settings.tokens)
    # Full windows only, so that every window's loss is a sum over the same number of tokens.
    whole = [row for row in rows if len(row["input_ids"]) == settings.window]
    kept = whole[: settings.tokens // settings.window]
    if len(kept) < MIN_WINDOWS:
        raise DataError(
            f"{GENERAL_TEXT}: the text fills {len(kept)} windows of {settings.window} tokens, and at "
            f"least {MIN_WINDOWS} are needed. Use a longer text, more tokens or a smaller window."
        )
    return kept


def digest(rows: Sequence[Tokens]) -> str:
    """Return the sha256 over the windows' tokens. Losses are comparable if their digests are equal."""
    ids = [row["input_ids"] for row in rows]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _documents(settings: GeneralTextSettings) -> list[str]:
    (source,) = sources(settings.source)
    if source.path == EMBEDDED:
        return embedded_documents()
    drops = DropCounts()
    rows = read_source(source, GENERAL_SPLIT, drops)
    examples = to_examples(rows, "text", source.columns or {}, drops)
    if not examples:
        reasons = "; ".join(f"{count} × {why}" for why, count in drops.total.items())
        raise DataError(
            f"{GENERAL_TEXT}.source={source.path}: holds no text ({reasons or 'no rows'}). Use plain "
            "text, or rows with a column `text`."
        )
    return [example.completion for example in examples]


def embedded_documents() -> list[str]:
    """Return docstrings of the standard-library modules that the embedded base did not train on.

    The modules were held out of pre-training to measure the base. The embedded data set takes its rows
    from other modules, so no split contains these docstrings.
    """
    # Two of the 225 docstrings (68 characters) also occur in the pre-training text.
    return list(dict.fromkeys(found.docstring for found in documented(HELD_OUT_MODULES)))
