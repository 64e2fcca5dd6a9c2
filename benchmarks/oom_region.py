"""A space of which a part does not fit into memory: does the search learn where?

Rank is searched up to 768, and the process may grow by 64 MiB while a trial runs (RLIMIT_AS): larger
ranks run out of memory, wherever torch, safetensors or Python happen to ask for it first, and are told
as `oom` by the trainer itself. The loss falls with the rank, so that the best points lie at the border.
Each sampler runs one study of 20 trials that count (one without room for a single step does not) on
the embedded base. random and grid do not learn: they are the yardstick.
"""

from __future__ import annotations

import json
import resource
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from record import record

from sweeper.commands.run_study import run_study
from sweeper.config.settings import TrialSettings
from sweeper.core.outcome import Outcome
from sweeper.core.paths import TrialFolder
from sweeper.search.study_plan import studies
from sweeper.search.telling import counts, feasible
from sweeper.training.observer import TrialObserver
from sweeper.training.trial_runner import TransformersRunner

ROOM = 64 * 2**20
N_TRIALS = 20
COMMON = (
    *("+experiment=lr_rank_sweep", "~hydra.sweeper.arms.full", "finalists=none", "tracking=none"),
    *("workers=inline", "pruner=none", "evaluation=tiny", "training=tiny", "space=tiny"),
    *("training.max_steps=2", "training.eval_steps=2", "training.per_device_train_batch_size=1"),
    *("adapter.alpha_over_r=1", "adapter.target_modules=all-linear", "training.warmup_ratio=0"),
    *("training.learning_rate=tag(log, interval(3e-4, 3e-2))", "adapter.r=int(interval(8, 768))"),
    *(f"hydra.sweeper.n_trials={N_TRIALS}", "hydra.sweeper.priors=[]"),
)
SAMPLERS = {
    "tpe": ("sampler=tpe",),
    "lora": ("sampler=lora",),
    "gp": ("sampler=gp",),
    "random": ("sampler=random",),
    "grid": (
        "sampler=grid",
        "adapter.r=range(96, 769, 96)",
        "training.learning_rate=1e-3,3e-3,1e-2",
    ),
    "optuna, NSGA-II": (
        *("sampler=optuna", "hydra.sweeper.sampler.class_name=NSGAIISampler"),
        "++hydra.sweeper.sampler.kwargs={population_size: 5}",
    ),
}


def write_rows(path: Path) -> None:
    """Sixty short rows: a trial takes a second."""
    rows = [
        {
            "instruction": "Write a one-line docstring.",
            "input": f"def add_{number}(a, b)",
            "output": f"Return the sum of a and b plus {number}.",
        }
        for number in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(folder: Path, *overrides: str) -> list[FrozenTrial]:
    """Run a study in this process; its trials, in the order they were asked."""
    (plan,) = studies([*COMMON, f"output_dir={folder}", *overrides])
    run_study(plan)
    storage = f"sqlite:///{folder / 'lr_rank_sweep' / 'study.db'}"
    return optuna.load_study(study_name="lr_rank_sweep/lora", storage=storage).trials


def run_capped(
    self: TransformersRunner,
    settings: TrialSettings,
    folder: TrialFolder,
    provenance: Mapping[str, Any],
    observer: TrialObserver,
) -> Outcome:
    """A trial, while which this process may grow by ROOM; the sampler has its turn outside."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        return run_uncapped(self, settings, folder, provenance, observer)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)


run_uncapped = TransformersRunner.run


def figures(trials: list[FrozenTrial]) -> dict[str, Any]:
    """What became of the trials, and how many of each half ran out of memory."""
    oom = [trial.user_attrs["cause"] == "oom" for trial in trials]
    half = len(trials) // 2
    ranks = [int(trial.params["adapter.r"]) for trial in trials]
    fits = [trial for trial in trials if feasible(trial)]
    best = min(fits, key=lambda trial: trial.values[0])
    return {
        "trials": len(trials),
        "that count": sum(map(counts, trials)),
        "out of memory": sum(oom),
        "share in the first half": round(sum(oom[:half]) / half, 2),
        "share in the last half": round(sum(oom[half:]) / (len(trials) - half), 2),
        "FAIL": sum(trial.state is TrialState.FAIL for trial in trials),
        "largest rank that fitted": max(int(trial.params["adapter.r"]) for trial in fits),
        "smallest that did not": min(
            (rank for rank, bad in zip(ranks, oom, strict=True) if bad), default=None
        ),
        "rank of the best": int(best.params["adapter.r"]),
        "ranks, in order": ranks,
    }


def main() -> None:
    """All samplers in one process: the libraries are loaded once."""
    found = {}
    with tempfile.TemporaryDirectory() as root:
        rows = Path(root) / "rows.jsonl"
        write_rows(rows)
        small = (f"data.train={rows}", "data.validation=null")
        run(Path(root) / "warm", *small, "adapter.r=8", "hydra.sweeper.n_trials=2")
        TransformersRunner.run = run_capped  # type: ignore[method-assign]
        for name, arguments in SAMPLERS.items():
            with tempfile.TemporaryDirectory(dir=root) as folder:
                found[name] = figures(run(Path(folder), *small, *arguments))
    record("oom_region", found)


if __name__ == "__main__":
    main()
