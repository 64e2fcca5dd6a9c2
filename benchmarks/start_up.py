"""From pressing Enter to the first training step of the main job: how long, and where the time goes.

    python benchmarks/start_up.py [EARLIER_CHECKOUT]

Runs of the command with one trial: cold (no tokens cached, and Python's files dropped from the page
cache as far as no other process holds them), then three warm ones. With an earlier checkout, each warm
run follows one of that code. The program runs unchanged under a launcher that notes when certain
functions begin and end, in the driver and in its worker; driver and worker work side by side, so the
stages of the two overlap. Other processes make the seconds longer, the CPU seconds hardly.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

LOG = "START_UP_LOG"
RUNS = 3
STAGES = {
    # module, function, in words; entered in whichever process calls it
    ("sweeper.search.study_plan", "studies"): "driver: compose and validate",
    ("sweeper.commands.run_study", "open_storage"): "driver: open the study's database",
    ("sweeper.commands.run_study", "provenance"): "driver: provenance",
    ("sweeper.driver.study_run", "open_engine"): "driver: start the worker",
    ("sweeper.driver.study_run", "open_study"): "driver: open the study",
    ("sweeper.driver.study_run", "fill_study"): "driver: first points",
    ("sweeper.workers.local_engine", "make_runner"): "worker: import torch and transformers",
    ("sweeper.training.trial_runner", "load_base"): "worker: load and quantize the base",
    ("sweeper.training.trial_runner", "prepare"): "worker: read, split and tokenize the data",
}
COMMAND = (
    *("+experiment=lr_rank_sweep", "hydra.sweeper.n_trials=1", "training.max_steps=2"),
    *("training.eval_steps=2", "~hydra.sweeper.arms.full", "finalists=none", "-m"),
)


def note(words: str) -> None:
    """A moment, for the parent."""
    if path := os.environ.get(LOG):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps([time.time(), words, time.process_time()]) + "\n")


def noted(words: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose first call's begin and end are noted."""

    def call(*arguments: Any, **options: Any) -> Any:
        note(f"begin {words}")
        try:
            return function(*arguments, **options)
        finally:
            note(f"end {words}")

    return call


class Finder:
    """Wraps the functions of STAGES as their modules are imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Let everybody else find it, then wrap what it holds."""
        wanted = {function: words for (module, function), words in STAGES.items() if module == name}
        if not wanted:
            return None
        sys.meta_path.remove(self)
        try:
            from importlib.util import find_spec

            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def wrapped(module: Any) -> None:
            execute(module)
            for function, words in wanted.items():
                setattr(module, function, noted(words, getattr(module, function)))
            if name == "sweeper.training.trial_runner":
                _note_first_step(module)

        spec.loader.exec_module = wrapped  # type: ignore[method-assign]
        return spec


def _note_first_step(module: Any) -> None:
    runner = module.TransformersRunner
    runner.probe = noted("worker: probe (load, data, untuned base's loss)", runner.probe)
    trainer = import_module("sweeper.training.trainer").JudgedTrainer
    step = trainer.training_step

    def first(self: Any, *arguments: Any, **options: Any) -> Any:
        note("first step")
        return step(self, *arguments, **options)

    trainer.training_step = first


def drop_pages() -> None:
    """Python's files leave the page cache, unless another process has them mapped."""
    for root in {Path(sys.prefix), Path(sys.base_prefix) / "lib", Path(__file__).parents[1]}:
        for path in root.rglob("*"):
            with suppress(OSError):
                if path.is_file() and not path.is_symlink():
                    descriptor = os.open(path, os.O_RDONLY)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(descriptor)


def measure(folder: Path, cache: Path, code: Path) -> dict[str, Any]:
    """One run of a checkout's code in a folder of its own."""
    folder.mkdir()
    log = folder / "log.jsonl"
    paths = {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(code)}
    environment = {**os.environ, LOG: str(log), **paths}
    used, began = children_seconds(), time.time()
    subprocess.run(
        [sys.executable, __file__, *COMMAND],
        cwd=folder,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    whole = time.time() - began
    whole_cpu = children_seconds() - used
    moments = [json.loads(line) for line in log.read_text().splitlines()]
    begins: dict[str, tuple[float, float]] = {}
    stages: dict[str, dict[str, float]] = {}
    first_step, worker_cpu = next((at, cpu) for at, words, cpu in moments if words == "first step")
    for moment, words, cpu in moments:
        kind, _, stage = words.partition(" ")
        if kind == "begin":
            begins.setdefault(stage, (moment, cpu))
        elif kind == "end" and stage not in stages:
            begin, begin_cpu = begins[stage]
            stages[stage] = {
                "from second": round(begin - began, 2),
                "seconds": round(moment - begin, 2),
                "CPU seconds": round(cpu - begin_cpu, 2),
            }
    in_order = dict(sorted(stages.items(), key=lambda item: item[1]["from second"]))
    starts = {words: moment for moment, words, _ in reversed(moments) if words.endswith("starts")}
    return {
        "seconds to the first training step": round(first_step - began, 2),
        "worker's CPU seconds to the first training step": round(worker_cpu, 2),
        "seconds of the whole command": round(whole, 2),
        "CPU seconds of the whole command": round(whole_cpu, 2),
        "driver's first line at": round(starts["driver starts"] - began, 2),
        "worker's first line at": round(starts["worker starts"] - began, 2),
        "stages": in_order,
    }


def children_seconds() -> float:
    """CPU seconds of all child processes that ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Cold, then warm, alternating with an earlier checkout."""
    from record import record

    here = Path(__file__).resolve().parents[1]
    earlier = [Path(text).resolve() for text in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as root:
        cache = Path(root) / "cache"
        drop_pages()
        figures: dict[str, Any] = {"cold": measure(Path(root) / "cold", cache, here)}
        for run in range(RUNS):
            for code in (*earlier, here):
                name = "warm" if code == here else "warm, earlier code"
                folder = Path(root) / f"{name} {run}"
                figures.setdefault(name, []).append(measure(folder, cache, code))
    record("start_up", figures)


if os.environ.get(LOG):  # in the driver, and again in the worker, which imports this module
    note("driver starts" if __name__ == "__main__" else "worker starts")
    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]

if __name__ == "__main__":
    if os.environ.get(LOG):
        from sweeper.__main__ import main as run

        run()
    else:
        main()
