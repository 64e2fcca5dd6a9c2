"""Our trial against a plain transformers.Trainer + PEFT script: same settings, rows and order.

Both sides train the same LoRA on the same randomly initialised Llama (23M parameters, a vocabulary
of 32,768) in one process, alternating, once with short prompts and once with long ones. Compared are
non-padding tokens per second of the training loop, without loading, evaluation and saving. On a CPU
these are CPU seconds of one thread, so that whatever else the machine does counts for neither side.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from record import record
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sweeper.config.compose import compose
from sweeper.config.settings import LoraAdapter, RunSettings, validate
from sweeper.core.outcome import StopCause
from sweeper.core.paths import TrialFolder
from sweeper.data.encode import EncodedSplit
from sweeper.data.tokens import IGNORED, PaddingCollator, Tokens
from sweeper.evaluation.judge import make_judge
from sweeper.modeling.adapter import attach, detach
from sweeper.training.micro_batch import resolve
from sweeper.training.train_trial import TrialInputs, train_trial
from sweeper.training.trial_costs import TrialCosts

ON_GPU = torch.cuda.is_available()
UNIT = "second" if ON_GPU else "CPU second"
ROUNDS = 3
STEPS = 3
VOCABULARY = 32_768
PROMPTS = {"short prompts (16 tokens)": 16, "long prompts (112 tokens)": 112}
COMPLETION = 16
SETTINGS = (
    *("model.base_model=benchmark", "quantization=none", "adapter.r=8", "training=real"),
    *("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"),
    *("training.optim=adamw_torch", "training.micro_batch=as_given", f"training.max_steps={STEPS}"),
    *("training.warmup_ratio=0", f"training.eval_steps={STEPS}", "training.loss_chunk_size=null"),
)


clock = time.monotonic if ON_GPU else time.process_time


@dataclass(frozen=True)
class Silent:
    """An observer that nothing reaches."""

    def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
        """Nothing."""

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        """Nothing."""

    def stop_cause(self) -> StopCause | None:
        """Never."""
        return None


def make_rows(prompt: int, count: int) -> list[Tokens]:
    """Random rows of one prompt length give or take a quarter, and one completion length."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3 * prompt // 4, 5 * prompt // 4, (), generator=generator))
        ids = torch.randint(2, VOCABULARY, (length + COMPLETION,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * length + ids[length:]})
    return rows


def make_base() -> LlamaForCausalLM:
    """A Llama with random weights: speed does not depend on what they are."""
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 6, "max_position_embeddings": 512, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that is only saved and asked for its padding token."""
    backend = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def ours(base: LlamaForCausalLM, rows: list[Tokens], settings: RunSettings, folder: Path) -> float:
    """Training seconds of a trial, by its own account."""
    adapter = settings.adapter
    assert isinstance(adapter, LoraAdapter)
    set_seed(settings.seed)
    model = attach(base, adapter)
    tokenizer = make_tokenizer()
    judge = make_judge(tokenizer, rows[:1], None, settings.evaluation, seed=0)
    inputs = TrialInputs(model, tokenizer, EncodedSplit(rows), judge)
    trial = resolve(settings.trial, lambda _: None, on_gpu=ON_GPU)
    meter = TrialCosts()
    try:
        train_trial(inputs, trial, TrialFolder(folder), Silent(), meter)
    finally:
        detach(model)
    return meter.seconds("train") if ON_GPU else meter.metrics()["cost/train_cpu_seconds"]


def plain(base: LlamaForCausalLM, rows: list[Tokens], settings: RunSettings, folder: Path) -> float:
    """Training seconds of the script that everybody writes: get_peft_model and Trainer."""
    training, adapter = settings.training, settings.adapter
    assert isinstance(adapter, LoraAdapter)
    set_seed(settings.seed)
    lora = LoraConfig(r=adapter.r, lora_alpha=adapter.alpha, target_modules="all-linear")
    model = get_peft_model(base, lora)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        optim=training.optim,
        max_grad_norm=training.max_grad_norm,
        logging_steps=training.logging_steps,
        activation_checkpointing=ON_GPU,
        save_strategy="no",
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not ON_GPU,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, data_collator=PaddingCollator(0), train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    started = clock()
    trainer.train()
    seconds = clock() - started
    detach(model)
    return seconds


def compare(prompt: int) -> dict[str, float]:
    """Medians of alternating rounds, after one round of each that is not counted."""
    settings = validate(RunSettings, compose(SETTINGS).config)
    base, rows = make_base(), make_rows(prompt, settings.training.effective_batch_size * STEPS)
    tokens = sum(len(row["input_ids"]) for row in rows)
    sides: dict[str, Callable[..., float]] = {"ours": ours, "plain": plain}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds = side(base, rows, settings, Path(folder))
            if number > 0:
                rates[name].append(tokens / seconds)
    ratios = [a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)]
    return {
        **{
            f"{name}, tokens per {UNIT}": round(statistics.median(rates[name]), 1) for name in sides
        },
        "ours / plain": round(statistics.median(ratios), 3),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    record("throughput", {name: compare(prompt) for name, prompt in PROMPTS.items()})
