"""What does the default study cost: the code before, this code, and stock practice?

    python benchmarks/study_cost.py --before CHECKOUT [--rounds 3] [--stock-rounds 3]

The sides alternate on an idle machine. CPU seconds are those of the command and of all processes that
it has waited for.

- "same points": twelve fixed points and the five full rates, one worker, no finalists, nothing that the
  sampler or chance may decide, from both checkouts. Their leaderboards are compared.
- "defaults": the default study as each checkout runs it.
- "stock": benchmarks/stock_trial.py in a fresh process for each training, one at a time, padded batches,
  nothing pruned: the points, the rates, and three further seeds of the best of each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engines import draw_points
from record import record

HERE = Path(__file__).parent.parent
STEPS = 64
FULL_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
STUDY = "outputs/lr_rank_sweep/results.json"
POINTS = 12
NO_REFINEMENT = "hydra.sweeper.arms.full.refine=false"
"""The code before has no such setting, and three more points would not be the same points."""
TOLERANCE = 1e-5
"""Nats by which the value of a trial may differ between the checkouts."""
Figures = dict[str, Any]
Sides = dict[str, Callable[[Path], Figures]]


def study(checkout: Path, root: Path, overrides: Sequence[str]) -> Figures:
    """Run the default study of a checkout and return its trials: cause and best value by arm."""
    command = [sys.executable, "-m", "sweeper", "+experiment=lr_rank_sweep", *overrides, "-m"]
    _run(command, root, checkout)
    arms = json.loads((root / STUDY).read_text())["arms"]
    return {
        f"{name}/{trial['number']}": (trial["cause"], trial["best_value"])
        for name, arm in arms.items()
        for trial in arm["trials"]
    }


def same_points(checkout: Path, root: Path, overrides: Sequence[str] = ()) -> Figures:
    """Run the study over fixed points with one worker and no finalists."""
    points = [
        "{" + ",".join(f"{key}: {value}" for key, value in point.items()) + "}"
        for point in draw_points(POINTS)
    ]
    fixed = ["finalists=none", "hydra.sweeper.n_jobs=1", "sampler=random"]
    priors = f"hydra.sweeper.priors=[{','.join(points)}]"
    return study(checkout, root, [*fixed, priors, *overrides])


def stock(root: Path, rows: Path) -> Figures:
    """Train every point in a process of its own, then three more seeds of the best of each arm."""
    lora = [_short(point) for point in draw_points(POINTS)]
    full = [{"learning_rate": rate} for rate in FULL_RATES]
    found = {}
    for name, points in {"lora": lora, "full": full}.items():
        losses = [
            _train(root / f"{name}_{number}", rows, point) for number, point in enumerate(points)
        ]
        best = min(range(len(points)), key=losses.__getitem__)
        tests = [
            _train(root / f"{name}_seed_{seed}", rows, points[best], seed, judged=True)
            for seed in (1, 2, 3)
        ]
        found[name] = {"best": losses[best], "mean test loss": statistics.mean(tests)}
    return found


def write_rows(path: Path) -> None:
    """Write the rows of the default study as token ids and labels."""
    from sweeper.config.compose import compose
    from sweeper.config.settings import RunSettings, validate
    from sweeper.modeling.base_model import load_base
    from sweeper.training.prepared_data import prepare

    settings = validate(RunSettings, compose([]).config)
    data = prepare(settings.data, load_base(settings.model, settings.quantization, trained=False))
    splits = {name: split.rows for name, split in data.encoded.items()}
    path.write_text(json.dumps(splits))


def measure(sides: Sides, rounds: dict[str, int]) -> Iterator[Figures]:
    """Run the sides in turn and yield the seconds and findings of each so far, after each round.

    Args:
        sides: what is measured, by name.
        rounds: how often each is measured.
    """
    measured: dict[str, list[Figures]] = {name: [] for name in sides}
    for number in range(max(rounds.values())):
        for name, run in sides.items():
            if number >= rounds[name]:
                continue
            with tempfile.TemporaryDirectory() as folder:
                cpu, wall = _children_cpu(), time.perf_counter()
                found = run(Path(folder))
                one = {"cpu": _children_cpu() - cpu, "wall": time.perf_counter() - wall}
                measured[name].append({**one, "found": found})
            print(name, {key: round(value, 1) for key, value in one.items()}, flush=True)
        yield measured


def ratio(measured: Figures, slow: str, fast: str, unit: str) -> float:
    """Return the ratio of the medians of two sides."""
    medians = [statistics.median(one[unit] for one in measured[side]) for side in (slow, fast)]
    return round(medians[0] / medians[1], 2)


def leaderboards(before: Figures, after: Figures) -> Figures:
    """Compare the trials of two studies over the same points."""
    pairs = {name: (before[name], after[name]) for name in before}
    finished = [(a[1], b[1]) for a, b in pairs.values() if a[0] == b[0] == "finished"]
    winners = [
        [
            min((v, n) for n, (c, v) in side.items() if n.startswith(arm) and c == "finished")[1]
            for arm in ("lora", "full")
        ]
        for side in (before, after)
    ]
    return {
        "trials that ended alike": sum(a[0] == b[0] for a, b in pairs.values()),
        "trials": len(pairs),
        "finished on both sides": len(finished),
        "largest difference of a finished trial": max(abs(a - b) for a, b in finished),
        "within the tolerance": sum(abs(a - b) <= TOLERANCE for a, b in finished),
        "winners": winners,
    }


def summary(measured: Figures) -> Figures:
    """Return the seconds of all sides, their ratios, and what both leaderboards share."""
    seconds = {
        name: {unit: [round(one[unit], 1) for one in found] for unit in ("cpu", "wall")}
        for name, found in measured.items()
    }
    ratios = {
        f"{slow} / {fast}, {unit}": ratio(measured, slow, fast, unit)
        for slow, fast in (
            ("before, same points", "this code, same points"),
            ("before, defaults", "this code, defaults"),
            ("stock", "this code, defaults"),
        )
        for unit in ("cpu", "wall")
    }
    boards = [
        leaderboards(one["found"], other["found"])
        for one, other in zip(
            measured["before, same points"], measured["this code, same points"], strict=True
        )
    ]
    found = {name: one[-1]["found"] for name, one in measured.items() if name == "stock"}
    return {"seconds": seconds, "ratios": ratios, "same points": boards, **found}


def _train(
    folder: Path, rows: Path, point: Figures, seed: int = 0, *, judged: bool = False
) -> float:
    from sweeper.builtin.embedded import BASE_DIR

    folder.mkdir()
    job = {"base": str(BASE_DIR), "rows": str(rows), "folder": str(folder), "point": point}
    job |= {"steps": STEPS, "seed": seed, "judged": judged}
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("stock_trial.py")
    _run([sys.executable, str(script), str(folder / "job.json")], folder, HERE)
    figures = json.loads((folder / "figures.json").read_text())
    return float(figures["test" if judged else "validation"])


def _short(point: Figures) -> Figures:
    return {key.split(".")[1]: value for key, value in point.items()}


def _run(command: list[str], root: Path, checkout: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    with (root / "output.txt").open("w") as output:
        subprocess.run(
            command, cwd=root, env=environment, check=True, stdout=output, stderr=subprocess.STDOUT
        )


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure the sides in turn and write what is known after each round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the code before")
    parser.add_argument("--rounds", type=int, default=3)
    # Stock practice takes as long as the other sides together
    parser.add_argument("--stock-rounds", type=int, default=3)
    asked = parser.parse_args()
    before = asked.before.resolve()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        write_rows(rows)
        sides: Sides = {
            "before, same points": lambda root: same_points(before, root),
            "this code, same points": lambda root: same_points(HERE, root, [NO_REFINEMENT]),
            "before, defaults": lambda root: study(before, root, []),
            "this code, defaults": lambda root: study(HERE, root, []),
            "stock": lambda root: stock(root, rows),
        }
        # After each round, because a round takes half an hour and a benchmark may be cut.
        rounds = dict.fromkeys(sides, asked.rounds) | {"stock": asked.stock_rounds}
        for measured in measure(sides, rounds):
            record("study_cost", summary(measured))


if __name__ == "__main__":
    main()
