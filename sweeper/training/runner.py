"""The real trial runner: keeps the base loaded and the data tokenized from trial to trial.

One instance lives in each worker. Its folder protocol: config first, outcome last.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from filelock import FileLock
from peft import PeftModel
from tqdm import tqdm
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from sweeper.compose import to_yaml
from sweeper.data.splits import Splits, load_splits
from sweeper.data.tokens import Collator, Encoded, encode
from sweeper.errors import ConfigError, DataError, Diverged, ModelError
from sweeper.evaluation.loss import evaluate_loss
from sweeper.folders import TrialFolder, write_atomic, write_json
from sweeper.modeling.adapter import attach, detach
from sweeper.modeling.base import Base, device, load_base
from sweeper.outcome import Facts, Outcome
from sweeper.settings import Data, LoraAdapter, TrialSettings
from sweeper.training.arguments import describe_precision, refuse_fp16_on_cpu
from sweeper.training.batch import Fits, halved, out_of_memory, resolve
from sweeper.training.meter import Meter
from sweeper.training.log import training_log
from sweeper.training.observer import Observer
from sweeper.training.schedule import advice
from sweeper.training.spool import finite
from sweeper.training.trial import TrialInputs, train_trial

LOCK_SECONDS = 60
"""How long a trial's folder may still be held by the worker of a killed driver."""


@dataclass(frozen=True)
class Tokenized:
    """The data of a configuration, through every stage."""

    splits: Splits
    train: Encoded
    validation: Encoded


class TransformersRunner:
    """Runs trials with transformers.Trainer on a warm base."""

    def __init__(self, threads: int, fits: Fits = lambda _: None) -> None:
        torch.set_num_threads(threads)  # threads beyond the cores make every trial slower
        tqdm.set_lock(threading.RLock())  # its default is a semaphore that outlives a killed worker
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        # bitsandbytes warns of its own casts on every layer call
        warnings.filterwarnings("ignore", message="MatMul8bitLt")
        self._fits = fits
        self._warm: dict[str, Base] = {}
        self._data: dict[tuple[str, str], Tokenized] = {}

    def probe(self, settings: TrialSettings) -> Facts:
        """Load what an arm's trials share and judge the untuned base.

        Raises:
            DataError: the data cannot be read.
            ModelError: the base cannot be loaded.
        """
        base = self._base(settings)
        data = self._tokenized(settings.data, base)
        collator = Collator(base.tokenizer.pad_token_id)
        size = settings.evaluation.per_device_eval_batch_size
        rows = data.validation.rows
        loss = evaluate_loss(base.model, rows, collator, size, base.compute_dtype)
        if not math.isfinite(loss.mean):
            raise ModelError(f"{settings.model.base_model}: the untuned base's loss is {loss.mean}")
        counts = {**data.splits.counts, "train": len(data.train.rows)}
        return Facts(
            base_digest=base.digest,
            base_loss=loss.mean,
            base_perplexity=loss.perplexity,
            base_parameters=int(base.model.num_parameters()),
            data_digest=data.splits.digest,
            data_source=data.splits.source,
            data_format=data.splits.format,
            rows=counts,
            dropped={**data.splits.dropped, "over_max_length": data.train.dropped},
            target_tokens=loss.tokens,
            device=_device_name(),
            dtype=str(base.compute_dtype).removeprefix("torch."),
        )

    def run(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        provenance: Mapping[str, Any],
        observer: Observer,
    ) -> Outcome:
        """Train one trial and write its folder; every failure of the trial itself is an outcome.

        Raises:
            Exception: an error in the code (the worker reports it with its traceback).
        """
        folder.path.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.lock, timeout=LOCK_SECONDS):
            folder.clear_results()
            write_atomic(folder.config, to_yaml(settings.model_dump(mode="json")))
            write_json(folder.provenance, provenance)
            started, meter = time.time(), Meter()
            outcome = self._outcome(settings, folder, observer, meter)
            metrics = {**outcome.metrics, **finite(meter.metrics())}
            outcome = outcome.model_copy(update={"metrics": metrics})
            text, document = training_log(settings, outcome, folder, started, meter)
            write_atomic(folder.log_text, text)
            write_json(folder.log_json, document)
            write_atomic(folder.outcome, outcome.model_dump_json(indent=2) + "\n")
            # last, and whatever the outcome: killed before this line, the trial still continues
            shutil.rmtree(folder.checkpoints, ignore_errors=True)
        return outcome

    def _outcome(
        self, settings: TrialSettings, folder: TrialFolder, observer: Observer, meter: Meter
    ) -> Outcome:
        try:
            return self._train(settings, folder, observer, meter)
        except Diverged as error:
            return Outcome(cause="diverged", message=str(error), steps=meter.steps)
        except (ModelError, DataError, ConfigError) as error:
            return Outcome(cause="refused", message=str(error))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            message = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            return Outcome(cause="oom", message=message, steps=meter.steps)

    def _train(
        self, settings: TrialSettings, folder: TrialFolder, observer: Observer, meter: Meter
    ) -> Outcome:
        """Train, in micro-batches half the size after each time out of memory.

        Every attempt builds the model anew from the same seed and continues from the newest
        checkpoint, so that it computes what it would have computed with the smaller micro-batch.
        """
        _refuse(settings)
        with meter.stage("load"):
            self._base(settings)  # does not fit at all: no micro-batch would help
        settings = resolve(settings, self._fits, on_gpu=device().type == "cuda")
        while True:
            try:
                return self._attempt(settings, folder, observer, meter)
            except (MemoryError, RuntimeError) as error:
                smaller = halved(settings)
                if not out_of_memory(error) or smaller is None:
                    raise
            # only here is the failed step's memory free: its traceback held it
            settings = smaller
            meter.oom_retries += 1
            gc.collect()
            torch.cuda.empty_cache()

    def _attempt(
        self, settings: TrialSettings, folder: TrialFolder, observer: Observer, meter: Meter
    ) -> Outcome:
        with meter.stage("load"):
            base = self._base(settings)
        with meter.stage("data"):
            data = self._tokenized(settings.data, base)
        _take_note(settings, base, data, meter)
        adapter = settings.adapter
        with meter.stage("load"):
            set_seed(settings.seed)  # before the adapter: its initialisation is random
            if isinstance(adapter, LoraAdapter):
                model, base_is_untouched = attach(base.model, adapter), adapter.bias == "none"
            else:
                model, base_is_untouched = base.model, False
        try:
            inputs = TrialInputs(
                model, base.tokenizer, data.train, data.validation, base.compute_dtype
            )
            return train_trial(inputs, settings, folder, observer, meter)
        finally:
            if isinstance(model, PeftModel):
                detach(model)
            if not base_is_untouched:
                self._warm.clear()

    def _base(self, settings: TrialSettings) -> Base:
        """The warm base; a trial that trains the base's own weights leaves none behind."""
        trained = not isinstance(settings.adapter, LoraAdapter)
        key = f"{trained} {settings.model.model_dump_json()} {settings.quantization.model_dump_json()}"
        if key not in self._warm:
            self._warm.clear()  # one base at a time: memory is what it is all about
            self._warm[key] = load_base(settings.model, settings.quantization, trained=trained)
        return self._warm[key]

    def _tokenized(self, settings: Data, base: Base) -> Tokenized:
        key = (settings.model_dump_json(), base.digest)
        if key not in self._data:
            splits = load_splits(settings)
            limit = base.model.config.max_position_embeddings
            train = encode(
                splits.examples["train"], base.tokenizer, min(settings.max_length, limit)
            )
            validation = encode(splits.examples["validation"], base.tokenizer, limit)
            _require_rows(train, validation, settings, limit)
            self._data[key] = Tokenized(splits, train, validation)
        return self._data[key]


def _require_rows(train: Encoded, validation: Encoded, settings: Data, limit: int) -> None:
    if not train.rows:
        raise DataError(
            f"{settings.train}: all {train.dropped} training rows are longer than "
            f"data.max_length={settings.max_length} tokens"
        )
    if validation.dropped:
        raise DataError(
            f"{settings.train}: {validation.dropped} validation rows are longer than the model's "
            f"{limit} positions; shorten or remove them (evaluation never truncates)"
        )


def _refuse(settings: TrialSettings) -> None:
    refuse_fp16_on_cpu(settings)
    if settings.artifacts.merged:
        raise ConfigError(["artifacts.merged=true: merged export is not available in a trial"])


def _take_note(settings: TrialSettings, base: Base, data: Tokenized, meter: Meter) -> None:
    """What the log and the outcome tell of the data and the machine."""
    training = settings.training
    meter.facts = {
        "Device": _device_name(),
        "Precision": describe_precision(settings, base.compute_dtype),
        "Checkpointing": "activations recomputed"
        if training.activation_checkpointing
        else "activations kept",
    }
    meter.advice = advice(settings, len(data.train.rows))
    meter.figures |= {
        "data/train_rows": float(len(data.train.rows)),
        "data/validation_rows": float(len(data.validation.rows)),
        "data/train_target_tokens": float(data.train.target_tokens),
        "data/dropped_over_max_length": float(data.train.dropped),
        **{f"data/dropped_{why}": float(count) for why, count in data.splits.dropped.items()},
    }


def _device_name() -> str:
    on = device()
    if on.type == "cuda":
        return str(torch.cuda.get_device_name(on))
    return f"{on.type}, {torch.get_num_threads()} of {os.cpu_count()} threads"
