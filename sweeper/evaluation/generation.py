"""Greedy answers: what a model writes after a prompt when nothing is left to chance.

Takes prompts as token ids; knows neither templates nor scores.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import GenerationConfig

from sweeper.core.errors import ConfigError
from sweeper.evaluation.token_loss import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GeneratedAnswer:
    """What a model wrote after one prompt."""

    text: str
    """Without special tokens."""
    tokens: int
    """Generated tokens, the end-of-text token included."""
    ended: bool
    """Whether the model ended its text itself; otherwise it was cut at max_new_tokens."""


@dataclass(frozen=True)
class GeneratedAnswers:
    """The answers to a list of prompts, in its order, and how long they took together."""

    answers: tuple[GeneratedAnswer, ...]
    seconds: float

    @property
    def texts(self) -> list[str]:
        """The answers' texts."""
        return [answer.text for answer in self.answers]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens (padding not counted) per second of wall time."""
        return sum(answer.tokens for answer in self.answers) / max(self.seconds, 1e-9)


@torch.no_grad()
def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    compute_dtype: torch.dtype = torch.float32,
    end_token_ids: Collection[int] = (),
) -> GeneratedAnswers:
    """Answer each prompt greedily; in fp32 the same texts for every batch size.

    Every step takes the most likely token: sampling, beams and the penalties that a model's own
    generation config may ask for are off, so that base and tuned model are asked the same way. For the
    untuned base of a PEFT model call this inside `with model.disable_adapter():`. The model's mode
    (train or eval) and its configs are left as they were.

    Args:
        prompts: token ids, begin-of-text included where the template has it.
        max_new_tokens: where an answer that does not end is cut.
        batch_size: prompts of similar length are padded on the left and answered together.
        end_token_ids: what ends an answer besides the model's and the tokenizer's own end tokens (a chat
            template's end of turn).

    Raises:
        ConfigError: a prompt and max_new_tokens do not fit the model's positions.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = greedy_config(base, tokenizer, max_new_tokens, end_token_ids)
    _require_room(base, prompts, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, GeneratedAnswer] = {}
    started = time.monotonic()
    with _prepared(base, config), autocast(base.device, compute_dtype):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = _padded_left([prompts[index] for index in indices], config.pad_token_id)
            ids, mask = (values.to(base.device) for values in batch)
            written = base.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
            answers |= {
                index: _answer(tokens, config.eos_token_id, tokenizer)
                for index, tokens in zip(indices, written, strict=True)
            }
    seconds = time.monotonic() - started
    return GeneratedAnswers(tuple(answers[index] for index in range(len(prompts))), seconds)


def greedy_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    end_token_ids: Collection[int] = (),
) -> GenerationConfig:
    """Plain greedy decoding that stops at every end token that model, tokenizer or template name."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    named = own if isinstance(own, list) else [own]
    ends = sorted(
        {end for end in (*named, *end_token_ids, tokenizer.eos_token_id) if end is not None}
    )
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )


@contextmanager
def _prepared(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """In eval mode, with `config` in place of the model's own.

    As an argument of generate() it would be filled up with the model's own values.
    """
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


def _require_room(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(prompt) for prompt in prompts), default=0)
    if positions is not None and longest + max_new_tokens > positions:
        raise ConfigError(
            [
                f"evaluation.generation.max_new_tokens={max_new_tokens}: the longest prompt has "
                f"{longest} tokens and the model {positions} positions; give at most "
                f"{max(positions - longest, 0)}, or shorten the prompts"
            ]
        )


def _padded_left(
    prompts: Sequence[Sequence[int]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, each [batch, longest]: generation continues at the right end."""
    length = max(len(prompt) for prompt in prompts)
    ids = [[pad_token_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _answer(
    tokens: Sequence[int], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> GeneratedAnswer:
    """One row of generate(): what follows the first end token is padding."""
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    kept = tokens if end is None else tokens[: end + 1]
    text = tokenizer.decode(
        kept if end is None else kept[:-1],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return GeneratedAnswer(text, len(kept), end is not None)
