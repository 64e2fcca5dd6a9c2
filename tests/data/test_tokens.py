"""Tokens, the loss mask, and padding."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from sweeper.data.formats import Example
from sweeper.data.tokens import IGNORED, Collator, encode
from sweeper.embedded import BASE_DIR


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    """The embedded base's tokenizer."""
    return AutoTokenizer.from_pretrained(BASE_DIR)


def test_only_the_completion_and_its_end_carry_loss(tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Labels cover exactly the answer and one end-of-text token; the prompt is ignored."""
    (row,) = encode([Example("### Question:\n", "Return it.")], tokenizer, 100).rows
    learned = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(learned) == "Return it." + tokenizer.eos_token
    assert row["input_ids"][-len(learned) :] == learned
    prompt = row["input_ids"][: -len(learned)]
    assert tokenizer.decode(prompt) == "### Question:\n"
    assert len(row["labels"]) == len(row["input_ids"])


def test_long_rows_are_dropped_and_counted(tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Nothing is cut: a row beyond max_length is left out, and the count says so."""
    examples = [Example("a", "b"), Example("a " * 100, "b")]
    encoded = encode(examples, tokenizer, 20)
    assert len(encoded.rows) == 1
    assert encoded.dropped == 1


def test_padding_is_masked_by_position() -> None:
    """Padding has no attention and no loss, even where the padding token is also a real one."""
    batch = Collator(pad_token_id=7)(
        [
            {"input_ids": [1, 7], "labels": [IGNORED, 7]},
            {"input_ids": [1, 2, 7], "labels": [1, 2, 7]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 7, 7], [1, 2, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 7, IGNORED], [1, 2, 7]]
