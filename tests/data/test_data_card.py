"""The data card counts right and shows what is learned."""

from __future__ import annotations

import json

import pytest

from sweeper.data.data_card import DataCard, LengthSummary, show
from sweeper.data.encode import encode_evaluation, encode_train
from sweeper.data.examples import DropCounts
from tests.conftest import make_settings
from tests.data.chat import byte_level, metaspace, talk, task


@pytest.fixture(scope="module")
def card() -> DataCard:
    """Five training examples, one of them too long, two for validation, and a broken row before."""
    tokenizer = byte_level()
    settings = make_settings("data.max_length=32", "data.max_bad_fraction=0.9").data
    train = [*(task("Add.", "", str(number)) for number in range(4)), task("Add. " * 50, "", "3")]
    validation = [task("Add.", "", "7"), task("Add.", "", "88")]
    drops = DropCounts()
    drops.drop("format", "no output", "train.jsonl:3")
    splits = {
        "train": encode_train(train, tokenizer, settings, 512),
        "validation": encode_evaluation(validation, tokenizer, settings, 512, 32),
    }
    return DataCard.of(splits, drops, tokenizer, "train.jsonl")


def test_card_counts_every_stage(card: DataCard) -> None:
    """Examples in, rows out, tokens with loss, and each reason with its place."""
    train = card.splits["train"]
    assert (train.examples, train.rows, train.truncated) == (5, 4, 0)
    assert train.dropped == {"encode": {"longer than max_length": 1}}
    assert train.target_tokens == 4 * 2, "a digit and the end, four times"
    assert train.target_share == pytest.approx(8 / train.tokens)
    assert train.made.max > 32 >= train.kept.max
    assert card.dropped == {"format": {"no output": 1}}
    assert ("all", "format", "no output", ["train.jsonl:3"]) in card.places
    assert ("train", "encode", "longer than max_length", ["task:1"]) in card.places


def test_card_is_json(card: DataCard) -> None:
    """The document survives JSON and holds the share of tokens with loss."""
    document = json.loads(json.dumps(card.document(), allow_nan=False))
    assert document["splits"]["train"]["rows"] == 4
    assert 0 < document["splits"]["validation"]["target_share"] < 1
    assert len(document["shown"]) == 3


def test_card_shows_three_rows_with_their_loss(card: DataCard) -> None:
    """First, middle and last training row, the answer between « and »."""
    prompt = "### Instruction:\nAdd.\n\n### Response:\n"
    assert card.shown == [f"{prompt}«{number}</s>»" for number in (0, 2, 3)]
    markdown = card.markdown()
    assert f"```text\n{prompt}«3</s>»\n```" in markdown
    assert "| all | format | no output | 1 | train.jsonl:3 |" in markdown
    assert "| train | 5 | 4 | " in markdown


def test_code_in_an_example_cannot_end_the_block() -> None:
    """A shown row with ``` in it gets a longer fence."""
    tokenizer = byte_level()
    settings = make_settings("data.max_length=64").data
    splits = {"train": encode_train([talk("Hi?", "```\nx\n```")], tokenizer, settings, 512)}
    assert "\n````text\n" in DataCard.of(splits, DropCounts(), tokenizer, "x").markdown()


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_shown_rows_keep_their_spaces(make: type) -> None:
    """Tokenizers that write spaces into tokens lose none at the border of the loss."""
    tokenizer = make()
    settings = make_settings("data.max_length=64", "data.template=plain").data
    (row,) = encode_train([talk("What is it?", " A text.")], tokenizer, settings, 512).rows
    assert show(row, tokenizer).removeprefix("<s>").strip() == "What is it?« A text.</s>»"


def test_lengths_are_nearest_ranks() -> None:
    """1 to 100: the quantiles are lengths that occur."""
    assert LengthSummary.of(range(1, 101)) == LengthSummary(1, 50.5, 50, 95, 99, 100)
