"""Run trials in a worker process, with the base model loaded and the data tokenized between trials.

Each worker has one instance. It writes a trial's config first and the outcome last, so a folder with an
outcome is complete.
"""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
    InputsChanged,
    ModelError,
    TrialDiverged,
    first_line,
)
from sweeper.core.input_digests import InputDigests
from sweeper.core.manifest import verify_manifest
from sweeper.core.outcome import (
    ANSWERING_SECONDS,
    SELF_ENDED,
    ArmBaseline,
    Cause,
    ExampleLosses,
    HeldOutKind,
    HeldOutLosses,
    Outcome,
    TrialSize,
)
from sweeper.core.paths import TrialFolder, size_mib, write_atomic, write_json
from sweeper.core.spool import finite
from sweeper.core.stage_words import stage
from sweeper.core.value import MemoryShortfall
from sweeper.data.general_text import digest
from sweeper.evaluation.custom_metrics import MetricFailed
from sweeper.evaluation.judge import Judgement, ModelJudge, plausibility_warning
from sweeper.evaluation.judgement_readers import JudgementReader
from sweeper.modeling.adapter import (
    attach,
    count_parameters,
    describe_reach,
    detach,
    equal_presets_of,
    load_adapter,
    touches_base,
    trained_dtypes,
)
from sweeper.modeling.base_model import LoadedBase, load_base
from sweeper.modeling.checksum import changed, checksums
from sweeper.modeling.hardware import device, device_report, dtype_name
from sweeper.modeling.packing_proof import require_isolation
from sweeper.modeling.trial_check import ModelChecks
from sweeper.training.arguments import module_restored, refuse_fp16_on_cpu, use_liger_kernel
from sweeper.training.artifact_form import artifact_form
from sweeper.training.baseline_model import require_same_architecture, store_model
from sweeper.training.distributed import Join, RankGroup, leave_launcher, single_process
from sweeper.training.export import export_merged, load_merged, merged_figures
from sweeper.training.job_inputs import JobInputs
from sweeper.training.memory_budget import MemoryBudget
from sweeper.training.micro_batch import StageOutOfMemory, halved, out_of_memory, resolve
from sweeper.training.observer import TrialObserver
from sweeper.training.optimizer import forget_states
from sweeper.training.outcome_metrics import best_figures, parameter_figures
from sweeper.training.prepared_data import PreparedData, positions, prepare
from sweeper.training.prompt_answers import PromptAnswers, UntunedAnswers
from sweeper.training.schedule import advice
from sweeper.training.sharded_trainer import load_sharded
from sweeper.training.train_trial import BatchHalvingJudge, TrialInputs, follow_trial, train_trial
from sweeper.training.training_log import training_log
from sweeper.training.trial_costs import TrialCosts

LOCK_SECONDS = 60
"""Seconds that the worker of a killed driver may still hold a trial's folder."""
MAX_UNFREEABLE_BYTES = 2 * 2**30
"""Bytes of paged optimizer states that a worker may accumulate before its process is replaced.

Only the end of the process frees them. A new worker loads even a large base within a minute.
"""
CHECKED = "the description of the trial's model"
"""The things that a check holds in memory: the model without its weights."""
Judges = Mapping[str, ModelJudge]
"""Judges of held-out texts, by field of HeldOutLosses."""
HELD_OUT_READERS = {"test": JudgementReader.VERDICT, "general": JudgementReader.FORGETTING}
"""Readers of the losses on held-out texts, by field of HeldOutLosses."""


class TransformersRunner:
    """Runs trials with transformers.Trainer on a warm base."""

    def __init__(self, threads: int, join: Join = single_process) -> None:
        """Prepare a worker's process.

        Args:
            threads: this worker's share of the CPU cores.
            join: starts the other processes of a trial that trains on several devices.
        """
        leave_launcher()
        # More threads than cores slow every trial down. torch's default already respects
        # OMP_NUM_THREADS, by which users and batch systems limit a process
        torch.set_num_threads(min(threads, torch.get_num_threads()))
        tqdm.set_lock(threading.RLock())  # tqdm's default semaphore leaks when a worker is killed
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._warm: dict[str, LoadedBase] = {}
        self._checksums: dict[str, dict[str, int]] = {}
        """Checksums of the warm base's weights as they were loaded."""
        self._prepared: dict[tuple[str, str, int | None], PreparedData] = {}
        """Data by their settings, the tokenizer's digest and the model's positions."""
        self._job = JobInputs()
        """Digests that the current job expects, and those of what was loaded for it."""
        self._untuned = UntunedAnswers()
        self._checks = ModelChecks()
        self._memory = MemoryBudget()
        self._join = join
        self._unfreeable_bytes = 0
        self._ran_out = False
        """True if memory ran out while this process probed, checked or judged."""

    @property
    def worn_out(self) -> bool:
        """True if the worker's process should be replaced because it cannot free enough memory."""
        return self._ran_out or self._unfreeable_bytes > MAX_UNFREEABLE_BYTES

    def probe(self, settings: TrialSettings, adopted: Path | None = None) -> ArmBaseline:
        """Load what an arm's trials share and evaluate the untuned base.

        Args:
            settings: the arm's settings, without a point of its search space.
            adopted: folder of a baseline model that is evaluated instead of trained.

        Raises:
            DataError: the data cannot be read.
            ModelError: the base cannot be loaded.
            ConfigError: the settings do not fit this machine.
            DoesNotFit: the base, its evaluation or a full fine-tune exceeds the device's memory.
        """
        with self._fitting(settings, "the base and the evaluation of one example"):
            return self._probe(settings, adopted)

    @contextmanager
    def _fitting(self, settings: TrialSettings, what: str) -> Iterator[None]:
        """Turn out of memory within the context into DoesNotFit.

        Args:
            settings: the trial.
            what: the things that need the memory, for the message.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            met = first_line(error)
        else:
            return
        self._ran_out = True
        # The base may be half loaded. The free memory is that of a process without one
        self._release_base()
        need = 0.0 if what == CHECKED else self._checks.size(settings, device()).held_mib
        have = device_report(device()).free_mib
        raise DoesNotFit(MemoryShortfall(need_mib=need, have_mib=have, what=what, met=met))

    def _probe(self, settings: TrialSettings, adopted: Path | None) -> ArmBaseline:
        refuse_fp16_on_cpu(settings)
        if not isinstance(settings.adapter, LoraAdapter) and adopted is None:
            self._require_free_memory(settings)
        base = self._base(settings)
        # A resumed study may find the folder removed. The model was stored when it was evaluated
        if adopted is not None and adopted.is_dir():
            require_same_architecture(adopted, base)
        prepared = self._data(settings, base)
        if settings.data.packing:
            require_isolation(base.model)
        prepared.prompts(settings)  # raises if a prompt occurs in the training split
        # Winners are evaluated on general text after the search. Errors in its source must show before
        general = settings.evaluation.general_text.source
        windows = None if general is None else digest(prepared.general_rows(settings))
        judge = BatchHalvingJudge(prepared.judge(settings, base), TrialCosts())
        began = time.monotonic()
        judgement = judge(base.model, JudgementReader.BASELINE)
        judging_s = time.monotonic() - began
        if settings.objective.metric in judgement.failures:
            judgement.value(settings.objective.metric)  # raises
        # A base whose own loss is not finite would make every trial of the arm end as diverged
        if not math.isfinite(judgement.metrics["eval/loss"]):
            loss = judgement.metrics["eval/loss"]
            raise ModelError(f"{settings.model.base_model}: the untuned base's loss is {loss}")
        facts = self._arm_baseline(settings, base, prepared, judgement)
        # Generated answers cost more than the losses, and say nothing about a training step
        judging_s -= judgement.metrics.get(ANSWERING_SECONDS, 0.0)
        return facts.model_copy(update={"general_digest": windows, "judging_s": judging_s})

    def check(self, settings: TrialSettings, expected: InputDigests | None = None) -> TrialSize:
        """Return the size of a trial without loading any weights.

        Raises:
            InputsChanged: the trial is impossible on other files than the expected ones.
            ModelError: the trial is impossible on its model, or exceeds the device's memory.
            ConfigError: the settings do not fit this machine.
        """
        with self._expecting(expected):
            try:
                return self._size(settings)
            except ModelError:
                self._job.require_base_files(settings)
                raise

    def _size(self, settings: TrialSettings) -> TrialSize:
        refuse_fp16_on_cpu(settings)
        with self._fitting(settings, CHECKED):
            return self._checked_size(settings)

    def _checked_size(self, settings: TrialSettings) -> TrialSize:
        size = self._checks.size(settings, device())
        self._job.note(settings, InputDigests(config=self._checks.config_digest(settings)))
        data = settings.data.model_dump_json()
        # Activations are counted if an earlier trial's data tell the length of the longest row
        known = (found for (key, *_), found in self._prepared.items() if key == data)
        self._memory.require(settings.with_rank(size.rank), size, next(known, None))
        return size

    def run(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        provenance: Mapping[str, Any],
        observer: TrialObserver,
        expected: InputDigests | None = None,
    ) -> Outcome:
        """Train one trial and write its folder. Failures of the trial itself are outcomes.

        Raises:
            InputsChanged: data or base model differ from the expected ones. The checkpoints stay.
            Exception: an error in the code, which the worker reports with its traceback.
        """
        folder.path.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.lock, timeout=LOCK_SECONDS), self._expecting(expected):
            started, costs = time.time(), TrialCosts.continued(folder.spent)
            # Before anything of an earlier attempt is removed
            self._confirm_inputs(settings, costs)
            folder.clear_results()
            write_json(folder.provenance, provenance)
            # The stored config has the decided rank, so that this file alone trains the same trial again
            settings, refusal = self._checked(settings)
            write_atomic(folder.config, to_yaml(settings.model_dump(mode="json")))
            outcome = refusal or self._outcome(settings, folder, observer, costs)
            outcome = self._on_clean_base(outcome)
            metrics = {**outcome.metrics, **finite(costs.metrics())}
            outcome = outcome.model_copy(update={"metrics": metrics, "inputs": self._job.found})
            text, document = training_log(settings, outcome, folder, started, costs)
            write_atomic(folder.log_text, text)
            write_json(folder.log_json, document)
            write_atomic(folder.outcome, outcome.model_dump_json(indent=2) + "\n")
            # Checkpoints go last, so a trial killed before this line can continue. A cancelled trial
            # keeps them, because a resumed study continues it
            if outcome.cause != "cancelled":
                shutil.rmtree(folder.checkpoints, ignore_errors=True)
        return outcome

    def judge_baseline(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        provenance: Mapping[str, Any],
        model: Path,
        expected: InputDigests | None = None,
    ) -> Outcome:
        """Evaluate a model that another run trained on the validation split, and store it as a trial.

        All metrics come from this evaluation. The costs of the model's training are unknown here.

        Raises:
            InputsChanged: data or base model differ from the expected ones.
            Exception: an error in the code, which the worker reports with its traceback.
        """
        folder.path.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.lock, timeout=LOCK_SECONDS), self._expecting(expected):
            self._confirm_inputs(settings, TrialCosts())
            folder.clear_results()
            write_atomic(folder.config, to_yaml(settings.model_dump(mode="json")))
            write_json(folder.provenance, provenance)
            try:
                outcome = self._judge_baseline(settings, folder, model)
            except (ModelError, DataError, ConfigError, ArtifactError) as error:
                outcome = Outcome(cause="refused", message=str(error))
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                outcome = Outcome(
                    cause="oom", message=f"{type(error).__name__}: {first_line(error)}"
                )
            outcome = outcome.model_copy(update={"inputs": self._job.found})
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
            judgement = BatchHalvingJudge(judge, costs)(tuned, JudgementReader.ADOPTED)
        metrics = {
            **best_figures((), judgement.metrics, best_step=0),
            **parameter_figures(count_parameters(tuned)),
            **costs.metrics(),
            "cost/artifact_mib": size_mib(folder.model),
        }
        value = judgement.value(settings.objective.metric)
        return Outcome(cause="finished", best_value=value, best_step=0, metrics=finite(metrics))

    def test(
        self,
        settings: TrialSettings,
        folder: TrialFolder | None,
        kinds: Sequence[HeldOutKind],
        expected: InputDigests | None = None,
    ) -> HeldOutLosses:
        """Evaluate a trial's stored artifact, or the untuned base, on texts that no search uses.

        The base has the trial's quantization and dtype, so the same judge on the validation split
        would reproduce the trial's loss.

        Args:
            settings: the trial's settings.
            folder: the trial's folder, or None for the untuned base.
            kinds: the texts to evaluate on.
            expected: the digests of data and base model that the search has found.

        Raises:
            InputsChanged: data or base model differ from the expected ones.
            ArtifactError: the artifact is missing or differs from its manifest.
            DataError: a text is not configured.
        """
        with (
            self._expecting(expected),
            self._fitting(settings, "the model and the evaluation of one example"),
        ):
            return self._test(settings, folder, kinds)

    def _test(
        self, settings: TrialSettings, folder: TrialFolder | None, kinds: Sequence[HeldOutKind]
    ) -> HeldOutLosses:
        judges = self._held_out_judges(settings, kinds)
        if folder is None:
            return _held_out_losses(judges, self._base(settings).model, settings)
        artifact = folder.artifact
        if artifact is None:
            raise ArtifactError(f"{folder.path} contains neither an adapter nor a model")
        verify_manifest(artifact)
        if isinstance(settings.adapter, LoraAdapter):
            if settings.evaluation.serve_as == "merged":
                return self._test_merged(judges, settings, folder)
            return self._test_adapter(judges, settings, settings.adapter, artifact)
        return _held_out_losses(judges, self._stored(settings, artifact), settings)

    def _stored(self, settings: TrialSettings, folder: Path) -> PreTrainedModel:
        """Load the stored weights of a full fine-tune, with the dtypes of the training."""
        self._release_base()  # the stored model replaces the base in memory
        stored = settings.model.model_copy(update={"base_model": str(folder), "revision": None})
        return load_base(stored, settings.quantization, trained=True).model

    def _held_out_judges(self, settings: TrialSettings, kinds: Sequence[HeldOutKind]) -> Judges:
        """Return judges of held-out texts, which keep no reference to a model."""
        base = self._base(settings)
        prepared = self._data(settings, base)
        judges = {"test": prepared.test_judge, "general": prepared.general_judge}
        if "general" in kinds:
            self._job.note(settings, self._general_digest(settings, prepared))
        return {kind: judges[kind](settings, base) for kind in kinds}

    def _general_digest(self, settings: TrialSettings, prepared: PreparedData) -> InputDigests:
        try:
            return InputDigests(general=digest(prepared.general_rows(settings)))
        except DataError as error:
            self._job.require_general(settings, error)
            raise

    def _test_adapter(
        self, judges: Judges, settings: TrialSettings, adapter: LoraAdapter, artifact: Path
    ) -> HeldOutLosses:
        model = load_adapter(self._base(settings).model, artifact)
        try:
            return _held_out_losses(judges, model, settings)
        finally:
            detach(model)
            if touches_base(adapter):
                self._warm.clear()

    def _test_merged(
        self, judges: Judges, settings: TrialSettings, folder: TrialFolder
    ) -> HeldOutLosses:
        """Evaluate a trial's adapter merged into its unquantized base, and keep nothing of it."""
        self._release_base()  # the merged model replaces the base in memory
        self._job.require_loaded_files(settings)  # merging reads the base's files again
        # In the trial's folder, because a temporary folder may be a small file system in memory
        with tempfile.TemporaryDirectory(prefix=".merged_", dir=folder.path) as place:
            merged = load_merged(settings, folder, Path(place) / "model")
            return _held_out_losses(judges, merged.model, settings)

    def _require_free_memory(self, settings: TrialSettings) -> None:
        """Refuse a full fine-tune whose weights, gradients and optimizer states exceed free memory."""
        # Free memory here, not total as for single trials: this decides on a whole arm at its start,
        # and other processes will not leave the device for this study
        self._release_base()
        need, have = self.check(settings).held_mib, device_report(device()).free_mib
        if need > have:
            raise DoesNotFit(MemoryShortfall(need_mib=need, have_mib=have))

    def _on_clean_base(self, outcome: Outcome) -> Outcome:
        """Return the outcome if the warm base is unchanged, or an error outcome otherwise."""
        # A changed base would silently falsify every later trial, so the next trial loads it again.
        # The process stays: the fault is in the trial's code
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
            "result is invalid. The base will be loaded again for the next trial"
        )
        return Outcome(cause="error", message=message, steps=outcome.steps)

    def _checked(self, settings: TrialSettings) -> tuple[TrialSettings, Outcome | None]:
        """Return settings with the rank decided, or unchanged settings and a refusal."""
        # The worker's check does not cover finalists and single trials, so every trial is checked here
        try:
            return settings.with_rank(self._size(settings).rank), None
        except (ModelError, ConfigError) as error:
            self._job.require_base_files(settings)
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
        except MetricFailed as error:  # without a value of its objective, the point is impossible
            return Outcome(cause="diverged", message=str(error), steps=costs.steps)
        except (ModelError, DataError, ConfigError) as error:
            # Settings that trained a step were possible, so the fault is in the code
            cause: Cause = "error" if costs.steps else "refused"
            return Outcome(cause=cause, message=str(error), steps=costs.steps)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                self._warm.clear()  # the error may have left the base in any state
                raise
            message = f"{type(error).__name__}: {first_line(error)}"
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
        """Train, with micro-batches of half the size after each out of memory.

        Every attempt builds the model from the same seed and continues from the newest checkpoint, so
        the losses are those of a trial that had the smaller micro-batch from the start (with dropout
        only in distribution, because masks depend on the micro-batch).
        """
        with costs.stage("load"):
            self._base(settings)  # outside the loop: if the base does not fit, no micro-batch helps
        with costs.stage("data"):
            # No local variable refers to the base, because full fine-tuning releases it on the way
            prepared = self._data(settings, self._base(settings))
            padding_free = self._base(settings).padded_because is None
            fits = self._memory.fits(prepared, padding_free=padding_free)
        with costs.stage("load"):
            settings = resolve(settings, fits, on_gpu=device().type == "cuda")
        while True:
            try:
                outcome = self._attempt(settings, folder, observer, costs)
                break
            except StageOutOfMemory:
                raise  # evaluation and answers have batches of their own
            except (MemoryError, RuntimeError) as error:
                smaller = halved(settings)
                if not out_of_memory(error) or smaller is None:
                    raise
            # Memory of the failed step is free only after the except block, which holds its traceback
            settings = smaller
            costs.count_retry()
            _free_unreferenced()
        ended = outcome.cause in SELF_ENDED
        if settings.artifacts.merged and ended and folder.adapter.exists():
            self._release_base()  # the merged model replaces the base in memory
            # Merging reads the base's files again, which were read before the training
            self._job.require_loaded_files(settings)
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
        prompt_answers = PromptAnswers(settings, prepared, base, costs)
        with costs.stage("eval"):
            untuned = self._untuned.of(prompt_answers, base.model)
        with (
            self._join(settings, folder.checkpoints, self._job.found) as ranks,
            self._inputs(settings, base, prepared, ranks, costs) as inputs,
        ):
            dtypes = sorted(dtype_name(dtype) for dtype in trained_dtypes(inputs.model))
            costs.facts["Precision"] += f". Trained weights are {', '.join(dtypes)}"
            outcome, trained = train_trial(inputs, settings, folder, observer, costs)
            if trained is not None and outcome.cause in SELF_ENDED:
                with costs.stage("eval"):
                    prompt_answers.write(untuned, prompt_answers.answers(trained), folder)
        _add_advice(outcome, prepared, costs)
        return outcome

    def follow(
        self,
        settings: TrialSettings,
        checkpoints: Path,
        ranks: RankGroup,
        expected: InputDigests,
    ) -> None:
        """Train as one rank of a trial that another process leads.

        Raises:
            InputsChanged: this process has loaded other data or another base model than the leader.
        """
        with self._expecting(expected):
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
        """Yield a trial's inputs, with its adapter on the warm base for the duration of the context."""
        with costs.stage("load"):
            set_seed(settings.init_seed)  # before the adapter, whose initialisation is random
            model = self._trainable(settings, base)
        if isinstance(model, PeftModel):
            costs.facts["Adapter"] = describe_reach(model)
        try:
            with module_restored(base.model):
                yield TrialInputs(
                    model=model,
                    tokenizer=base.tokenizer,
                    train=prepared.train,
                    judge=prepared.judge(settings, base),
                    form=artifact_form(settings, base, prepared),
                    ordered=prepared.splits.ordered,
                    compute_dtype=base.compute_dtype,
                    ranks=ranks,
                )
        finally:
            # Later trials must not inherit what libraries keep for the life of a process
            self._unfreeable_bytes += forget_states()
            if isinstance(model, PeftModel):
                detach(model)
            if touches_base(settings.adapter):  # detach cannot restore the base's own weights
                self._warm.clear()

    def _trainable(self, settings: TrialSettings, base: LoadedBase) -> PreTrainedModel | PeftModel:
        """Return the model to train: base and adapter, the base itself, or its shares on the ranks."""
        if isinstance(settings.adapter, LoraAdapter):
            return attach(base.model, settings.adapter)
        if not settings.training.fsdp:
            return base.model
        self._warm.clear()  # load_sharded takes the base's storage
        return load_sharded(base.model, settings.training.shards, base.compute_dtype)

    def _base(self, settings: TrialSettings) -> LoadedBase:
        """Return the base of a trial, loaded now or by an earlier trial."""
        trained = not isinstance(settings.adapter, LoraAdapter)
        liger = use_liger_kernel(settings)  # Liger's layers stay in a base, so the key contains it
        held = (settings.model.model_dump_json(), settings.quantization.model_dump_json())
        key = " ".join([*held, str(trained), str(liger)])
        if key not in self._warm:
            self._release_base()  # before loading: two bases may not fit in memory
            try:
                with stage("loading the base model"):
                    self._warm[key] = load_base(
                        settings.model, settings.quantization, trained=trained
                    )
            except ModelError:
                self._job.require_base_files(settings)
                raise
            self._checksums = {key: checksums(self._warm[key].model)}
        base = self._warm[key]
        self._job.note(settings, InputDigests(base=base.digest, config=base.config_digest))
        return base

    def _release_base(self) -> None:
        """Release the base, and objects of earlier trials that only the garbage collector frees."""
        self._warm.clear()
        _free_unreferenced()

    def _data(self, settings: TrialSettings, base: LoadedBase) -> PreparedData:
        # Equal weights say nothing about tokenizer and chat template, which decide the tokens
        over_length = settings.evaluation.over_length
        chosen = f"{settings.data.model_dump_json()} {over_length}"
        key = (chosen, base.tokenizer_digest, positions(base.model.config))
        try:
            if key not in self._prepared:
                with stage("reading and tokenizing the data"):
                    self._prepared[key] = prepare(settings.data, base, over_length)
            prepared = self._prepared[key]
            found = prepared.inputs(settings, base)
        except (DataError, ConfigError) as error:
            self._job.require_data(settings, error)
            raise
        self._job.note(settings, found)
        return prepared

    @contextmanager
    def _expecting(self, expected: InputDigests | None) -> Iterator[None]:
        """Compare everything that is loaded within the context with a job's digests."""
        self._job = JobInputs(expected or InputDigests())
        try:
            yield
        except InputsChanged:
            # When the files have been put back, they must be read again
            self._warm.clear()
            self._prepared.clear()
            self._checks = ModelChecks()
            raise
        finally:
            self._job = JobInputs()  # a probe expects nothing

    def _confirm_inputs(self, settings: TrialSettings, costs: TrialCosts) -> None:
        """Load base and data to compare them with the digests that the job expects, if it does.

        Raises:
            InputsChanged: they differ, or cannot be loaded any more.
        """
        if not self._job.checked:
            return
        with suppress(ModelError, DataError, ConfigError, MemoryError, RuntimeError):
            # Any other problem is met again, and becomes the trial's outcome
            with costs.stage("load"):
                base = self._base(settings)
            with costs.stage("data"):
                self._data(settings, base)

    def _arm_baseline(
        self,
        settings: TrialSettings,
        base: LoadedBase,
        prepared: PreparedData,
        judgement: Judgement,
    ) -> ArmBaseline:
        splits, metrics = prepared.splits, judgement.metrics
        found = prepared.inputs(settings, base)
        report = device_report(device())
        return ArmBaseline(
            base_digest=base.digest,
            base_commit=base.commit,
            base_metrics=finite(metrics),
            base_parameters=int(base.model.num_parameters()),
            data_digest=prepared.data_digest,
            data_source=splits.source,
            data_format=splits.format,
            rows={name: len(split.rows) for name, split in prepared.encoded.items()},
            dropped=prepared.dropped,
            changed=prepared.changed,
            unread=splits.unread,
            target_tokens=prepared.validation.target_tokens,
            device=f"{report.name}, {torch.get_num_threads()} threads"
            if device().type == "cpu"
            else report.name,
            dtype=dtype_name(base.compute_dtype),
            config_digest=base.config_digest,
            judged_digest=found.judged,
            trained_digest=found.trained,
            test_digest=found.test,
            padded_because=base.padded_because if device().type == "cpu" else None,
            base_remarks=(*base.remarks, *judgement.failures.values()),
            equal_presets=equal_presets_of(base.model),
        )

    def _record_facts(
        self,
        settings: TrialSettings,
        base: LoadedBase,
        prepared: PreparedData,
        folder: TrialFolder,
        costs: TrialCosts,
    ) -> None:
        """Record the data and the machine for the training log and the outcome, and the data card."""
        training, report = settings.training, device_report(device())
        write_atomic(folder.data_card, prepared.card.markdown())
        padding_free = base.padded_because is None
        estimate = self._memory.estimate_mib(settings, prepared, padding_free=padding_free)
        costs.facts = {
            "Device": f"{report.name}, {report.total_mib:,.0f} MiB",
            "Precision": base.dtype_reason,
            "Checkpointing": "activations recomputed"
            if training.activation_checkpointing
            else "activations kept",
            "Batches": "without padding"
            if base.padded_because is None
            else f"padded: {base.padded_because}",
        }
        if base.quantized_share is not None:
            costs.figures["parameters/quantized_share"] = base.quantized_share
        if base.remarks:
            costs.facts["Base"] = ". ".join(base.remarks)
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
    # The allocator returns only blocks that no tensor uses any more
    torch.cuda.empty_cache()


def _held_out_losses(
    judges: Judges, model: PreTrainedModel | PeftModel, settings: TrialSettings
) -> HeldOutLosses:
    # Only the test split stands for the task, so only there the objective has a meaning.
    metrics = {"test": settings.objective.metric, "general": ""}
    return HeldOutLosses(
        **{
            kind: _example_losses(judge, model, HELD_OUT_READERS[kind], metrics[kind])
            for kind, judge in judges.items()
        }
    )


def _example_losses(
    judge: ModelJudge, model: PreTrainedModel | PeftModel, reader: JudgementReader, metric: str
) -> ExampleLosses:
    judgement = BatchHalvingJudge(judge, TrialCosts())(model, reader)
    return ExampleLosses(
        nll=tuple(loss.nll for loss in judgement.examples),
        tokens=tuple(loss.tokens for loss in judgement.examples),
        groups=tuple(judge.groups),
        scores=judgement.scores_of(metric),
    )


def _add_advice(outcome: Outcome, prepared: PreparedData, costs: TrialCosts) -> None:
    """Add a warning to the log if the perplexity is implausibly low for unseen text."""
    perplexity = outcome.metrics.get("best/eval_perplexity")
    if perplexity is not None and {"text", "book"} & set(prepared.splits.formats):
        costs.advice += [words for words in [plausibility_warning(perplexity)] if words]
