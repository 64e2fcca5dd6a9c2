"""Train the points of the bank of curves, as ordinary studies that the same command continues.

    python -m benchmarks.curves.make_curves embedded     # 540 LoRA points, 24 full fine-tunes
    python -m benchmarks.curves.make_curves base         # 96 points on a base of 3.5 times the size
    python -m benchmarks.curves.make_curves chat         # 96 points on conversations
    python -m benchmarks.curves.make_curves chat_seeds   # three further seeds of its best points
    python -m benchmarks.curves.make_curves embedded budget.wall_clock=45m    # stop after that

The overrides after the part are the studies' as well. A part is trained in waves, each by one run of
`python -m sweeper +experiment=curves`, and before each wave the CPU seconds that are left are printed.
After Ctrl-C, a kill or the end of a budget the same command continues, as any study does. Trainings that
have ended can be exported at any time (export_curves.py).
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.curves.bank_points import (
    RANK,
    RATE,
    RATIO,
    TARGETS,
    WARMUP,
    Point,
    embedded_points,
    held_out_points,
    is_factorial,
)
from sweeper.core.paths import StudyFolder, TrialFolder

HERE = Path(__file__).resolve().parent
OUTPUTS = HERE / "outputs"
WAVE = 54
"""Points of one run of the program, whose overrides have at most 10,000 characters."""
ENDED = ("finished", "diverged")
"""Causes of trainings that belong to the bank."""
SEEDS = (1, 2, 3)
"""Seeds of the repeats. The bank itself has seed 0, which chose the repeated points."""
REPEATED = {"embedded": 40, "base": 12, "chat": 12}
"""Points of each bank that are trained with further seeds: about the best eighth."""
LARGER_BASE = OUTPUTS / "base"
LARGER_WIDTH = 256
FULL_TRIALS = 24
"""Full fine-tunes of conf/experiment/curves_full.yaml."""
CHAT = (
    # the base has no chat template, and `auto` would render conversations as the first bank's rows
    *("data.train=stand_in:finetome", "data.template=chat_turns.jinja"),
    # it has 831 conversations, and a tenth of them would be too few rows to compare points by
    *("data.validation_ratio=0.25", "data.test_ratio=0.05"),
)


@dataclass(frozen=True)
class CurveStudy:
    """One study of the bank."""

    name: str
    points: Sequence[Point]
    overrides: tuple[str, ...] = ()
    full: bool = False
    """True if full fine-tunes are trained as well."""
    expected_cpu_s: float = 13.0
    """CPU seconds of one training, estimated before any has ended."""

    @property
    def folder(self) -> StudyFolder:
        """Folder of the study."""
        return StudyFolder(OUTPUTS / self.name)

    @property
    def fine_tunes(self) -> int:
        """Number of full fine-tunes that are trained."""
        return FULL_TRIALS if self.full else 0

    def lacks(self, points: int) -> bool:
        """Return True unless so many points, and all full fine-tunes, have ended."""
        there = ended(self.folder, "lora"), ended(self.folder, "full")
        return there[0] < points or there[1] < self.fine_tunes

    def progress(self) -> str:
        """Return how many trainings have ended, and the CPU seconds of the others."""
        arms = ("lora", "full")
        spent = [cpu_seconds(each) for arm in arms for _, each in ended_folders(self.folder, arm)]
        total = len(self.points) + self.fine_tunes
        each = statistics.fmean(spent) if spent else self.expected_cpu_s
        left = each * (total - len(spent))
        return (
            f"{self.name}: {len(spent)} of {total} trainings have ended, {left:,.0f} CPU s are left"
        )


def ended_folders(study: StudyFolder, arm: str) -> Iterator[tuple[TrialFolder, dict[str, Any]]]:
    """Yield the folder and the outcome of each training of an arm that belongs to the bank."""
    for path in sorted((study.path / arm).glob("trial_*/outcome.json")):
        outcome = json.loads(path.read_text(encoding="utf-8"))
        if outcome["cause"] in ENDED:
            yield TrialFolder(path.parent), outcome


def cpu_seconds(outcome: Mapping[str, Any]) -> float:
    """Return the CPU seconds that a training has taken with everything in its trial."""
    return float(outcome["metrics"]["cost/cpu_seconds"])


def ended(study: StudyFolder, arm: str) -> int:
    """Return the number of trainings of an arm that belong to the bank."""
    return sum(1 for _ in ended_folders(study, arm))


def stored_point(folder: TrialFolder) -> Point:
    """Return the point that a LoRA training was at."""
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    keys = (RATE, RANK, RATIO, TARGETS, WARMUP)
    return {key: config[key.partition(".")[0]][key.partition(".")[2]] for key in keys}


def best_points(study: StudyFolder, count: int) -> list[Point]:
    """Return the best points of the factorial by the loss on the whole split, best first."""
    values = [
        (outcome["best_value"], point)
        for folder, outcome in ended_folders(study, "lora")
        if outcome["best_value"] is not None and is_factorial(point := stored_point(folder))
    ]
    return [point for _, point in sorted(values, key=lambda pair: float(pair[0]))[:count]]


def embedded_study() -> CurveStudy:
    """Return the study of the first bank."""
    return CurveStudy("curves_embedded", embedded_points(), full=True)


def seed_studies(bank: str) -> list[CurveStudy]:
    """Return the studies of a bank's repeats, one for each seed.

    Raises:
        SystemExit: the bank is not complete, so its best points are not known.
    """
    (first,) = PARTS[bank]()
    if first.lacks(len(first.points)):
        there = ended(first.folder, "lora")
        raise SystemExit(
            f"the best points are known when the part `{bank}` is complete: it has "
            f"{there} of {len(first.points)}"
        )
    best = best_points(first.folder, REPEATED[bank])
    return [
        CurveStudy(
            f"{first.name}_seed_{seed}",
            best,
            (*first.overrides, f"seed={seed}"),
            expected_cpu_s=first.expected_cpu_s,
        )
        for seed in SEEDS
    ]


def base_studies() -> list[CurveStudy]:
    """Return the study on the larger base, which is pre-trained first."""
    if not LARGER_BASE.exists():
        tool = HERE.parents[1] / "tools" / "pretrain_base.py"
        words = [str(tool), "--out", str(LARGER_BASE), "--hidden", str(LARGER_WIDTH)]
        subprocess.run([sys.executable, *words], check=True)
    model = f"model.base_model={LARGER_BASE.relative_to(HERE)}"
    return [CurveStudy("curves_base", held_out_points(), (model,), expected_cpu_s=35.0)]


PARTS: dict[str, Callable[[], list[CurveStudy]]] = {
    "embedded": lambda: [embedded_study()],
    "base": base_studies,
    "chat": lambda: [CurveStudy("curves_chat", held_out_points(), CHAT, expected_cpu_s=13.0)],
    **{f"{bank}_seeds": partial(seed_studies, bank) for bank in REPEATED},
}


def in_words(points: Sequence[Point]) -> str:
    """Return the override that has points tried before a sampler chooses."""
    texts = (", ".join(f"{key}: {value}" for key, value in point.items()) for point in points)
    return "hydra.sweeper.priors=[" + ", ".join(f"{{{text}}}" for text in texts) + "]"


def waves(study: CurveStudy) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield for each wave the total of points after it, and the program's arguments."""
    for start in range(0, len(study.points), WAVE):
        points = study.points[start : start + WAVE]
        total = start + len(points)
        experiment = "curves_full" if study.full else "curves"
        named = (f"+experiment={experiment}", f"study_name={study.name}", f"n_trials={total}")
        yield total, (*named, *study.overrides, in_words(points))


def run_program(words: Sequence[str]) -> int:
    """Run the program and return its exit code. A stop of this process stops the program first."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeper", *words, "-m"],
        cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def stop(number: int, _: object) -> None:
        process.send_signal(number)

    # a terminal sends Ctrl-C to the program as well, which would take a second one for "at once"
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    on_terminate = signal.signal(signal.SIGTERM, stop)
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGTERM, on_terminate)


def train(study: CurveStudy, overrides: Sequence[str]) -> bool:
    """Train the points that a study lacks. Return False if a run ended before its wave was complete.

    Raises:
        SystemExit: a run failed, with its exit code.
    """
    for total, words in waves(study):
        if not study.lacks(total):
            continue
        print(study.progress(), flush=True)
        if code := run_program([*words, *overrides]):  # the program has said why
            raise SystemExit(code)
        if study.lacks(total):
            print(f"{study.progress()}. The same command continues")
            return False
    print(f"{study.name}: complete")
    return True


def main(words: Sequence[str]) -> None:
    """Train a part of the bank."""
    if not words or words[0] not in PARTS:
        raise SystemExit(f"name a part: {', '.join(PARTS)}\n\n{__doc__}")
    for study in PARTS[words[0]]():
        if not train(study, words[1:]):
            return


if __name__ == "__main__":
    main(sys.argv[1:])
