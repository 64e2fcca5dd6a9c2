"""Put a night's best before the champion: have both judged on the gate, decide, move the alias.

Knows the registry and who judges; the decision itself is `sweeper.nightly.champion`.
"""

from __future__ import annotations

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
from sweeper.reporting.intervals import SeedLosses
from sweeper.search.study_plan import StudyPlan
from sweeper.tracking.registry import ROLLED_BACK_TAG, ModelRegistry, ModelVersion
from sweeper.tracking.tracker_factory import make_registry

CHALLENGER, CHAMPION = "challenger", "champion"


GateJudge = Callable[[str, dict[str, Path]], GateFigures]
"""Judges trials' folders by name on a gate source; `base` is the first one's untuned base."""


def judge_apart(gate: str, trials: dict[str, Path]) -> GateFigures:
    """Judge in a process of its own: the night imports no torch, and its memory is free afterwards.

    Raises:
        WorkerError: the process died.
    """
    with tempfile.TemporaryDirectory(prefix="sweeper-gate-") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        folders = {name: path.resolve() for name, path in trials.items()}
        write_atomic(request, GateRequest(gate=gate, trials=folders).model_dump_json())
        command = [sys.executable, "-m", "sweeper.training.gate_judge", str(request), str(answer)]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0 or not answer.exists():
            raise WorkerError(f"the gate's judge died:\n{redact(done.stderr[-2000:])}")
        return GateFigures.model_validate_json(answer.read_text(encoding="utf-8"))


def judged(found: GateFigures, name: str) -> SeedLosses:
    """Return one model's losses on the gate, as of one seed."""
    return SeedLosses(np.array([found.nll[name]]), np.array(found.tokens, dtype=np.float64))


def challenge(
    entry: SetEntry, plan: StudyPlan, best: BestTrial, rules: ChampionRules, judge: GateJudge
) -> ChampionDecision | None:
    """Decide about the night's best, and move the alias if it won; None where nothing is tracked.

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
    if champion is not None and (champion.study, champion.trial) == (study, trial):
        return _undecided(entry, who, name, "it is the champion already")
    by_hand = f"promote by hand: sweeper champion promote {entry.label} {study} {trial}"
    taken_back = _rolled_back(registry.versions(entry.label), study, trial)
    if taken_back is not None:  # whoever did it knows what no gate shows
        words = (
            f"it was rolled back by hand (version {taken_back.number}); to have it back, {by_hand}"
        )
        return _undecided(entry, who, name, words)
    if entry.gate is None:
        words = f"no gate split: name one (experiments[].gate=FILE), or {by_hand}"
        return _undecided(entry, who, name, words)
    return _duel(entry, plan, best, champion, rules, judge, registry)


def _duel(
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
        trials[CHAMPION] = champion.folder
    name = None if champion is None else f"version {champion.number}"
    trial = f"{best.arm}/{best.number:04d}"
    assert entry.gate is not None
    found = judge(entry.gate, trials)
    if found.problem is not None:
        return _undecided(entry, f"{study}/{trial}", name, found.problem)
    decision = decide(
        (entry.label, f"{study}/{trial}", name),
        judged(found, CHALLENGER),
        None if champion is None else judged(found, CHAMPION),
        judged(found, GATE_BASE),
        ChallengeEvidence(size_mib=size_mib(folder.adapter), forgotten=found.forgotten(CHALLENGER)),
        rules,
    )
    if decision.verdict == "promoted":
        tags = {"sweeper.reason": decision.reason, "sweeper.decision": decision.model_dump_json()}
        registry.promote(entry.label, study, trial, {key: tags[key][:5000] for key in tags})
    return decision


def _rolled_back(versions: Sequence[ModelVersion], study: str, trial: str) -> ModelVersion | None:
    """The version of a trial that a person took back, if there is one."""
    own = (each for each in versions if (each.study, each.trial) == (study, trial))
    return next((each for each in own if ROLLED_BACK_TAG in each.tags), None)


def _undecided(entry: SetEntry, who: str, champion: str | None, reason: str) -> ChampionDecision:
    return ChampionDecision(
        model=entry.label, challenger=who, champion=champion, verdict="undecided", reason=reason
    )
