"""The real trial runner: keeps the base loaded and the data tokenized from trial to trial.

One instance lives in each worker. Its folder protocol: config first, outcome last.
"""

from __future__ import annotations

import gc
import math
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from sweeper.config.compose import to_yaml
from sweeper.config.settings import LoraAdapter, TrialSettings
from sweeper.core.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    DoesNotFit,
    ModelError,
    TrialDiverged,
)
from sweeper.core.manifest import verify_manifest
from sweeper.core.outcome import (
    ArmBaseline,
    ExampleLosses,
    HeldOutKind,
    HeldOutLosses,
    Outcome,
    TrialSize,
)
from sweeper.core.paths import TrialFolder, size_mib, write_atomic, write_json
from sweeper.core.spool import finite
from sweeper.core.value import MemoryShortfall
from sweeper.data.general_text import digest
from sweeper.data.packing import require_isolation
from sweeper.evaluation.judge import Judgement, ModelJudge, plausibility_warning
from sweeper.modeling.adapter import attach, count_parameters, detach, touches_base
from sweeper.modeling.base_model import LoadedBase, load_base
from sweeper.modeling.checksum import changed, checksums
from sweeper.modeling.hardware import device, device_report, dtype_name
from sweeper.modeling.trial_check import ModelChecks
from sweeper.training.arguments import module_restored, refuse_fp16_on_cpu, use_liger_kernel
from sweeper.training.baseline_model import require_same_architecture, store_model
from sweeper.training.distributed import Join, RankGroup, single_process
from sweeper.training.export import export_merged, merged_figures
from sweeper.training.memory_budget import MemoryBudget
from sweeper.training.micro_batch import halved, out_of_memory, resolve
from sweeper.training.observer import TrialObserver
from sweeper.training.optimizer import forget_states
from sweeper.training.outcome_metrics import best_figures, parameter_figures
from sweeper.training.prepared_data import PreparedData, prepare
from sweeper.training.prompt_answers import PromptAnswers
from sweeper.training.schedule import advice
from sweeper.training.sharded_trainer import load_sharded
from sweeper.training.train_trial import BatchHalvingJudge, TrialInputs, follow_trial, train_trial
from sweeper.training.training_log import training_log
from sweeper.training.trial_costs import TrialCosts

LOCK_SECONDS = 60
"""How long a trial's folder may still be held by the worker of a killed driver."""
MAX_UNFREEABLE_BYTES = 2 * 2**30
"""Of pages that only the end of the process frees; a worker of a large model is back within a minute."""
Judges = Mapping[str, ModelJudge]
"""Of unseen texts, by the field of Unseen."""


class TransformersRunner:
    """Runs trials with transformers.Trainer on a warm base."""

    def __init__(self, threads: int, join: Join = single_process) -> None:
        """`join` gathers other processes for the trials that train on several devices."""
        # threads beyond the cores make every trial slower; torch's own number heeds OMP_NUM_THREADS
        torch.set_num_threads(min(threads, torch.get_num_threads()))
        tqdm.set_lock(threading.RLock())  # its default is a semaphore that outlives a killed worker
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._warm: dict[str, LoadedBase] = {}
        self._checksums: dict[str, dict[str, int]] = {}
        """Of the warm base, as it was loaded."""
        self._prepared: dict[tuple[str, str], PreparedData] = {}
        self._checks = ModelChecks()
        self._memory = MemoryBudget()
        self._join = join
        self._unfreeable_bytes = 0

    @property
    def worn_out(self) -> bool:
        """See Runner."""
        return self._unfreeable_bytes > MAX_UNFREEABLE_BYTES

    def probe(self, settings: TrialSettings, adopted: Path | None = None) -> ArmBaseline:
        """Load what an arm's trials share and judge the untuned base.

        Args:
            settings: of the arm.
            adopted: a model that is judged in the place of any training.

        Raises:
            DataError: the data cannot be read.
            ModelError: the base cannot be loaded.
            ConfigError: the settings do not fit this machine.
            DoesNotFit: a full fine-tune is larger than the device, whatever its batch.
        """
        refuse_fp16_on_cpu(settings)
        if not isinstance(settings.adapter, LoraAdapter) and adopted is None:
            self._require_free_memory(settings)
        base = self._base(settings)
        if adopted is not None and adopted.is_dir():  # once judged, it may have been cleaned away
            require_same_architecture(adopted, base)
        prepared = self._data(settings, base)
        if settings.data.packing:
            require_isolation(base.model)
        prepared.prompts(settings)  # refuses those that were trained on
        general = (
            settings.evaluation.general_text.source
        )  # what is wrong with it is to be found now
        windows = None if general is None else digest(prepared.general_rows(settings))
        judgement = prepared.judge(settings, base)(base.model)
        if not math.isfinite(judgement.metrics["eval/loss"]):
            loss = judgement.metrics["eval/loss"]
            raise ModelError(f"{settings.model.base_model}: the untuned base's loss is {loss}")
        facts = self._arm_baseline(settings, base, prepared, judgement)
        return facts.model_copy(update={"general_digest": windows})

    def check(self, settings: TrialSettings) -> TrialSize:
        """How large a trial is; loads nothing.

        Raises:
            ModelError: it is impossible on its model, or larger than the device.
            ConfigError: the settings do not fit this machine.
        """
        refuse_fp16_on_cpu(settings)
        size = self._checks.size(settings, device())
        data = settings.data.model_dump_json()
        known = (found for (key, _), found in self._prepared.items() if key == data)
        self._memory.require(settings.with_rank(size.rank), size, next(known, None))
        return size

    def run(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        provenance: Mapping[str, Any],
        observer: TrialObserver,
    ) -> Outcome:
        """Train one trial and write its folder; every failure of the trial itself is an outcome.

        Raises:
            Exception: an error in the code (the worker reports it with its traceback).
        """
        folder.path.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.lock, timeout=LOCK_SECONDS):
            folder.clear_results()
            write_json(folder.provenance, provenance)
            started, costs = time.time(), TrialCosts.continued(folder.spent)
            settings, refusal = self._checked(settings)
            write_atomic(folder.config, to_yaml(settings.model_dump(mode="json")))
            outcome = refusal or self._outcome(settings, folder, observer, costs)
            outcome = self._on_clean_base(outcome)
            metrics = {**outcome.metrics, **finite(costs.metrics())}
            outcome = outcome.model_copy(update={"metrics": metrics})
            text, document = training_log(settings, outcome, folder, started, costs)
            write_atomic(folder.log_text, text)
            write_json(folder.log_json, document)
            write_atomic(folder.outcome, outcome.model_dump_json(indent=2) + "\n")
            # last: killed before this line, the trial still continues, and so does a cancelled one
            if outcome.cause != "cancelled":
                shutil.rmtree(folder.checkpoints, ignore_errors=True)
        return outcome

    def adopt(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        provenance: Mapping[str, Any],
        model: Path,
    ) -> Outcome:
        """Judge a model that another run trained on the validation split, and keep it as a trial's.

        Its figures are this judge's; what its training cost is not known here.

        Raises:
            Exception: an error in the code (the worker reports it with its traceback).
        """
        folder.path.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.lock, timeout=LOCK_SECONDS):
            folder.clear_results()
            write_atomic(folder.config, to_yaml(settings.model_dump(mode="json")))
            write_json(folder.provenance, provenance)
            try:
                outcome = self._judge_baseline(settings, folder, model)
            except (ModelError, DataError, ConfigError, ArtifactError) as error:
                outcome = Outcome(cause="refused", message=str(error))
            write_atomic(folder.outcome, outcome.model_dump_json(indent=2) + "\n")
        return outcome

    def _judge_baseline(self, settings: TrialSettings, folder: TrialFolder, model: Path) -> Outcome:
        costs = TrialCosts()
        with costs.stage("load"):
            require_same_architecture(model, self._base(settings))
            store_model(model, folder, self._base(settings).tokenizer)
        with costs.stage("data"):
            judge = self._data(settings, self._base(settings)).judge(settings, self._base(settings))
        with costs.stage("load"):
            tuned = self._stored(settings, folder.model)
        with costs.stage("eval"):
            judgement = BatchHalvingJudge(judge, costs)(tuned)
        metrics = {
            **best_figures((), judgement.metrics, best_step=0),
            **parameter_figures(count_parameters(tuned)),
            **costs.metrics(),
            "cost/artifact_mib": size_mib(folder.model),
        }
        value = judgement.value(settings.objective.metric)
        return Outcome(cause="finished", best_value=value, best_step=0, metrics=finite(metrics))

    def test(
        self, settings: TrialSettings, folder: TrialFolder | None, kinds: Sequence[HeldOutKind]
    ) -> HeldOutLosses:
        """Judge what a trial has stored, or the untuned base (None), on texts that no search sees.

        The base is held as the trial held it, so that the same judge on the validation split finds
        the trial's own loss.

        Raises:
            ArtifactError: nothing is stored, or not what the manifest says.
            DataError: there is no such text.
        """
        judges = self._held_out_judges(settings, kinds)
        if folder is None:
            return _held_out_losses(judges, self._base(settings).model)
        artifact = folder.artifact
        if artifact is None:
            raise ArtifactError(f"{folder.path} holds neither an adapter nor a model")
        verify_manifest(artifact)
        if isinstance(settings.adapter, LoraAdapter):
            return self._test_adapter(judges, settings, settings.adapter, artifact)
        return _held_out_losses(judges, self._stored(settings, artifact))

    def _stored(self, settings: TrialSettings, folder: Path) -> PreTrainedModel:
        """The weights of a full fine-tune, held as they were trained."""
        self._release_base()  # the stored model comes whole
        stored = settings.model.model_copy(update={"base_model": str(folder), "revision": None})
        return load_base(stored, settings.quantization, trained=True).model

    def _held_out_judges(self, settings: TrialSettings, kinds: Sequence[HeldOutKind]) -> Judges:
        """They hold no model."""
        base = self._base(settings)
        prepared = self._data(settings, base)
        judges = {"test": prepared.test_judge, "general": prepared.general_judge}
        return {kind: judges[kind](settings, base) for kind in kinds}

    def _test_adapter(
        self, judges: Judges, settings: TrialSettings, adapter: LoraAdapter, artifact: Path
    ) -> HeldOutLosses:
        model = PeftModel.from_pretrained(self._base(settings).model, str(artifact))
        try:
            return _held_out_losses(judges, model)
        finally:
            detach(model)
            if touches_base(adapter):
                self._warm.clear()

    def _require_free_memory(self, settings: TrialSettings) -> None:
        """Refuse a full fine-tune whose weights, gradients and optimizer states do not fit by now.

        Whoever else uses the device does not leave it for this study.
        """
        self._release_base()
        need, have = self.check(settings).held_mib, device_report(device()).free_mib
        if need > have:
            raise DoesNotFit(MemoryShortfall(need_mib=need, have_mib=have))

    def _on_clean_base(self, outcome: Outcome) -> Outcome:
        """The outcome, if the warm base is still what was loaded; an error otherwise.

        A base that a trial has changed would spoil every later one in silence; the next trial loads
        it anew.
        """
        changed_weights = [
            name
            for key, base in self._warm.items()
            for name in changed(self._checksums[key], base.model)
        ]
        if not changed_weights:
            return outcome
        self._warm.clear()
        shown = ", ".join(changed_weights[:3]) + (" …" if len(changed_weights) > 3 else "")
        message = (
            f"this trial changed {len(changed_weights)} weights of its frozen base ({shown}), so its "
            "result does not stand; the next trial gets the base loaded anew"
        )
        return Outcome(cause="error", message=message, steps=outcome.steps)

    def _checked(self, settings: TrialSettings) -> tuple[TrialSettings, Outcome | None]:
        """The settings with their rank decided, or as they are and why the trial is impossible."""
        try:
            return settings.with_rank(self.check(settings).rank), None
        except (ModelError, ConfigError) as error:
            return settings, Outcome(cause="refused", message=str(error))

    def _outcome(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        observer: TrialObserver,
        costs: TrialCosts,
    ) -> Outcome:
        try:
            return self._train(settings, folder, observer, costs)
        except TrialDiverged as error:
            return Outcome(cause="diverged", message=str(error), steps=costs.steps)
        except (ModelError, DataError, ConfigError) as error:
            return Outcome(cause="refused", message=str(error))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                self._warm.clear()  # nobody knows what the error left of it
                raise
            message = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            return Outcome(cause="oom", message=message, steps=costs.steps)
        except Exception:
            self._warm.clear()
            raise

    def _train(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        observer: TrialObserver,
        costs: TrialCosts,
    ) -> Outcome:
        """Train, in micro-batches half the size after each time out of memory.

        Every attempt builds the model anew from the same seed and continues from the newest
        checkpoint, so that it computes what it would have computed with the smaller micro-batch.
        """
        with costs.stage("load"):
            self._base(settings)  # does not fit at all: no micro-batch would help
        with costs.stage("data"):
            # nothing here holds the base itself: it is dropped where its weights were trained
            prepared = self._data(settings, self._base(settings))
            fits = self._memory.fits(prepared)
        with costs.stage("load"):
            settings = resolve(settings, fits, on_gpu=device().type == "cuda")
        while True:
            try:
                outcome = self._attempt(settings, folder, observer, costs)
                break
            except (MemoryError, RuntimeError) as error:
                smaller = halved(settings)
                if not out_of_memory(error) or smaller is None:
                    raise
            # only here is the failed step's memory free: its traceback held it
            settings = smaller
            costs.oom_retries += 1
            _free_unreferenced()
        if settings.artifacts.merged and folder.adapter.exists():
            self._release_base()  # the merged model is loaded whole
            with costs.stage("save"):
                merged = export_merged(settings, folder)
            with costs.stage("eval"):
                costs.figures |= merged_figures(merged, prepared, settings)
        return outcome

    def _attempt(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        observer: TrialObserver,
        costs: TrialCosts,
    ) -> Outcome:
        with costs.stage("load"):
            base = self._base(settings)
        with costs.stage("data"):
            prepared = self._data(settings, base)
            self._record_facts(settings, base, prepared, folder, costs)
        prompt_answers = PromptAnswers(settings, prepared, base)
        with costs.stage("eval"):
            untuned = prompt_answers.answers(base.model)
        with (
            self._join(settings, folder.checkpoints) as ranks,
            self._inputs(settings, base, prepared, ranks, costs) as inputs,
        ):
            outcome, trained = train_trial(inputs, settings, folder, observer, costs)
            if trained is not None:
                with costs.stage("eval"):
                    prompt_answers.write(untuned, prompt_answers.answers(trained), folder)
        _add_advice(outcome, prepared, costs)
        return outcome

    def follow(self, settings: TrialSettings, checkpoints: Path, ranks: RankGroup) -> None:
        """Take part in a trial that another process leads."""
        base = self._base(settings)
        prepared = self._data(settings, base)
        with self._inputs(settings, base, prepared, ranks, TrialCosts()) as inputs:
            follow_trial(inputs, settings, checkpoints)

    @contextmanager
    def _inputs(
        self,
        settings: TrialSettings,
        base: LoadedBase,
        prepared: PreparedData,
        ranks: RankGroup,
        costs: TrialCosts,
    ) -> Iterator[TrialInputs]:
        """What a trial trains, with its adapter on the warm base for as long as the context lasts."""
        with costs.stage("load"):
            set_seed(settings.seed)  # before the adapter: its initialisation is random
            model = self._trainable(settings, base)
        try:
            with module_restored(base.model):
                yield TrialInputs(
                    model=model,
                    tokenizer=base.tokenizer,
                    train=prepared.train,
                    judge=prepared.judge(settings, base),
                    ordered=prepared.splits.ordered,
                    compute_dtype=base.compute_dtype,
                    ranks=ranks,
                )
        finally:
            self._unfreeable_bytes += forget_states()
            if isinstance(model, PeftModel):
                detach(model)
            if touches_base(settings.adapter):
                self._warm.clear()

    def _trainable(self, settings: TrialSettings, base: LoadedBase) -> PreTrainedModel | PeftModel:
        """The base with its adapter, all of the base, or its shares on the ranks."""
        if isinstance(settings.adapter, LoraAdapter):
            return attach(base.model, settings.adapter)
        if not settings.training.fsdp:
            return base.model
        self._warm.clear()
        return load_sharded(base.model, settings.training.shards, base.compute_dtype)

    def _base(self, settings: TrialSettings) -> LoadedBase:
        """The warm base; a trial that trains the base's own weights leaves none behind."""
        trained = not isinstance(settings.adapter, LoraAdapter)
        liger = use_liger_kernel(settings)  # its layers stay on a base
        held = (settings.model.model_dump_json(), settings.quantization.model_dump_json())
        key = " ".join([*held, str(trained), str(liger)])
        if key not in self._warm:
            self._release_base()  # one base at a time: memory is what it is all about
            self._warm[key] = load_base(settings.model, settings.quantization, trained=trained)
            self._checksums = {key: checksums(self._warm[key].model)}
        return self._warm[key]

    def _release_base(self) -> None:
        """Let go of the base, and of what earlier trials left in cycles of references."""
        self._warm.clear()
        _free_unreferenced()

    def _data(self, settings: TrialSettings, base: LoadedBase) -> PreparedData:
        key = (settings.data.model_dump_json(), base.digest)
        if key not in self._prepared:
            self._prepared[key] = prepare(settings.data, base)
        return self._prepared[key]

    def _arm_baseline(
        self,
        settings: TrialSettings,
        base: LoadedBase,
        prepared: PreparedData,
        judgement: Judgement,
    ) -> ArmBaseline:
        splits, metrics = prepared.splits, judgement.metrics
        report = device_report(device())
        return ArmBaseline(
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

    def _record_facts(
        self,
        settings: TrialSettings,
        base: LoadedBase,
        prepared: PreparedData,
        folder: TrialFolder,
        costs: TrialCosts,
    ) -> None:
        """What the log and the outcome tell of the data and the machine."""
        training, report = settings.training, device_report(device())
        write_atomic(folder.data_card, prepared.card.markdown())
        estimate = self._memory.estimate_mib(settings, prepared)
        costs.facts = {
            "Device": f"{report.name}, {report.total_mib:,.0f} MiB",
            "Precision": f"{base.dtype_reason}; trained weights float32",
            "Checkpointing": "activations recomputed"
            if training.activation_checkpointing
            else "activations kept",
        }
        if base.commit:
            costs.facts["Base commit"] = base.commit
        costs.advice = advice(settings, len(prepared.train.rows))
        costs.figures |= {
            "data/train_rows": float(len(prepared.train.rows)),
            "data/train_target_tokens": float(prepared.train.target_tokens),
            "data/train_truncated": float(prepared.train.truncated),
            "data/train_dropped": float(prepared.train.dropped),
            "data/validation_rows": float(len(prepared.validation.rows)),
        }
        if estimate is not None:
            costs.figures["cost/estimated_memory_mib"] = estimate


def _free_unreferenced() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _held_out_losses(judges: Judges, model: PreTrainedModel | PeftModel) -> HeldOutLosses:
    return HeldOutLosses(**{name: _example_losses(judge, model) for name, judge in judges.items()})


def _example_losses(judge: ModelJudge, model: PreTrainedModel | PeftModel) -> ExampleLosses:
    losses = BatchHalvingJudge(judge, TrialCosts())(model).examples
    return ExampleLosses(
        nll=tuple(loss.nll for loss in losses), tokens=tuple(loss.tokens for loss in losses)
    )


def _add_advice(outcome: Outcome, prepared: PreparedData, costs: TrialCosts) -> None:
    """A perplexity that no unseen text has earns a sentence in the log."""
    perplexity = outcome.metrics.get("best/eval_perplexity")
    if perplexity is not None and "text" in prepared.splits.formats:
        costs.advice += [words for words in [plausibility_warning(perplexity)] if words]
