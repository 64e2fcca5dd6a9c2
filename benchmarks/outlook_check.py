"""Compare the guess of what further trials would bring with trials that follow, on recorded curves.

    python -m benchmarks.outlook_check                     # on the bank `chat`; outlook_check.json
    python -m benchmarks.outlook_check chat --studies 5    # without writing

A study of a policy is replayed up to a number of trials, a guess is made from its record, and as many
trials again are replayed. A bank has a few rates only, so the guess may choose among the bank's rates
and no others. Gains are of the objective's value, in nats per token.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import optuna

from benchmarks.curves.bank_points import RATE
from benchmarks.curves.policy_tasks import PolicyTask, bank_task
from benchmarks.curves.replayed_study import ReplayedStudy
from benchmarks.policies import COMMON, plan_of
from benchmarks.record import record
from sweeper.config.space import Choice
from sweeper.core.outcome import SELF_ENDED
from sweeper.search.search_outlook import SearchOutlook, guess_outlook

STUDIES = 20
SAMPLERS = ("lora", "tpe")
AFTER = (8, 12)
"""Trials after which a guess is made, which is about as many again."""


@dataclass(frozen=True)
class GuessedStudy:
    """The guess of one study, and what followed."""

    guess: SearchOutlook
    brought: float
    seconds: float
    """CPU seconds of the guess."""


def guessed(task: PolicyTask, sampler: str, after: int, seed: int) -> GuessedStudy | None:
    """Replay a study to twice a number of trials. Return None if no guess was made."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    words = (f"sampler={sampler}", "pruner=median", *task.space, "hydra.sweeper.priors=[]")
    study = ReplayedStudy(plan_of((*COMMON, *words)), task.table, seed)
    _continue(study, after)
    before = _best(study)
    rates = Choice(tuple(task.table.levels()[RATE]))
    arm = replace(study.arm, space={**study.arm.space, RATE: rates})
    began = time.process_time()
    guess = guess_outlook(study.optuna, study.plan, arm)
    seconds = time.process_time() - began
    _continue(study, after)
    return None if guess is None else GuessedStudy(guess, before - _best(study), seconds)


def _continue(study: ReplayedStudy, trials: int) -> None:
    for _ in range(trials):
        asked = study.ask()
        cause = study.advance(asked, study.table.total_steps)
        assert cause is not None, f"the curve of {asked.curve.point} has no end"
        study.end(asked, cause)


def _best(study: ReplayedStudy) -> float:
    return min(trial.value for trial in study.ended if trial.cause in SELF_ENDED)


def summarise(found: Sequence[GuessedStudy | None]) -> dict[str, Any]:
    """Return the figures of the studies of one sampler."""
    made = [study for study in found if study is not None]
    within = [each.guess.low <= each.brought <= each.guess.high for each in made]
    return {
        "studies": len(made),
        "mean guess": round(statistics.fmean(each.guess.gain for each in made), 4),
        "mean of what followed": round(statistics.fmean(each.brought for each in made), 4),
        "studies within the range": sum(within),
        "studies without any gain": sum(each.brought == 0 for each in made),
        "CPU seconds of a guess": round(statistics.median(each.seconds for each in made), 2),
    }


def main() -> None:
    """Replay studies on a bank."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bank", nargs="?", default="chat")
    parser.add_argument("--studies", type=int, default=STUDIES)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    task, _ = bank_task(arguments.bank)
    figures: dict[str, Any] = {"bank": arguments.bank}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for sampler in SAMPLERS:
            for after in AFTER:
                jobs = [
                    pool.submit(guessed, task, sampler, after, seed)
                    for seed in range(arguments.studies)
                ]
                row = summarise([job.result() for job in jobs])
                figures[f"{sampler}, {after} trials and {after} more"] = row
                print(sampler, after, row, flush=True)
    if arguments.studies == STUDIES:
        record("outlook_check", figures)


if __name__ == "__main__":
    main()
