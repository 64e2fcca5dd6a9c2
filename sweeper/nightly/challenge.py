"""Challenge of the champion by a night's best trial: evaluate both, decide, move the alias.

The rule of the decision is in `sweeper.nightly.champion`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sweeper.core.errors import WorkerError
from sweeper.core.outcome import GATE_BASE, GateFigures, GateRequest
from sweeper.core.paths import StudyFolder, size_mib, write_atomic
from sweeper.core.redaction import redact
from sweeper.nightly.champion import ChallengeEvidence, ChampionDecision, decide
from sweeper.nightly.night_record import BestTrial
from sweeper.nightly.nightly_set import ChampionRules, SetEntry
from sweeper.reporting.intervals import SeedLosses, pooled_spread
from sweeper.reporting.results import load_results
from sweeper.search.study_plan import StudyPlan
from sweeper.tracking.registry import ROLLED_BACK_TAG, ModelRegistry, ModelVersion
from sweeper.tracking.tracker_factory import make_registry

CHALLENGER, CHAMPION = "challenger", "champion"
GATE_SECONDS = 4 * 3600.0
"""Time limit of the evaluation on the gate split: that of any answer, workers.probe_timeout_s."""
LOOK_TAG = "sweeper.gate_look."
"""Prefix of a version tag, followed by the number of a look at the gate. The value names the pair."""


GateJudge = Callable[[str, dict[str, Path]], GateFigures]
"""Function that evaluates trials' folders, given by name, on a gate source.

Its result also holds `base`, the untuned base of the first trial.
"""


def judge_in_subprocess(gate: str, trials: dict[str, Path]) -> GateFigures:
    """Evaluate in a subprocess, so that the night imports no torch and frees the memory afterwards.

    Raises:
        WorkerError: the subprocess failed, or took longer than GATE_SECONDS.
    """
    with tempfile.TemporaryDirectory(prefix="sweeper-gate-") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        folders = {name: path.resolve() for name, path in trials.items()}
        write_atomic(request, GateRequest(gate=gate, trials=folders).model_dump_json())
        command = [sys.executable, "-m", "sweeper.training.gate_judge", str(request), str(answer)]
        # Spinning OpenMP threads slow down other processes on the machine.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=environment,
                check=False,
                timeout=GATE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise WorkerError(
                "the process that evaluates the gate split gave no answer for "
                f"{GATE_SECONDS / 3600:g} h and was ended"
            ) from None
        if done.returncode != 0 or not answer.exists():
            raise WorkerError(
                f"the process that evaluates the gate split failed:\n{redact(done.stderr[-2000:])}"
            )
        return GateFigures.model_validate_json(answer.read_text(encoding="utf-8"))


def judged(found: GateFigures, name: str) -> SeedLosses:
    """Return one model's losses on the gate, as of one seed."""
    return SeedLosses(np.array([found.nll[name]]), np.array(found.tokens, dtype=np.float64))


def challenge(
    entry: SetEntry, plan: StudyPlan, best: BestTrial, rules: ChampionRules, judge: GateJudge
) -> ChampionDecision | None:
    """Decide about the night's best trial, and move the alias if the trial won.

    Args:
        entry: the experiment of the set.
        plan: the study that was run.
        best: the best trial so far.
        rules: the limits for a promotion.
        judge: function that evaluates on the gate split.

    Returns:
        The decision, or None without tracking.

    Raises:
        SweeperError: the registry or the judge fails.
    """
    registry = make_registry(plan.settings.tracking)
    if registry is None:
        return None
    study, trial = plan.study.study_name, f"{best.arm}/{best.number:04d}"
    who = f"{study}/{trial}"
    champion = registry.champion(entry.label)
    name = None if champion is None else f"version {champion.number}"
    # A study that continues over nights often keeps its best trial.
    if champion is not None and (champion.study, champion.trial) == (study, trial):
        return _undecided(entry, who, name, "it is already the champion")
    by_hand = f"promote by hand: sweeper champion promote {entry.label} {study} {trial}"
    taken_back = _rolled_back(registry.versions(entry.label), study, trial)
    # A person who rolled back knows something that no gate measures.
    if taken_back is not None:
        reason = (
            f"it was rolled back by hand (version {taken_back.number}). To restore it, {by_hand}"
        )
        return _undecided(entry, who, name, reason)
    if champion is not None and _pair(entry, study, trial) in _looks(champion):
        return _undecided(
            entry, who, name, "it was judged against this champion on this gate before"
        )
    if entry.gate is None:
        reason = f"no gate split is set. Set one (experiments[].gate=FILE), or {by_hand}"
        return _undecided(entry, who, name, reason)
    return _evaluate_and_decide(entry, plan, best, champion, rules, judge, registry)


def _evaluate_and_decide(
    entry: SetEntry,
    plan: StudyPlan,
    best: BestTrial,
    champion: ModelVersion | None,
    rules: ChampionRules,
    judge: GateJudge,
    registry: ModelRegistry,
) -> ChampionDecision:
    study = plan.study.study_name
    folder = StudyFolder(Path(plan.settings.output_dir) / study).trial(best.arm, best.number)
    trials = {CHALLENGER: folder.path}
    if champion is not None:
        # Both are evaluated again on the same examples, since the gate may have changed.
        trials[CHAMPION] = champion.folder
    name = None if champion is None else f"version {champion.number}"
    trial = f"{best.arm}/{best.number:04d}"
    assert entry.gate is not None
    found = judge(entry.gate, trials)
    if found.problem is not None:
        return _undecided(entry, f"{study}/{trial}", name, found.problem)
    looks = {} if champion is None else _looks(champion)
    decision = decide(
        (entry.label, f"{study}/{trial}", name),
        judged(found, CHALLENGER),
        None if champion is None else judged(found, CHAMPION),
        judged(found, GATE_BASE),
        ChallengeEvidence(size_mib=size_mib(folder.adapter), forgotten=found.forgotten(CHALLENGER)),
        rules,
        _seed_deviation(plan, best),
        look=1 + len(looks),
    )
    if champion is not None and decision.look is not None:
        # On the version itself, so that all machines count the same looks, and a new champion none.
        pair = _pair(entry, study, trial)
        registry.tag(champion, f"{LOOK_TAG}{decision.look}", pair)
    if decision.verdict == "promoted":
        tags = {"sweeper.reason": decision.reason, "sweeper.decision": decision.model_dump_json()}
        # Older MLflow servers limit a tag value to 5,000 characters.
        registry.promote(entry.label, study, trial, {key: tags[key][:5000] for key in tags})
    return decision


def _looks(champion: ModelVersion) -> dict[str, str]:
    """Return the pairs that were judged since a version became the champion, with their tags."""
    found = champion.tags.items()
    return {pair: key for key, pair in found if key.startswith(LOOK_TAG)}


def _pair(entry: SetEntry, study: str, trial: str) -> str:
    """Return what a look compares: the challenger, and the gate with its content if it is a file."""
    assert entry.gate is None or isinstance(entry.gate, str)
    path = Path(entry.gate or "")
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else ""
    return f"{study}/{trial} on {entry.gate} {content}".strip()


def _seed_deviation(plan: StudyPlan, best: BestTrial) -> float | None:
    """Return the standard deviation between seeds of the study's finalists, or None without repeats."""
    results = load_results(plan.study.study_name, Path(plan.settings.output_dir))
    finals = [arm.final for arm in results.arms if arm.name == best.arm and arm.final is not None]
    # The gate measures losses, and so do the finalists only if the objective is the loss.
    if results.objective.metric != "eval/loss":
        return None
    values = [
        [repeat.value for repeat in repeats if repeat.value is not None]
        for final in finals
        # The first seed of a finalist won the search by its luck, so it shows no spread.
        for repeats in (*(each.repeats[1:] for each in final.finalists), final.judged)
    ]
    found = pooled_spread(values)
    return None if found is None else found.variance**0.5


def _rolled_back(versions: Sequence[ModelVersion], study: str, trial: str) -> ModelVersion | None:
    """Return the version of a trial that a person rolled back, or None."""
    own = (each for each in versions if (each.study, each.trial) == (study, trial))
    return next((each for each in own if ROLLED_BACK_TAG in each.tags), None)


def _undecided(entry: SetEntry, who: str, champion: str | None, reason: str) -> ChampionDecision:
    return ChampionDecision(
        model=entry.label, challenger=who, champion=champion, verdict="undecided", reason=reason
    )
