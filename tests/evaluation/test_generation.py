"""Greedy answers against a loop that takes the most likely token, one prompt at a time."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from sweeper.core.errors import ConfigError
from sweeper.evaluation.generation import GeneratedAnswers, generate, greedy_config
from sweeper.modeling.base_model import LoadedBase, load_base
from tests.conftest import make_settings

LIMIT = 24
BEGINNINGS = (
    "Return the",
    "The file object is",
    "Raises an exception if the",
    "This function returns a list of",
    "A class that",
    "If the argument is omitted, the default value",
    "Open a connection to the server and",
    "The module defines the following functions:",
)


@pytest.fixture(scope="module")
def base() -> LoadedBase:
    """The embedded base in fp32."""
    settings = make_settings("quantization=none")
    return load_base(settings.model, settings.quantization, trained=False)


@pytest.fixture(scope="module")
def prompts(base: LoadedBase) -> list[list[int]]:
    """Eight beginnings of different length, in the words that the base was trained on."""
    return [base.tokenizer(text)["input_ids"] for text in BEGINNINGS]


def by_hand(base: LoadedBase, prompt: list[int], limit: int = LIMIT) -> list[int]:
    """Without cache, padding and generate(): the argmax, again and again."""
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def greedy(base: LoadedBase, prompts: list[list[int]]) -> list[list[int]]:
    """LIMIT tokens after each prompt, by hand."""
    return [by_hand(base, prompt) for prompt in prompts]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_are_the_argmax_for_every_batch_size(
    base: LoadedBase,
    prompts: list[list[int]],
    greedy: list[list[int]],
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Left padding, the cache, and neighbours that end earlier change no text."""
    counts = Counter(token for tokens in greedy for token in set(tokens))
    end = next(token for token, count in counts.most_common() if count < len(greedy))
    monkeypatch.setattr(base.model, "generation_config", GenerationConfig(eos_token_id=end))
    found = generate(base.model, base.tokenizer, prompts, LIMIT, batch_size)
    for tokens, answer in zip(greedy, found.answers, strict=True):
        kept = tokens[: tokens.index(end)] if end in tokens else tokens
        assert answer.text == base.tokenizer.decode(kept, skip_special_tokens=True)
        assert answer.tokens == len(kept) + (end in tokens)
        assert answer.ended == (end in tokens)
    assert {answer.ended for answer in found.answers} == {True, False}  # both cases were seen
    assert found.tokens_per_second > 0


def test_the_limit_cuts(base: LoadedBase, prompts: list[list[int]]) -> None:
    """An answer that does not end has max_new_tokens tokens and is marked as cut."""
    found = generate(base.model, base.tokenizer, prompts, 2, 8)
    assert [answer.tokens for answer in found.answers] == [2] * 8
    assert not any(answer.ended for answer in found.answers)


def test_the_models_own_sampling_is_neither_used_nor_lost(
    base: LoadedBase, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generation config that samples and penalises changes nothing, warns of nothing, and stays."""
    plain = generate(base.model, base.tokenizer, prompts[:3], 8, 3)
    loud = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=3, repetition_penalty=5.0
    )
    monkeypatch.setattr(base.model, "generation_config", loud)
    monkeypatch.setattr(base.model.config, "use_cache", False)
    base.model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = generate(base.model, base.tokenizer, prompts[:3], 8, 3)
    was_training = base.model.training
    base.model.eval()
    assert found.texts == plain.texts
    assert was_training
    assert base.model.generation_config is loud
    assert base.model.config.use_cache is False


def test_generation_stops_at_every_end_token(
    base: LoadedBase, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chat models end a turn with another token than a text: both end an answer."""
    first = by_hand(base, prompts[0], 1)[0]
    monkeypatch.setattr(base.model, "generation_config", GenerationConfig(eos_token_id=[first]))
    config = greedy_config(base.model, base.tokenizer, 5)
    assert set(config.eos_token_id) == {first, base.tokenizer.eos_token_id}
    (answer,) = generate(base.model, base.tokenizer, prompts[:1], 5, 1).answers
    assert (answer.text, answer.tokens, answer.ended) == ("", 1, True)


def test_adapter_and_its_base_answer_from_one_model(
    base: LoadedBase, prompts: list[list[int]]
) -> None:
    """The tuned model answers with the adapter, the base within disable_adapter without it."""
    untuned = generate(base.model, base.tokenizer, prompts[:4], 12, 4)
    config = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(base.model, config)
    try:
        tuned = generate(model, base.tokenizer, prompts[:4], 12, 4)
        with model.disable_adapter():
            again = generate(model, base.tokenizer, prompts[:4], 12, 4)
    finally:
        model.unload()
    assert again.texts == untuned.texts
    assert tuned.texts != untuned.texts


def test_prompts_that_do_not_fit_are_refused(base: LoadedBase) -> None:
    """No prompt is cut in silence: the message names the key, the figures and what is possible."""
    with pytest.raises(ConfigError, match=r"max_new_tokens=20: the longest prompt has 500 .* 12"):
        generate(base.model, base.tokenizer, [[5] * 500], 20, 1)


def test_no_prompts_no_answers(base: LoadedBase) -> None:
    """An empty list is answered by an empty list."""
    assert (
        generate(base.model, base.tokenizer, [], 5, 2).answers == GeneratedAnswers((), 0.0).answers
    )
