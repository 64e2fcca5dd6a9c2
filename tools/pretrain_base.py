"""Rebuild the embedded base model from the running Python's standard library.

    python tools/pretrain_base.py --out FOLDER
    python tools/pretrain_base.py --out FOLDER --hidden 256     # 3.5 times the parameters

Knows the recipe: which text, which tokenizer, which architecture, which schedule; and measures
what it writes on the model card. Does not know the task: its rows are kept out of the text, and
nothing here is chosen by their loss. Needs torch and transformers, no network.

Same Python build, seed, threads and processor give the same weights; elsewhere the text and the
rounding of bfloat16 differ a little, which is why the package ships the built files.
"""

import math
import platform
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import Progress, TextColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sweeper.builtin.docstring_pairs import docstring_pairs, first_sentence, normalised
from sweeper.builtin.stdlib_text import (
    HELD_OUT_MODULES,
    documented,
    language_reference,
    pretraining_modules,
)
from sweeper.core.errors import SweeperError
from tools.guarded_build import CARD, built_folder, errors_as_sentences

VOCABULARY = 2048
HIDDEN = 128
CONTEXT = 512
SEQUENCE = 128
BATCH = 8
EOS, PAD = "<|endoftext|>", "<|pad|>"

WARMUP_SHARE, DECAY_SHARE = 0.05, 0.4
MUON_LR, ADAMW_LR = 0.02, 5e-3
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
LOSS_WINDOW = 100

REBUILD_COMMAND = "python tools/pretrain_base.py"


@dataclass(frozen=True)
class Text:
    """Pre-training documents, one docstring or reference topic each.

    `held_out` comes from modules, and has documents, that `train` has none of. `task_repeats`
    counts docstrings left out because their first sentence is the output of a task row.
    """

    train: list[str]
    held_out: list[str]
    task_repeats: int


@dataclass(frozen=True)
class BaseReport:
    """What one build measured.

    Losses are nats a token: `train_loss` over the last steps, `held_out_loss` on `Text.held_out`
    with the weights as saved. `text_tokens` counts one epoch, `date` is in UTC.
    """

    hidden: int
    parameters: int
    text_tokens: int
    trained_tokens: int
    steps: int
    seconds: float
    threads: int
    seed: int
    train_loss: float
    held_out_loss: float
    held_out_bits_per_byte: float
    python: str
    torch: str
    transformers: str
    date: str


class UnfitWidth(SweeperError):
    """The width of the model is one that 4-bit kernels do not take."""


def build_base(
    out: Path,
    *,
    tokens: int = 2_600_000,
    seed: int = 0,
    threads: int | None = None,
    hidden: int = HIDDEN,
) -> BaseReport:
    """Train tokenizer and model, and put them at `out` as a Hugging Face folder.

    `tokens` are training tokens, repeats included (the text has about 0.6 million); `threads`
    are torch's, by default as many as it already uses; `hidden` is the width of the model. An
    earlier base at `out` is replaced once the new one is complete; OccupiedFolder if `out` is
    anything else, UnfitWidth if the width does not fit 4-bit kernels.
    """
    _refuse_unfit_width(hidden)
    with (
        built_folder(out, "an embedded base", REBUILD_COMMAND) as fresh,
        _session(seed, threads or torch.get_num_threads()),
    ):
        started = time.perf_counter()
        text = pretraining_text()
        tokenizer = train_tokenizer(text.train)
        model = new_model(tokenizer, hidden)
        stream = _encode(tokenizer, text.train)
        steps = max(1, tokens // (SEQUENCE * BATCH))
        train_loss = _train(model, stream, steps, seed)
        _round_weights(model)  # what is measured from here on is what is saved
        held_out_loss, bits = held_out_losses(model, tokenizer, text.held_out)
        report = BaseReport(
            hidden=hidden,
            parameters=model.num_parameters(),
            text_tokens=sum(map(len, stream)),
            trained_tokens=steps * SEQUENCE * BATCH,
            steps=steps,
            seconds=time.perf_counter() - started,
            threads=torch.get_num_threads(),
            seed=seed,
            train_loss=train_loss,
            held_out_loss=held_out_loss,
            held_out_bits_per_byte=bits,
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            date=datetime.now(UTC).date().isoformat(),
        )
        model.to(torch.bfloat16).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / CARD).write_text(model_card(report, text), encoding="utf-8")
    return report


def pretraining_text() -> Text:
    """Docstrings of the modules outside the task, and the language reference for training.

    Each document occurs once: the library repeats some word for word, also across modules.
    """
    outputs = {
        normalised(row["output"]) for rows in docstring_pairs().rows.values() for row in rows
    }
    train, held_out, repeats = dict.fromkeys(language_reference()), dict[str, None](), 0
    for source in documented(pretraining_modules()):
        if normalised(first_sentence(source.docstring)) in outputs:
            repeats += 1
        elif source.module in HELD_OUT_MODULES:
            held_out[source.docstring] = None
        else:
            train[source.docstring] = None
    return Text(list(train), [text for text in held_out if text not in train], repeats)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2,048 tokens: any text round-trips; no token is added by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, hidden: int = HIDDEN) -> LlamaForCausalLM:
    """Untrained Llama in float32, of 1.1M parameters at the default width.

    Every width is a multiple of 32: bitsandbytes' 4-bit kernels on CPU assert it.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def held_out_losses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> tuple[float, float]:
    """Loss of `model` on `texts`, packed as in training: nats a token, and bits a byte."""
    documents = _encode(tokenizer, texts)
    rows = _packed([token for document in documents for token in document])
    with torch.no_grad():
        sums = [_loss(model, batch).item() * len(batch) for batch in torch.split(rows, BATCH)]
    loss = sum(sums) / len(rows)
    tokens = sum(map(len, documents))
    return loss, loss / math.log(2) * tokens / sum(len(text.encode()) for text in texts)


def model_card(report: BaseReport, text: Text) -> str:
    """README.md of the base: Hub front matter, then data, recipe, measured figures and limits."""
    epochs = report.trained_tokens / report.text_tokens
    shipped = report.hidden == HIDDEN
    title = "Embedded base model" if shipped else "Larger base model, for benchmarks"
    width = "" if shipped else f" --hidden {report.hidden}"
    rebuild = f"{REBUILD_COMMAND} --out FOLDER{width}"
    shape = f"hidden {report.hidden}, feed-forward {3 * report.hidden}, 4 layers, 4 heads, tied"
    return f"""\
---
language: en
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
tags: [llama, tiny, from-scratch]
---

# {title}

A Llama-architecture language model of {report.parameters:,} parameters, pre-trained from scratch on
the text that every Python installation carries. It exists so that a fine-tuning sweep can run
offline, on a laptop's CPU, on a base that really learned something.

Rebuild: `{rebuild}`, in a checkout of sweeper (a few minutes on two cores).

## Data

Docstrings of the standard library's modules, except those that the embedded data set takes its
rows from, and the language reference (`pydoc_data/topics.py`) of Python {report.python}:
{len(text.train):,} documents, {report.text_tokens:,} tokens. Left out as well:
{text.task_repeats} docstrings that begin with a sentence of the data set, and
{len(text.held_out)} docstrings of held-out modules ({", ".join(sorted(HELD_OUT_MODULES))}).
Each document ends with `{EOS}`.

The text is part of Python: copyright Python Software Foundation, PSF License Version 2. Its terms
go with the text that the model may repeat.

## Recipe

| | |
|-|-|
| tokenizer | byte-level BPE, {VOCABULARY:,} tokens, trained on the same text |
| architecture | {shape}, context {CONTEXT} |
| batches | {BATCH} sequences of {SEQUENCE} tokens, documents shuffled and packed anew every epoch |
| optimizer | Muon (rate {MUON_LR}) for the layers' matrices, AdamW ({ADAMW_LR}) for the rest |
| schedule | {WARMUP_SHARE:.0%} warm-up, constant, {DECAY_SHARE:.0%} linear decay to zero |
| precision | float32 weights, bfloat16 autocast; saved as bfloat16 |

## Measured in this build

| figure | value |
|-|-|
| trained tokens | {report.trained_tokens:,} ({epochs:.1f} epochs) |
| steps | {report.steps:,} |
| training loss, last {LOSS_WINDOW} steps | {report.train_loss:.3f} nats/token |
| held-out loss, saved weights | {report.held_out_loss:.3f} nats/token |
| the same | {report.held_out_bits_per_byte:.3f} bits/byte |
| untrained | {math.log(VOCABULARY):.3f} nats/token |
| time | {report.seconds:.0f} s, {report.threads} CPU threads |
| seed | {report.seed} |
| versions | Python {report.python}, torch {report.torch}, transformers {report.transformers} |
| date | {report.date} |

## Limits

It writes fluent, generic documentation phrases and knows no facts. Positions beyond
{SEQUENCE} were never trained, though the context allows {CONTEXT}. Its use is to show how
fine-tuning settings compare; its text is not for anything else.
"""


def _loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean next-token loss of `batch`, token ids (rows, SEQUENCE)."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss: Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


def _train(model: LlamaForCausalLM, stream: list[list[int]], steps: int, seed: int) -> float:
    """Train in place; returns the mean loss of the last `LOSS_WINDOW` steps."""
    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        for optimizer in optimizers
    ]
    losses: deque[float] = deque(maxlen=LOSS_WINDOW)
    model.set_attn_implementation("eager")  # a quarter faster than sdpa's backward at this size
    model.train()
    with _progress(steps) as advance:
        for batch in _batches(stream, steps, seed):
            loss = _loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad()
            losses.append(loss.item())
            advance(sum(losses) / len(losses))
    model.eval()
    return sum(losses) / len(losses)


def _round_weights(model: LlamaForCausalLM) -> None:
    """Round to bfloat16 in place, still float32; the rotary frequencies, never saved, stay."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms.

    Muon orthogonalizes a matrix's update, which has no meaning for a lookup table or a vector.
    """
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    taken = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in taken]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY),
    ]


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at `step`: warm-up, stable, decay."""
    warmup, decay = max(1, WARMUP_SHARE * steps), max(1, DECAY_SHARE * steps)
    return min(1.0, (step + 1) / warmup, max(0, steps - step) / decay)


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text with end-of-text after it, so that the base learns where to stop."""
    ids: list[list[int]] = tokenizer(list(texts), verbose=False).input_ids
    return [[*document, tokenizer.eos_token_id] for document in ids]


def _packed(tokens: list[int]) -> Tensor:
    """Whole rows of SEQUENCE tokens, the remainder dropped: int64 (rows, SEQUENCE)."""
    rows = len(tokens) // SEQUENCE
    return torch.tensor(tokens[: rows * SEQUENCE]).view(rows, SEQUENCE)


def _batches(stream: list[list[int]], steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of (BATCH, SEQUENCE); each epoch packs the documents in a new order."""
    shuffle = random.Random(seed).shuffle
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            documents = stream.copy()
            shuffle(documents)
            rows = list(_packed([token for document in documents for token in document]))
            shuffle(rows)  # a long document's rows would otherwise share a batch
            whole = len(rows) - len(rows) % BATCH
            batches = list(torch.split(torch.stack(rows[:whole]), BATCH))
        yield batches.pop()


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[float], None]]:
    """A bar on stderr; yields what to call after each step with the recent loss."""
    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("pre-training", total=steps, loss=math.nan)
        yield lambda loss: bar.update(task, advance=1, loss=loss)


@contextmanager
def _session(seed: int, threads: int) -> Iterator[None]:
    """Seeded torch on `threads` threads; the caller's generator and threads come back after."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def _refuse_unfit_width(hidden: int) -> None:
    if hidden % 32 or hidden <= 0:
        raise UnfitWidth(
            f"the width must be a multiple of 32, because 4-bit kernels on CPUs need that: {hidden=}. "
            "Give 128 or 256."
        )


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 2_600_000,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    hidden: Annotated[int, typer.Option(help="Width of the model, a multiple of 32.")] = HIDDEN,
) -> None:
    """Pre-train the embedded base model again from the standard library's text (minutes)."""
    with errors_as_sentences():
        build_base(out, tokens=tokens, seed=seed, hidden=hidden)


if __name__ == "__main__":
    typer.run(main)
