"""The real trial runner: keeps the base loaded and the data tokenized from trial to trial.

One instance lives in each worker. Its folder protocol: config first, outcome last.
"""

from __future__ import annotations

import gc
import math
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from sweeper.compose import to_yaml
from sweeper.data.packing import require_isolation
from sweeper.errors import ArtifactError, ConfigError, DataError, Diverged, DoesNotFit, ModelError
from sweeper.evaluation.judge import Judge, Judgement, plausibility_warning
from sweeper.folders import TrialFolder, write_atomic, write_json
from sweeper.modeling.adapter import attach, detach, touches_base
from sweeper.modeling.base import Base, load_base
from sweeper.modeling.hardware import device, device_report, dtype_name
from sweeper.modeling.memory_estimate import estimate_trial
from sweeper.outcome import Examples, Facts, Misfit, Outcome
from sweeper.settings import LoraAdapter, TrialSettings
from sweeper.training.arguments import refuse_fp16_on_cpu
from sweeper.training.asked import Asked
from sweeper.training.batch import halved, out_of_memory, resolve
from sweeper.training.export import export_merged, merged_figures
from sweeper.training.log import training_log
from sweeper.training.manifest import verify_manifest
from sweeper.training.meter import Meter
from sweeper.training.observer import Observer
from sweeper.training.prepare import Prepared, prepare
from sweeper.training.room import Room
from sweeper.training.schedule import advice
from sweeper.training.spool import finite
from sweeper.training.trial import Looks, TrialInputs, train_trial

LOCK_SECONDS = 60
"""How long a trial's folder may still be held by the worker of a killed driver."""
SHORT_ROW = 8
"""Tokens of a row whose activations hardly count."""


class TransformersRunner:
    """Runs trials with transformers.Trainer on a warm base."""

    def __init__(self, threads: int) -> None:
        # threads beyond the cores make every trial slower; torch's own number heeds OMP_NUM_THREADS
        torch.set_num_threads(min(threads, torch.get_num_threads()))
        tqdm.set_lock(threading.RLock())  # its default is a semaphore that outlives a killed worker
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._warm: dict[str, Base] = {}
        self._prepared: dict[tuple[str, str], Prepared] = {}
        self._room = Room()

    def probe(self, settings: TrialSettings) -> Facts:
        """Load what an arm's trials share and judge the untuned base.

        Raises:
            DataError: the data cannot be read.
            ModelError: the base cannot be loaded.
            ConfigError: the settings do not fit this machine.
            DoesNotFit: a full fine-tune is larger than the device, whatever its batch.
        """
        refuse_fp16_on_cpu(settings)
        if not isinstance(settings.adapter, LoraAdapter):
            self._require_room(settings)
        base = self._base(settings)
        prepared = self._data(settings, base)
        if settings.data.packing:
            require_isolation(base.model)
        prepared.prompts(settings)  # refuses those that were trained on
        judgement = prepared.judge(settings, base)(base.model)
        if not math.isfinite(judgement.metrics["eval/loss"]):
            loss = judgement.metrics["eval/loss"]
            raise ModelError(f"{settings.model.base_model}: the untuned base's loss is {loss}")
        return self._facts(settings, base, prepared, judgement)

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
            # last: killed before this line, the trial still continues, and so does a cancelled one
            if outcome.cause != "cancelled":
                shutil.rmtree(folder.checkpoints, ignore_errors=True)
        return outcome

    def test(self, settings: TrialSettings, folder: TrialFolder | None) -> Examples:
        """Judge what a trial has stored, or the untuned base (None), on the test split.

        The base is held as the trial held it, so that the same judge on the validation split finds
        the trial's own loss.

        Raises:
            ArtifactError: nothing is stored, or not what the manifest says.
            DataError: the data have no test split.
        """
        judge = self._test_judge(settings)
        if folder is None:
            return _examples(judge, self._base(settings).model)
        artifact = folder.artifact
        if artifact is None:
            raise ArtifactError(f"{folder.path} holds neither an adapter nor a model")
        verify_manifest(artifact)
        if isinstance(settings.adapter, LoraAdapter):
            return self._test_adapter(judge, settings, settings.adapter, artifact)
        self._warm.clear()  # make room: the stored model comes whole
        stored = settings.model.model_copy(update={"base_model": str(artifact), "revision": None})
        return _examples(judge, load_base(stored, settings.quantization, trained=True).model)

    def _test_judge(self, settings: TrialSettings) -> Judge:
        """Holds no model."""
        base = self._base(settings)
        return self._data(settings, base).test_judge(settings, base)

    def _test_adapter(
        self, judge: Judge, settings: TrialSettings, adapter: LoraAdapter, artifact: Path
    ) -> Examples:
        model = PeftModel.from_pretrained(self._base(settings).model, str(artifact))
        try:
            return _examples(judge, model)
        finally:
            detach(model)
            if touches_base(adapter):
                self._warm.clear()

    def _require_room(self, settings: TrialSettings) -> None:
        """Refuse a full fine-tune whose weights, gradients and optimizer states do not fit.

        The states of a paged optimizer do not count: it moves them out of the device's way.
        """
        self._warm.clear()
        gc.collect()
        torch.cuda.empty_cache()
        one_short_row = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        training = settings.training.model_copy(update=one_short_row)
        estimate = estimate_trial(
            settings.model_copy(update={"training": training}), device(), length=SHORT_ROW
        )
        pages = settings.training.optim.startswith("paged") and device().type == "cuda"
        states = 0.0 if pages else estimate.optimizer
        need = estimate.weights + estimate.gradients + states
        have = device_report(device()).free_mib
        if need > have:
            raise DoesNotFit(Misfit(need_mib=need, have_mib=have))

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
        refuse_fp16_on_cpu(settings)
        with meter.stage("load"):
            self._base(settings)  # does not fit at all: no micro-batch would help
        with meter.stage("data"):
            # nothing here holds the base itself: it is dropped where its weights were trained
            prepared = self._data(settings, self._base(settings))
            fits = self._room.fits(prepared)
        with meter.stage("load"):
            settings = resolve(settings, fits, on_gpu=device().type == "cuda")
        while True:
            try:
                outcome = self._attempt(settings, folder, observer, meter)
                break
            except (MemoryError, RuntimeError) as error:
                smaller = halved(settings)
                if not out_of_memory(error) or smaller is None:
                    raise
            # only here is the failed step's memory free: its traceback held it
            settings = smaller
            meter.oom_retries += 1
            gc.collect()
            torch.cuda.empty_cache()
        if settings.artifacts.merged and folder.adapter.exists():
            self._warm.clear()  # make room: the merged model is loaded whole
            with meter.stage("save"):
                merged = export_merged(settings, folder)
            with meter.stage("eval"):
                meter.figures |= merged_figures(merged, prepared, settings)
        return outcome

    def _attempt(
        self, settings: TrialSettings, folder: TrialFolder, observer: Observer, meter: Meter
    ) -> Outcome:
        with meter.stage("load"):
            base = self._base(settings)
        with meter.stage("data"):
            prepared = self._data(settings, base)
            self._take_note(settings, base, prepared, folder, meter)
        asked = Asked(settings, prepared, base)
        with meter.stage("eval"):
            untuned = asked.answers(base.model)
        with meter.stage("load"):
            set_seed(settings.seed)  # before the adapter: its initialisation is random
            adapter = settings.adapter
            model = attach(base.model, adapter) if isinstance(adapter, LoraAdapter) else base.model
        try:
            inputs = TrialInputs(
                model=model,
                tokenizer=base.tokenizer,
                train=prepared.train,
                judge=prepared.judge(settings, base),
                ordered=prepared.splits.ordered,
                compute_dtype=base.compute_dtype,
            )
            outcome = train_trial(inputs, settings, folder, observer, meter)
            with meter.stage("eval"):
                asked.write(untuned, asked.answers(model), folder)
            _warn(outcome, prepared, meter)
            return outcome
        finally:
            if isinstance(model, PeftModel):
                detach(model)
            if touches_base(settings.adapter):
                self._warm.clear()

    def _base(self, settings: TrialSettings) -> Base:
        """The warm base; a trial that trains the base's own weights leaves none behind."""
        trained = not isinstance(settings.adapter, LoraAdapter)
        key = f"{trained} {settings.model.model_dump_json()} {settings.quantization.model_dump_json()}"
        if key not in self._warm:
            self._warm.clear()  # one base at a time: memory is what it is all about
            self._warm[key] = load_base(settings.model, settings.quantization, trained=trained)
        return self._warm[key]

    def _data(self, settings: TrialSettings, base: Base) -> Prepared:
        key = (settings.data.model_dump_json(), base.digest)
        if key not in self._prepared:
            self._prepared[key] = prepare(settings.data, base)
        return self._prepared[key]

    def _facts(
        self, settings: TrialSettings, base: Base, prepared: Prepared, judgement: Judgement
    ) -> Facts:
        splits, metrics = prepared.splits, judgement.metrics
        report = device_report(device())
        return Facts(
            base_digest=base.digest,
            base_commit=base.commit,
            base_metrics=finite(metrics),
            base_parameters=int(base.model.num_parameters()),
            data_digest=splits.digest,
            data_source=splits.source,
            data_format=splits.format,
            rows={**splits.counts, "train": len(prepared.train.rows)},
            dropped={**splits.dropped, **prepared.train.ledger.total},
            target_tokens=prepared.validation.target_tokens,
            device=f"{report.name}, {torch.get_num_threads()} threads"
            if device().type == "cpu"
            else report.name,
            dtype=dtype_name(base.compute_dtype),
        )

    def _take_note(
        self,
        settings: TrialSettings,
        base: Base,
        prepared: Prepared,
        folder: TrialFolder,
        meter: Meter,
    ) -> None:
        """What the log and the outcome tell of the data and the machine."""
        training, report = settings.training, device_report(device())
        write_atomic(folder.data_card, prepared.card.markdown())
        estimate = self._room.estimate_mib(settings, prepared)
        meter.facts = {
            "Device": f"{report.name}, {report.total_mib:,.0f} MiB",
            "Precision": f"{base.dtype_reason}; trained weights float32",
            "Checkpointing": "activations recomputed"
            if training.activation_checkpointing
            else "activations kept",
        }
        if base.commit:
            meter.facts["Base commit"] = base.commit
        meter.advice = advice(settings, len(prepared.train.rows))
        meter.figures |= {
            "data/train_rows": float(len(prepared.train.rows)),
            "data/train_target_tokens": float(prepared.train.target_tokens),
            "data/train_truncated": float(prepared.train.truncated),
            "data/train_dropped": float(prepared.train.dropped),
            "data/validation_rows": float(len(prepared.validation.rows)),
        }
        if estimate is not None:
            meter.figures["cost/estimated_memory_mib"] = estimate


def _examples(judge: Judge, model: PreTrainedModel | PeftModel) -> Examples:
    losses = Looks(judge, Meter())(model).examples
    return Examples(
        nll=tuple(loss.nll for loss in losses), tokens=tuple(loss.tokens for loss in losses)
    )


def _warn(outcome: Outcome, prepared: Prepared, meter: Meter) -> None:
    """A perplexity that no unseen text has earns a sentence in the log."""
    perplexity = outcome.metrics.get("best/eval_perplexity")
    if perplexity is not None and "text" in prepared.splits.formats:
        meter.advice += [words for words in [plausibility_warning(perplexity)] if words]
