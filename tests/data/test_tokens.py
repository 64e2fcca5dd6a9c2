"""Token ids, the loss mask at its borders, lengths, blocks and padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_pt_utils import LengthGroupedSampler

from sweeper.config.settings import DataSettings
from sweeper.core.errors import DataError
from sweeper.data.data_card import show
from sweeper.data.encode import encode_evaluation, encode_prompts, encode_train, quantile
from sweeper.data.examples import Example
from sweeper.data.templates import choose_template
from sweeper.data.tokens import IGNORED, PaddingCollator, TokenizerSetup, encode_prompt, tokenize
from tests.conftest import make_settings
from tests.data.chat import CHATML, book, byte_level, metaspace, phi3, talk, task

BYTES = byte_level()
WORDS = metaspace()


NO_THANKS = (
    "{% for message in messages %}{% if message.content == 'Thanks' %}"
    "{{ raise_exception('no thanks') }}{% endif %}{% endfor %}" + CHATML
)


def _data(**changes: Any) -> DataSettings:
    """Settings under which a few rows may be lost, except where a test says otherwise."""
    return make_settings().data.model_copy(update={"max_bad_fraction": 0.9, **changes})


def _row(example: Example, tokenizer: Any, template: str = "plain") -> dict[str, list[int]]:
    chosen = choose_template(template, example.format, tokenizer)
    (row,) = tokenize(example, TokenizerSetup(tokenizer), chosen, "completions")
    return row


def _learned(row: dict[str, list[int]]) -> list[int]:
    return [label for label in row["labels"] if label != IGNORED]


def test_token_never_reaches_from_prompt_into_answer() -> None:
    """Where the tokenizer would merge "foo" and "bar" into one token, the text is cut between them."""
    assert BYTES.decode(BYTES("foobar")["input_ids"][:1]) == "foobar", "the merge exists"
    row = _row(talk("foo", "bar"), BYTES)
    assert row["input_ids"] == [
        *BYTES("foo")["input_ids"],
        *BYTES("bar")["input_ids"],
        BYTES.eos_token_id,
    ]
    assert show(row, BYTES) == "foo«bar</s>»"


def test_chat_token_over_the_border_belongs_to_the_answer() -> None:
    """A chat template's ids are not cut; a token that holds some of the answer carries loss."""
    source = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    tokenizer = byte_level(chat_template=source + "{% endif %}{% endfor %}")
    row = _row(talk("Hi foo", "bar."), tokenizer, "chat")
    assert row["input_ids"] == tokenizer("Hi foobar.</s>")["input_ids"]
    assert show(row, tokenizer) == "Hi« foobar.</s>»"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12), st.text(min_size=1, max_size=12).filter(lambda text: text.strip()))
@pytest.mark.parametrize("tokenizer", [BYTES, byte_level(adds="bos"), WORDS], ids=["b", "bos", "m"])
def test_generation_starts_from_the_trained_prompt(
    tokenizer: Any, question: str, answer: str
) -> None:
    """For any texts: prompt ids = the row's ids without loss, and the rest is the answer and its end."""
    example = talk(question, answer)
    chosen = choose_template("instruction", "messages", tokenizer)
    row = _row(example, tokenizer, "instruction")
    prompt = encode_prompt(example, TokenizerSetup(tokenizer), chosen)
    count = len(prompt.input_ids)
    assert row["input_ids"][:count] == prompt.input_ids
    assert row["labels"] == [IGNORED] * count + row["input_ids"][count:]
    assert prompt.input_ids == tokenizer(prompt.text)["input_ids"]
    assert row["input_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("adds", ["", "bos", "bos eos", "eos"])
def test_one_begin_and_one_end_whatever_the_tokenizer_adds(make: Any, adds: str) -> None:
    """Tokenizers that add BOS or EOS by themselves give the same row: one end, at most one begin."""
    row = _row(talk("Hi?", "Yes."), make(adds=adds), "instruction")
    tokenizer = make(adds=adds)
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1
    assert row["input_ids"][0] == tokenizer.bos_token_id or "bos" not in adds
    assert row["input_ids"].count(tokenizer.bos_token_id) == ("bos" in adds)
    assert tokenizer.decode(_learned(row)).strip() == "Yes.</s>"


def test_end_carries_loss_where_padding_is_the_same_token() -> None:
    """pad == eos: the answer's end is learned, the padding is not."""
    tokenizer = byte_level(pad="</s>")
    rows = [_row(talk("Hi?", answer), tokenizer) for answer in ("Yes.", "A longer answer.")]
    batch = PaddingCollator(tokenizer.pad_token_id)(rows)
    end = tokenizer.eos_token_id
    assert ((batch["labels"] == end).sum(dim=1) == 1).all()
    assert (batch["attention_mask"].sum(dim=1).tolist()) == [len(row["input_ids"]) for row in rows]


def test_tokenizer_without_end_is_refused_unless_the_template_has_one() -> None:
    """Without an end-of-text token answers could never end; a chat template may bring its own."""
    with pytest.raises(DataError, match="no end-of-text token"):
        _row(talk("Hi?", "Yes."), byte_level(eos=None), "instruction")
    tokenizer = byte_level(eos=None, chat_template=CHATML)
    assert show(_row(talk("Hi?", "Yes."), tokenizer, "chat"), tokenizer).endswith(
        "«Yes.<|im_end|>»\n"
    )


def test_padding_is_masked_by_position() -> None:
    """Padding has no attention and no loss, even where the padding token is also a real one."""
    batch = PaddingCollator(pad_token_id=7)(
        [
            {"input_ids": [1, 7], "labels": [IGNORED, 7]},
            {"input_ids": [1, 2, 7], "labels": [1, 2, 7]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 7, 7], [1, 2, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 7, IGNORED], [1, 2, 7]]


def test_rows_can_be_batched_by_length() -> None:
    """train_sampling_strategy=group_by_length reads the lengths off the rows as they are."""
    rows = [_row(talk("Hi?", "Yes. " * (1 + 37 * at % 64)), BYTES) for at in range(64)]
    generator = torch.Generator().manual_seed(0)
    order = list(LengthGroupedSampler(2, dataset=rows, generator=generator))
    assert sorted(order) == list(range(64))
    assert _padding(rows, order) < 0.25 * _padding(rows, range(64))


def _padding(rows: list[dict[str, list[int]]], order: Sequence[int]) -> int:
    """Positions of padding in batches of two."""
    lengths = [len(rows[at]["input_ids"]) for at in order]
    return sum(abs(one - other) for one, other in zip(lengths[::2], lengths[1::2], strict=True))


@pytest.mark.parametrize("rstrip", [True, False], ids=["swallows", "does not"])
def test_end_carries_loss_whatever_it_swallows(rstrip: bool) -> None:
    """Loss on each answer and its end, also where the end takes the line break behind it along."""
    tokenizer = phi3(rstrip=rstrip)
    row = _row(talk("Hi?", "Yes.", "So?", "No."), tokenizer, "chat")
    assert tokenizer.decode(_learned(row)) == "Yes.<|end|>No.<|end|>"
    assert row["input_ids"] == tokenizer(PHI3_TALK)["input_ids"]
    prompt = encode_prompt(
        talk("Hi?", "Yes."),
        TokenizerSetup(tokenizer),
        choose_template("chat", "messages", tokenizer),
    )
    assert prompt.end_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert prompt.input_ids == row["input_ids"][: len(prompt.input_ids)]


PHI3_TALK = (
    "<|user|>\nHi?<|end|>\n<|assistant|>\nYes.<|end|>\n"
    "<|user|>\nSo?<|end|>\n<|assistant|>\nNo.<|end|>\n"
)


def test_marker_that_swallows_an_answers_blank_stays_in_the_prompt() -> None:
    """The model is given <|assistant|>, and never learns to write it."""
    tokenizer = phi3(rstrip=True)
    example = talk("Hi?", " Yes.")
    row = _row(example, tokenizer, "chat")
    assert tokenizer.decode(_learned(row)) == "Yes.<|end|>"
    chosen = choose_template("chat", "messages", tokenizer)
    prompt = encode_prompt(example, TokenizerSetup(tokenizer), chosen)
    assert tokenizer.decode(prompt.input_ids).endswith("<|assistant|>")


# Lengths

SHORT, LONG_ANSWER, LONG_PROMPT = (
    task("Add.", "", "3"),
    task("Add.", "", "3, " * 60),
    task("Add, " * 60, "", "3"),
)


def test_long_rows_are_dropped_and_counted() -> None:
    """over_length=drop: nothing is cut, and the count and the place say what is gone."""
    encoded = encode_train([SHORT, LONG_ANSWER], BYTES, _data(max_length=32), None)
    assert len(encoded.rows) == 1
    assert encoded.drops.counts["encode"] == {"longer than max_length": 1}
    assert encoded.drops.places["encode", "longer than max_length"] == ["task:1"]
    assert (encoded.examples, encoded.truncated, len(encoded.lengths)) == (2, 0, 2)


def test_truncated_rows_lose_their_end_and_are_counted() -> None:
    """over_length=truncate: the end goes, without a false end-of-text; a lost answer drops the row."""
    settings = _data(max_length=32, over_length="truncate")
    encoded = encode_train([SHORT, LONG_ANSWER, LONG_PROMPT], BYTES, settings, None)
    whole, cut = encoded.rows
    assert whole["input_ids"][-1] == BYTES.eos_token_id
    assert len(cut["input_ids"]) == 32
    assert BYTES.eos_token_id not in cut["input_ids"]
    assert encoded.truncated == 1
    assert encoded.drops.counts["encode"] == {"its answer lies beyond max_length": 1}


def test_auto_length_is_the_99th_percentile_in_eights_capped_by_the_model() -> None:
    """Nearest rank over all rows, rounded up to a multiple of 8, never beyond the model."""
    examples = [task("Add.", "", "3 " * count) for count in range(1, 201)]
    encoded = encode_train(examples, BYTES, _data(max_length="auto"), None)
    exact = sorted(encoded.lengths)[197]
    assert quantile(encoded.lengths, 0.99) == exact
    assert exact <= encoded.max_length < exact + 8
    assert encoded.max_length % 8 == 0
    assert encode_train(examples, BYTES, _data(max_length="auto"), 64).max_length == 64


def test_max_length_beyond_the_model_is_an_error() -> None:
    """It says how many positions there are."""
    with pytest.raises(DataError, match="max_length=128: the model has only 64 positions"):
        encode_train([SHORT], BYTES, _data(max_length=128), 64)


def test_evaluation_rows_follow_their_own_setting_for_length() -> None:
    """Longer than max_length is fine; beyond the model all are named, or dropped or cut as asked."""
    examples, settings = [SHORT, LONG_ANSWER, LONG_ANSWER], _data(max_length=32)
    encoded = encode_evaluation(examples, BYTES, settings, None, 32)
    assert len(encoded.rows) == 3
    with pytest.raises(
        DataError, match=r"2 of 3 .* 64 positions .*task:1 \(\d+\), task:1 \(\d+\)\."
    ):
        encode_evaluation(examples, BYTES, settings, 64, 32)
    dropped = encode_evaluation(examples, BYTES, settings, 64, 32, "drop")
    assert len(dropped.rows) == 1
    assert dropped.drops.total == {"longer than the model's positions": 2}
    cut = encode_evaluation(examples, BYTES, settings, 64, 32, "truncate")
    assert (len(cut.rows), cut.truncated, cut.max_length) == (3, 2, 64)


@pytest.mark.parametrize("max_length", [32, "auto"])
def test_rows_that_are_too_long_count_against_the_limit(max_length: Any) -> None:
    """More than max_bad_fraction of the rows beyond max_length, or beyond the model, is an error."""
    settings = _data(max_length=max_length, max_bad_fraction=0.01)
    with pytest.raises(DataError, match="1 of 2 training rows are longer than 32 tokens"):
        encode_train([SHORT, LONG_ANSWER], BYTES, settings, 32)


def test_refused_conversations_are_counted_and_an_empty_split_is_an_error() -> None:
    """What a chat template refuses is a reason; when nothing is left, the reasons are the message."""
    tokenizer = byte_level(chat_template=NO_THANKS)
    good, bad = talk("Hi?", "Yes."), talk("Thanks", "Yes.")
    encoded = encode_train([good, bad], tokenizer, _data(), None)
    reason = "the template chat rejects the row: no thanks"
    assert encoded.drops.counts["encode"] == {reason: 1}
    for encode in (encode_train, partial(encode_evaluation, block_length=32)):
        with pytest.raises(DataError, match=r"1 of 2 .* rows cannot be encoded"):
            encode([good, bad], tokenizer, _data(max_bad_fraction=0.01), None)
    with pytest.raises(DataError, match="2 × the template chat rejects the row"):
        encode_train([bad, bad], tokenizer, _data(), None)


def test_prompts_follow_each_examples_own_template() -> None:
    """Mixed sources: a conversation's prompt is chat, an Alpaca task's is the instruction form."""
    tokenizer = byte_level(chat_template=CHATML)
    chat, alpaca = encode_prompts([talk("Hi?", "Yes."), book("Once."), SHORT], tokenizer, _data())
    assert chat.text == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert alpaca.text == "### Instruction:\nAdd.\n\n### Response:\n"
    assert (chat.reference, alpaca.reference) == ("Yes.", "3")
    ends = tokenizer.convert_ids_to_tokens([chat.end_token_id, alpaca.end_token_id])
    assert ends == ["<|im_end|>", "</s>"], "each answer stops where training ended it"


# Plain text


def test_book_becomes_contiguous_blocks_with_loss_on_everything() -> None:
    """Blocks of max_length tokens, in order, without overlap; the short last one is kept."""
    text = "You are a helpful assistant. " * 20
    encoded = encode_train([book(text)], BYTES, _data(max_length=16), None)
    stream = [token for row in encoded.rows for token in row["input_ids"]]
    assert stream == BYTES(text)["input_ids"]
    assert {len(row["input_ids"]) for row in encoded.rows[:-1]} == {16}
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in encoded.rows)
    assert encoded.dropped == 0


def test_documents_are_joined_by_the_end_token_and_blocks_open_as_texts_do() -> None:
    """One end between two texts; a tokenizer that begins texts begins every block."""
    tokenizer = byte_level(adds="bos")
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    books = [book("foo bar. " * 9), book("bar. " * 9)]
    encoded = encode_train(books, tokenizer, _data(max_length=16), None)
    rows = [row["input_ids"] for row in encoded.rows]
    assert all(row[0] == begin and begin not in row[1:] and len(row) <= 16 for row in rows)
    assert sum(row.count(end) for row in rows) == 1


def test_block_of_one_token_is_left_out() -> None:
    """One token predicts nothing."""
    assert len(BYTES("foobar")["input_ids"]) == 1
    with pytest.raises(DataError, match="no training row is left"):
        encode_train([book("foobar")], BYTES, _data(max_length=16), None)


def test_conversations_and_books_mix() -> None:
    """Sources of both kinds make one split."""
    encoded = encode_train([SHORT, book("foobarfoobar")], BYTES, _data(max_length=64), None)
    assert [show(row, BYTES) for row in encoded.rows] == [
        "### Instruction:\nAdd.\n\n### Response:\n«3</s>»",
        "foobar«foobar»",
    ]
