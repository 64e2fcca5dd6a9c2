"""The evaluator against independent computations."""

from __future__ import annotations

import math

import pytest
import torch

from sweeper.data.encode import encode_evaluation
from sweeper.data.splits import load_splits
from sweeper.data.tokens import IGNORED, PaddingCollator, Tokens
from sweeper.evaluation.token_loss import LossSum, evaluate_examples, target_bytes, total
from sweeper.modeling.base_model import LoadedBase, load_base
from tests.conftest import make_settings
from tests.data.samples import example, make_data

Judged = tuple[LoadedBase, list[Tokens], PaddingCollator]


@pytest.fixture(scope="module", params=["none", "nf4"])
def judged(request: pytest.FixtureRequest) -> Judged:
    """The embedded base, unquantized and in NF4, with 60 validation rows of mixed length."""
    settings = make_settings(f"quantization={request.param}")
    base = load_base(settings.model, settings.quantization, trained=False)
    examples = load_splits(settings.data).examples["validation"][:60]
    rows = encode_evaluation(examples, base.tokenizer, settings.data, None, 512).rows
    return base, rows, PaddingCollator(base.tokenizer.pad_token_id)


def test_loss_is_the_same_for_every_batch_size(judged: Judged) -> None:
    """Batch sizes 1, 8 and 32 agree to 1e-5: sums over tokens, not means over batches."""
    base, rows, collator = judged
    losses = [
        total(evaluate_examples(base.model, rows, collator, size)).mean for size in (1, 8, 32)
    ]
    assert max(losses) - min(losses) < 1e-5


def test_loss_of_an_example_is_its_own(judged: Judged) -> None:
    """Neither the order of rows, nor their neighbours, nor chunks move an example's loss by 1e-5."""
    base, rows, collator = judged
    alone = evaluate_examples(base.model, rows[:12], collator, 1)
    backwards = evaluate_examples(base.model, rows[:12][::-1], collator, 12, chunk_size=7)[::-1]
    assert len(alone) == 12
    for one, other in zip(alone, backwards, strict=True):
        assert one.tokens == other.tokens
        assert one.mean == pytest.approx(other.mean, abs=1e-5)


def test_loss_is_sum_of_nll_over_sum_of_tokens(judged: Judged) -> None:
    """The figure equals a hand-rolled sum over single unpadded examples."""
    base, rows, collator = judged
    nll, tokens = 0.0, 0
    for row in rows[:10]:
        with torch.no_grad():
            logits = base.model(torch.tensor([row["input_ids"]])).logits[0].float()
        for position, label in enumerate(row["labels"]):
            if label != IGNORED:
                nll -= float(torch.log_softmax(logits[position - 1], -1)[label])
                tokens += 1
    loss = total(evaluate_examples(base.model, rows[:10], collator, 4))
    assert loss.tokens == tokens
    assert loss.mean == pytest.approx(nll / tokens, abs=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-4)


def test_batch_means_would_depend_on_the_batch_size(judged: Judged) -> None:
    """The trap this evaluator avoids is real: means of batch means differ by more than 0.01 nats."""
    base, rows, collator = judged

    def mean_of_means(size: int) -> float:
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        means = [
            total(evaluate_examples(base.model, batch, collator, size)).mean for batch in batches
        ]
        return sum(means) / len(means)

    assert abs(mean_of_means(1) - mean_of_means(60)) > 0.01


def test_evaluation_leaves_the_mode_as_it_was(judged: Judged) -> None:
    """A model in training is in training afterwards."""
    base, rows, collator = judged
    base.model.train()
    evaluate_examples(base.model, rows[:2], collator, 2)
    assert base.model.training
    base.model.eval()


def test_bytes_are_those_of_the_completions(judged: Judged) -> None:
    """Targets decode to the completions' UTF-8 bytes; the end-of-text token counts as none."""
    base, _, _ = judged
    completions = (
        "Return a list.",
        " indented,\n  with spaces ",
        "naïve 日本 – “ok” 🎈",
        "x , y .",
    )
    examples = [example("Say it.", completion) for completion in completions]
    rows = encode_evaluation(examples, base.tokenizer, make_data(), None, 512).rows
    expected = [len(completion.encode("utf-8")) for completion in completions]
    assert target_bytes(rows, base.tokenizer) == expected


def test_bits_per_byte_is_nll_in_bits_over_bytes() -> None:
    """8 ln 2 nats over 4 bytes are 2 bits per byte, summed over a split before dividing."""
    parts = [LossSum(6 * math.log(2), 3, 1), LossSum(2 * math.log(2), 1, 3)]
    assert total(parts).bits_per_byte == pytest.approx(2)
    assert total(parts).tokens == 4
    assert total([*parts, LossSum(1.0, 1)]).bytes is None
