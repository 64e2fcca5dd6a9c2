"""A sweep that something happens to: the real program, its workers, and what it left behind.

Nothing here waits for a fixed time: a fault is injected at a state that was observed, and its end is
waited for with a deadline that only a hang exceeds.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.trial import FrozenTrial, TrialState

DEADLINE_S = 300.0
"""Far beyond what anything here takes on a busy machine."""
STUDY = "faulted"
FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "sampler=random", "pruner=none"),
    *("finalists=none", "~hydra.sweeper.arms.full"),
)
"""Every trial ends as `finished` unless a fault ends it otherwise."""
EVALUATED = [4, 8, 12, 16, 20]
"""Steps of a fake trial's evaluations."""


@dataclass
class Sweep:
    """One run of the program, in a folder of its own."""

    folder: Path
    process: subprocess.Popen[bytes]
    log: Path
    storage: str | None = None
    """Optuna's, if it is not the study's own file."""
    name: str = STUDY

    @property
    def study(self) -> Path:
        """The study's folder."""
        return self.folder / "outputs" / self.name

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def trial(self, number: int) -> Path:
        """A trial's folder."""
        return self.study / "lora" / f"trial_{number:04d}"

    def until(self, happens: Callable[[], Any], what: str) -> Any:
        """Wait for a state while the program runs; returns what `happens` found."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := happens()):
            ended = self.process.poll() is not None
            assert not ended, f"ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"never {what}:\n{self.output}"
            time.sleep(0.01)
        return found

    def until_steps(self, number: int = 0, lines: int = 1) -> None:
        """Wait until a trial has been evaluated so many times, and has not ended."""
        self.until(lambda: len(spool(self.trial(number))) >= lines, f"trial {number} was evaluated")
        assert not (self.trial(number) / "outcome.json").exists(), "too late for a fault"

    def until_ended(self, count: int) -> None:
        """Wait until so many trials have ended."""
        self.until(lambda: len(self.ended()) >= count, f"{count} trials ended")

    def ended(self) -> list[Path]:
        """Folders of trials that are complete."""
        return [path.parent for path in self.study.glob("lora/*/outcome.json")]

    def attempts(self) -> dict[Path, int]:
        """Which attempt the trials under way are at, as far as their folders tell."""
        found = {}
        for path in self.study.glob("lora/*/provenance.json"):
            if not (path.parent / "outcome.json").exists():
                found[path.parent] = int(json.loads(path.read_text())["attempt"])
        return found

    def handed_out(self) -> dict[int, int]:
        """The attempts of running trials by number, as the driver stored them before handing out."""
        with sqlite3.connect(self.study / "study.db", timeout=60) as database:
            rows = database.execute(
                "select number, value_json from trials natural join trial_user_attributes "
                "where state = 'RUNNING' and key = 'attempt'"
            ).fetchall()
        return {number: int(attempt) for number, attempt in rows}

    def workers(self) -> list[psutil.Process]:
        """Worker processes that run, oldest first."""
        if not self._runs():
            return []
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(_words(child))]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Its workers do nothing meanwhile, so that it cannot end."""
        workers = self.workers()
        assert workers
        for worker in workers:
            worker.suspend()
        try:
            yield
        finally:
            for worker in workers:
                worker.resume()

    def end(self, exit_code: int = 0) -> str:
        """Wait until it ends by itself, with this exit code; returns what it printed."""
        assert self.process.wait(DEADLINE_S) == exit_code, self.output
        return self.output

    def kill(self) -> None:
        """kill -9 of the driver, and wait until its workers are gone as well."""
        workers = self.workers()
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(workers, timeout=DEADLINE_S)
        assert alive == [], "workers outlive their driver"

    def clean_up(self) -> None:
        """Whatever state it is in, nothing of it stays behind."""
        family = psutil.Process(self.process.pid).children(recursive=True) if self._runs() else []
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.kill()
        self.process.wait()

    def _runs(self) -> bool:
        return self.process.poll() is None

    def trials(self) -> list[FrozenTrial]:
        """What Optuna knows."""
        storage = self.storage or f"sqlite:///{self.study / 'study.db'}"
        return optuna.load_study(study_name=f"{self.name}/lora", storage=storage).get_trials()

    def check_each_once(self, n_trials: int) -> list[FrozenTrial]:
        """Every trial finished, each counted once, none left running, no step measured twice."""
        trials = self.trials()
        assert [trial.number for trial in trials] == list(range(n_trials))
        assert Counter(trial.state for trial in trials) == {TrialState.COMPLETE: n_trials}
        assert {trial.user_attrs["cause"] for trial in trials} == {"finished"}
        for trial in trials:
            assert [line["step"] for line in spool(self.trial(trial.number))] == EVALUATED
        return trials


def start(
    folder: Path,
    *overrides: str,
    environment: Mapping[str, str] | None = None,
    storage: str | None = None,
    name: str = STUDY,
) -> Sweep:
    """Run `python -m sweeper … -m` with the fake trainer."""
    number = len(list(folder.glob("run_*.log")))
    log = folder / f"run_{number}.log"
    study_name = f"hydra.sweeper.study_name={name}"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "sweeper", *FAKE, study_name, *overrides, "-m"],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Sweep(folder, process, log, storage, name)


def spool(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a trial's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _words(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return words
