"""Seconds that each sampler takes for a trial's values, after 10, 100, 200 and 1,000 trials.

    python benchmarks/sampler_seconds.py [--counts 10 100 200 1000] [--samplers tpe lora gp random]

The product's five keys, a loss with noise, one trial in five stopped at its first look and one in twenty
impossible, in Optuna's memory. Samplers take turns, so that a load of the machine falls on all of them.
Medians of CPU and wall seconds are written to sampler_seconds.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from typing import Any

import numpy as np
import optuna
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from record import record

from sweeper.config.settings import SamplerSettings
from sweeper.config.space import Point
from sweeper.search.record_prefix import TURN
from sweeper.search.samplers import make_sampler
from sweeper.search.study import ask, sampler_context, suggest
from sweeper.search.study_plan import ArmPlan, StudyPlan, studies
from sweeper.search.telling import INFEASIBLE

N_TRIALS = 12
STOPPED, IMPOSSIBLE = 0.2, 0.05
"""Shares of the trials."""
NOISE = 0.006
"""Nats by which seeds differ."""


def loss(point: Point) -> float:
    """Return nats of a valley in the rate times the root of alpha."""
    rate, rank, ratio = (
        float(point[key] or 0)
        for key in ("training.learning_rate", "adapter.r", "adapter.alpha_over_r")
    )
    away = math.log10(rate * math.sqrt(rank * ratio) / 1.2e-2)
    return 3.54 + 0.1 * away**2 + 0.01 * math.log2(32 / rank)


def make_record(arm: ArmPlan, count: int) -> list[FrozenTrial]:
    """Return ended trials at random points of an arm's space."""
    source = optuna.create_study(sampler=RandomSampler(seed=0))
    chance = np.random.default_rng(0)
    found = []
    for place in range(count):
        asked = source.ask()
        value = loss(suggest(asked, arm.space)) + NOISE * float(chance.standard_normal())
        stopped, impossible = chance.random() < STOPPED, chance.random() < IMPOSSIBLE
        ends: dict[str, Any] = {
            "value": value,
            "constraints": {INFEASIBLE: 1.0 if impossible else -1.0},
        }
        if stopped:
            ends = {"state": TrialState.PRUNED}
        found.append(
            create_trial(
                params=asked.params,
                distributions=asked.distributions,
                intermediate_values={250: value + 0.1},
                user_attrs={TURN: [place, 0], "cause": "pruned" if stopped else "finished"},
                **ends,
            )
        )
    return found


def opened(plan: StudyPlan, name: str, trials: list[FrozenTrial]) -> optuna.Study:
    """Return a study of one sampler with a record."""
    (arm, *_) = plan.arms
    settings = SamplerSettings.model_validate(
        {"name": name, "seed": 0, "n_startup_trials": 4, "class_name": None, "kwargs": {}}
    )
    study = optuna.create_study()
    study.sampler = make_sampler(settings, arm.space, N_TRIALS, sampler_context(plan, arm))
    study.add_trials(trials)
    return study


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", nargs="+", type=int, default=[10, 100, 200, 1000])
    parser.add_argument("--samplers", nargs="+", default=["tpe", "lora", "gp", "random"])
    parser.add_argument("--draws", type=int, default=7)
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (plan,) = studies(["+experiment=lr_rank_sweep"])
    (arm, *_) = plan.arms
    figures: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for count in given.counts:
        trials = make_record(arm, count)
        opens = {name: opened(plan, name, trials) for name in given.samplers}
        seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for _ in range(given.draws + 1):
            for name, study in opens.items():
                wall, cpu = time.perf_counter(), time.process_time()
                suggest(ask(study), arm.space)
                took = time.perf_counter() - wall, time.process_time() - cpu
                seconds[name].append(took)
        for name, each in seconds.items():
            # the first draw of a sampler imports its libraries
            walls, cpus = zip(*each[1:], strict=True)
            figures[name][str(count)] = {
                "wall_s": round(statistics.median(walls), 4),
                "cpu_s": round(statistics.median(cpus), 4),
            }
    record("sampler_seconds", dict(figures))


if __name__ == "__main__":
    main()
