"""A runner that only pretends to train: smooth metrics over the settings, milliseconds a trial.

For tests of the driver and for trying out a study's set-up. `workers.fake.plan` says which trials fail
and how. All others finish.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from sweeper.config.input_sources import require_same
from sweeper.config.settings import (
    LOSS_METRICS,
    ROUGE_METRICS,
    SCORED_METRICS,
    FakeTrainer,
    LoraAdapter,
    TrialSettings,
    sources,
)
from sweeper.core.errors import ArtifactError, DoesNotFit, TrialDiverged
from sweeper.core.input_digests import InputDigests
from sweeper.core.outcome import (
    LOOK_ROWS,
    SELF_ENDED,
    ArmBaseline,
    Cause,
    ExampleLosses,
    ExampleScores,
    HeldOutKind,
    HeldOutLosses,
    Outcome,
    TrialSize,
)
from sweeper.core.paths import TrialFolder, write_atomic, write_json
from sweeper.core.spool import MetricsSpool
from sweeper.core.stored_files import read_object
from sweeper.core.value import MemoryShortfall
from sweeper.modeling.target_modules import equal_presets, resolve_targets
from sweeper.training.observer import TrialObserver

BASE_LOSS = 4.5
BASE_SCORE = 0.1
"""The untuned base's ROUGE and value of the user's own metrics, all in 0..1."""
BYTES_PER_TOKEN = 4
EVALUATIONS = 5
TEST_TOKENS = (8, 12, 10, 9, 11, 10, 10, 10, 10, 10)
"""Target tokens of each example of a test split that does not exist."""
VALIDATION_ROWS = 10
"""Rows of a validation split that does not exist."""
# as in windows of 128 tokens, the first of which is not predicted
GENERAL_TOKENS = (127,) * 8
"""Tokens of each window of a general text that does not exist."""
GENERAL_LOSS = 3.6
HANG_SECONDS = 3600.0
ADAM_BYTES = 16
"""Bytes for each trained fp32 parameter: itself, its gradient and two moments."""


def fake_loss(settings: TrialSettings, fraction: float = 1.0) -> float:
    """Return the nats after a fraction of the schedule: a valley in log learning rate.

    The valley is shallower for small r. Its floor lies at 5e-3 for LoRA and at 5e-4 for full
    fine-tuning. Seed 0 has no luck.
    """
    adapter = _ranked(settings).adapter
    floor, best = (3.95, 5e-4)
    if isinstance(adapter, LoraAdapter):
        floor, best = 3.9 + 0.2 / adapter.rank, 5e-3
    distance = math.log10(settings.training.learning_rate / best)
    luck = 0.01 * math.sin(1000 * settings.seed * settings.training.learning_rate)
    final = min(floor + 0.15 * distance**2 + luck, BASE_LOSS)
    return final + (BASE_LOSS - final) * (1 - fraction) ** 2


def fake_score(settings: TrialSettings, fraction: float = 1.0) -> float:
    """Return the ROUGE after a fraction of the schedule: a hill in log learning rate.

    Its top lies at a third of the loss's best rate, so the best trial by ROUGE is another one than the
    best by loss.
    """
    best = 5e-3 / 3 if isinstance(settings.adapter, LoraAdapter) else 5e-4 / 3
    distance = math.log10(settings.training.learning_rate / best)
    final = max(0.5 - 0.1 * distance**2, BASE_SCORE)
    return final - (final - BASE_SCORE) * (1 - fraction) ** 2


def fake_metrics(settings: TrialSettings, fraction: float = 1.0) -> dict[str, float]:
    """Return a judge's metrics after a fraction of the schedule (0: the untuned base).

    ROUGE and the user's metrics are included only if the settings ask for generated answers. A
    metric that the objective minimises counts errors: one minus the score.
    """
    loss = fake_loss(settings, fraction)
    metrics = {
        "eval/loss": loss,
        "eval/perplexity": math.exp(loss),
        "eval/bits_per_byte": loss / math.log(2) / BYTES_PER_TOKEN,
    }
    if settings.evaluation.generation.num_examples == 0:
        return metrics
    score, objective = fake_score(settings, fraction), settings.objective
    metrics |= dict.fromkeys(ROUGE_METRICS, score)
    metrics |= {f"eval/{name}": score for name in settings.evaluation.metrics}
    if objective.direction == "minimize" and objective.metric not in LOSS_METRICS:
        metrics[objective.metric] = 1 - score
    return metrics


def fake_parameters(settings: TrialSettings) -> float:
    """Return the trainable parameters: r times a thousand, or all of the base."""
    adapter = _ranked(settings).adapter
    return 1000.0 * adapter.rank if isinstance(adapter, LoraAdapter) else 1_000_000.0


FAKE_MODULES = tuple(
    f"model.layers.{layer}.{name}"
    for layer in range(4)
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
)
"""The linear modules of a base that does not exist: Llama's."""


def fake_inputs(settings: TrialSettings) -> InputDigests:
    """Return digests of the local files that the settings name. Other names stand for their content."""
    data, base = settings.data, Path(settings.model.base_model)
    train = [source.path for source in sources(data.train)]
    judged = [source.path for source in sources(data.validation)] or train
    rules: list[str | Path] = [
        data.template,
        *(base / name for name in ("tokenizer.json", "chat_template.jinja")),
    ]
    weights = sorted(base.glob("*.safetensors")) if base.is_dir() else []
    return InputDigests(
        # a source with options may name a secret, which is resolved here and a reference elsewhere
        data=f"fake {data.train if isinstance(data.train, str) else _content([str(data.train)])}",
        base=_content(weights) if weights else "fake",
        config=_content([base / "config.json"]),
        judged=_content([*judged, *rules]),
        trained=_content([*train, *rules]),
        test="fake" if data.test_ratio else None,
        general="fake" if settings.evaluation.general_text.source else None,
    )


def _content(names: Iterable[str | Path]) -> str:
    digest = hashlib.sha256()
    for name in names:
        path = Path(name)
        digest.update(path.read_bytes() if path.is_file() else str(name).encode())
    return digest.hexdigest()


def fake_mib(settings: TrialSettings) -> float:
    """Return the memory of what is trained, in MiB."""
    return ADAM_BYTES * fake_parameters(settings) / 2**20


class FakeRunner:
    """Writes what a real runner writes, but for the weights."""

    worn_out = False

    def __init__(self, settings: FakeTrainer) -> None:
        self._settings = settings

    def probe(self, settings: TrialSettings, adopted: Path | None = None) -> ArmBaseline:
        """Return the facts about a base that does not exist.

        Raises:
            DoesNotFit: a full fine-tune is larger than `workers.fake.free_mib`.
        """
        self._ignore("probe")
        if settings.adapter.method == "none" and adopted is None:
            self._size(settings)
        counts = {"train": 100, "validation": VALIDATION_ROWS}
        counts["test"] = len(TEST_TOKENS) if settings.data.test_ratio else 0
        found = fake_inputs(settings)
        return ArmBaseline(
            base_digest=found.base or "",
            base_commit=None,
            base_metrics=fake_metrics(settings, 0.0),
            base_parameters=1_000_000,
            data_digest=found.data or "",
            data_source="fake",
            data_format="alpaca",
            rows=counts,
            dropped={},
            target_tokens=100,
            device="fake",
            dtype="float32",
            general_digest=found.general,
            config_digest=found.config,
            judged_digest=found.judged,
            trained_digest=found.trained,
            test_digest=found.test,
            equal_presets=equal_presets(FAKE_MODULES),
        )

    def check(self, settings: TrialSettings, expected: InputDigests | None = None) -> TrialSize:
        """Return the size of a trial on FAKE_MODULES, with a rank for each thousand parameters.

        Raises:
            ModelError: target_modules or layers_to_transform name what is not among them.
            DoesNotFit: it needs more than `workers.fake.free_mib`.
        """
        self._ignore("check")
        return self._size(settings)

    def _size(self, settings: TrialSettings) -> TrialSize:
        ranked = settings
        if isinstance(adapter := settings.adapter, LoraAdapter):
            resolve_targets(adapter.target_modules, FAKE_MODULES, adapter.layers_to_transform)
            ranked = _ranked(settings)
            adapter = ranked.adapter
        trainable = fake_parameters(ranked)
        need, have = fake_mib(ranked), self._settings.free_mib
        if have is not None and need > have:
            raise DoesNotFit(MemoryShortfall(need_mib=need, have_mib=have))
        rank = adapter.rank if isinstance(adapter, LoraAdapter) else None
        return TrialSize(trainable=round(trainable), total=1_000_000, rank=rank, held_mib=need)

    def run(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        provenance: dict[str, Any],
        observer: TrialObserver,
        expected: InputDigests | None = None,
    ) -> Outcome:
        """Pretend to train, or fail as the plan says for this trial.

        Raises:
            InputsChanged: a file has other content than expected.
        """
        found = _required(settings, expected)
        settings = _ranked(settings)
        folder.path.mkdir(parents=True, exist_ok=True)
        write_atomic(folder.config, json.dumps(settings.model_dump(mode="json")))
        write_json(folder.provenance, provenance)
        try:
            outcome = self._train(settings, folder, observer)
        except TrialDiverged as error:
            outcome = Outcome(cause="diverged", message=str(error), steps=2)
        outcome = outcome.model_copy(update={"inputs": found})
        write_atomic(folder.outcome, outcome.model_dump_json())
        if outcome.cause != "cancelled":
            shutil.rmtree(folder.checkpoints, ignore_errors=True)
        return outcome

    def judge_baseline(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        provenance: dict[str, Any],
        model: Path,
        expected: InputDigests | None = None,
    ) -> Outcome:
        """Pretend to judge a model that is as good as the fake trainer's.

        Raises:
            InputsChanged: a file has other content than expected.
        """
        found = _required(settings, expected)
        write_atomic(folder.config, json.dumps(settings.model_dump(mode="json")))
        write_json(folder.provenance, provenance)
        outcome = _ended(settings, 0.0, "finished", 1, 0, 1)
        outcome = outcome.model_copy(update={"inputs": found})
        write_atomic(folder.outcome, outcome.model_dump_json())
        return outcome

    def test(
        self,
        settings: TrialSettings,
        folder: TrialFolder | None,
        kinds: Sequence[HeldOutKind],
        expected: InputDigests | None = None,
    ) -> HeldOutLosses:
        """Return the losses on texts that do not exist.

        Raises:
            InputsChanged: a file has other content than expected.
        """
        self._ignore("judge")
        _required(settings, expected)
        if folder is not None and not folder.outcome.exists():
            raise ArtifactError(f"{folder.path}: fake: nothing was trained here")
        judges = {"test": _on_test_split, "general": _on_general_text}
        return HeldOutLosses(**{kind: judges[kind](settings, folder) for kind in kinds})

    def _train(
        self, settings: TrialSettings, folder: TrialFolder, observer: TrialObserver
    ) -> Outcome:
        started = time.monotonic()
        total, room = self._settings.steps, self._settings.room_mib
        if room is not None and fake_mib(settings) > room:
            return Outcome(cause="oom", message=f"fake: more than {room:g} MiB")
        every = max(1, total // EVALUATIONS)
        objective = settings.objective
        first, best, best_step = _resume(folder)
        spool = MetricsSpool(folder.metrics, first)
        for step in range(first + 1, total + 1):
            time.sleep(self._settings.step_seconds)
            self._misbehave(_planned(self._settings, folder), step)
            observer.progress(step, total, 1000.0)
            if step % every == 0 or step == total:
                metrics = fake_metrics(settings, step / total)
                worth = objective.order(metrics[objective.metric])
                best, best_step = min((best, best_step), (worth, step))
                spool.write(step, metrics)
                observer.evaluated(step, total, metrics[objective.judged_while_training])
                _save(folder, step, best, best_step)
            if cause := observer.stop_cause():
                _save(folder, step, best, best_step)
                return _ended(settings, time.monotonic() - started, cause, best_step, step, total)
        if _planned(self._settings, folder) == "oom":
            return Outcome(cause="oom", message="fake: out of memory", steps=total)
        return _ended(settings, time.monotonic() - started, "finished", best_step, total, total)

    def _ignore(self, request: Literal["probe", "check", "judge"]) -> None:
        """Hang or die instead of answering, if the settings say so."""
        match self._settings.requests.get(request):
            case "hang":
                time.sleep(HANG_SECONDS)
            case "crash":
                os._exit(9)

    def _misbehave(self, plan: str, step: int) -> None:
        """Fail half-way, so that something was trained and reported before."""
        if step != max(2, self._settings.steps // 2):
            return
        match plan:
            case "diverge":
                raise TrialDiverged(f"fake: train/loss is nan at step {step}")
            case "error":
                raise ValueError("fake: an error in the code")
            # without any cleanup, as when the kernel kills a process
            case "crash":
                os._exit(9)
            case "context":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            case "native_oom":
                # bitsandbytes prints this line and ends the process when CUDA refuses a call
                print("Error out of memory at line 541 in file /src/csrc/ops.cu", flush=True)
                os._exit(1)
            case "hang":
                time.sleep(HANG_SECONDS)


def _required(settings: TrialSettings, expected: InputDigests | None) -> InputDigests:
    found = fake_inputs(settings)
    require_same(expected or InputDigests(), found, settings)
    return found


def _on_test_split(settings: TrialSettings, folder: TrialFolder | None) -> ExampleLosses:
    """Return losses a little above validation, on examples of which some are harder than others."""
    loss = BASE_LOSS if folder is None else fake_loss(settings)
    nll = tuple(
        count * (loss + 0.02 + 0.1 * math.cos(place) + 0.005 * math.sin(100 * loss * place))
        for place, count in enumerate(TEST_TOKENS)
    )
    return ExampleLosses(nll=nll, tokens=TEST_TOKENS, scores=_scores(settings, folder is None))


def _scores(settings: TrialSettings, untuned: bool) -> ExampleScores | None:
    """Return the objective on each example of the test split, where it is made of such scores."""
    metric = settings.objective.metric
    if metric not in SCORED_METRICS:
        return None
    mean = fake_metrics(settings, 0.0 if untuned else 1.0).get(metric, BASE_SCORE)
    luck = 0.0 if untuned else 0.002 * math.sin(100 * settings.seed)
    values = tuple(
        mean + luck + 0.02 * math.cos(place) + 0.002 * math.sin(1000 * mean * place)
        for place in range(len(TEST_TOKENS))
    )
    return ExampleScores(metric=metric, values=values, weights=(1.0,) * len(values))


def _on_general_text(settings: TrialSettings, folder: TrialFolder | None) -> ExampleLosses:
    """Return losses that show that full fine-tuning forgets ten times as much as LoRA."""
    forgotten = 0.02 if isinstance(settings.adapter, LoraAdapter) else 0.2
    loss = GENERAL_LOSS + (0.0 if folder is None else forgotten)
    nll = tuple(
        count * (loss + 0.1 * math.cos(place)) for place, count in enumerate(GENERAL_TOKENS)
    )
    return ExampleLosses(nll=nll, tokens=GENERAL_TOKENS)


def _ranked(settings: TrialSettings) -> TrialSettings:
    """Return the settings with their rank decided: a thousand parameters for each r."""
    adapter = settings.adapter
    if not isinstance(adapter, LoraAdapter) or adapter.trainable_parameters is None:
        return settings
    return settings.with_rank(max(1, round(adapter.trainable_parameters / 1000)))


def _planned(settings: FakeTrainer, folder: TrialFolder) -> str:
    """Return the planned end of a trial of the lora arm, or of a finalist."""
    if folder.path.parent.name == "finalists":
        return settings.finalists.get(folder.path.name, "finish")
    if folder.path.parent.name != "lora":
        return "finish"
    return settings.plan.get(int(folder.path.name.rpartition("_")[2]), "finish")


def _save(folder: TrialFolder, step: int, best: float, best_step: int) -> None:
    found = None if math.isinf(best) else best
    state = {"step": step, "best": found, "best_step": best_step}
    write_json(folder.checkpoints / "fake.json", state)


def _resume(folder: TrialFolder) -> tuple[int, float, int]:
    """Return the last step, the best value and its step of an earlier attempt."""
    path = folder.checkpoints / "fake.json"
    nothing: dict[str, Any] = {"step": 0, "best": None, "best_step": 0}
    state = {**nothing, **read_object(path, "the fake trial starts again")}
    best = math.inf if state["best"] is None else float(state["best"])
    return int(state["step"]), best, int(state["best_step"])


def _ended(
    settings: TrialSettings, seconds: float, cause: Cause, best_step: int, steps: int, total: int
) -> Outcome:
    if best_step == 0:
        return Outcome(cause=cause, steps=steps)
    kept = fake_metrics(settings, best_step / total)
    metrics = {
        **{name.replace("eval/", "best/eval_"): value for name, value in kept.items()},
        **{"parameters/trainable": fake_parameters(settings), "cost/seconds": seconds},
    }
    value = kept[settings.objective.metric]
    sample = settings.evaluation.look_rows or VALIDATION_ROWS
    if cause not in SELF_ENDED and sample < VALIDATION_ROWS:
        metrics[LOOK_ROWS] = float(sample)
    return Outcome(cause=cause, best_value=value, best_step=best_step, steps=steps, metrics=metrics)
