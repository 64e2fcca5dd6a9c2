"""Data and base model that change while a study runs: it stops, and no trial is ranked on them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from safetensors.torch import load_file, save_file

from sweeper.commands.run_study import run_study
from sweeper.commands.run_trial import run_single
from sweeper.core.errors import StudyMismatch, TrialFailed
from sweeper.core.outcome import Outcome
from sweeper.core.paths import TrialFolder
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.study_run import StudyRun
from sweeper.driver.study_supervisor import StudySupervisor
from sweeper.driver.trial_recorder import TrialRecorder
from sweeper.driver.winner_judging import WinnerJudging
from sweeper.search.study_plan import studies
from sweeper.search.telling import counts
from sweeper.workers.fake_runner import FakeRunner
from tests.conftest import make_settings

NAME = "mine"
N_TRIALS = 3
FAKE = (
    *("+experiment=lr_rank_sweep", f"hydra.sweeper.study_name={NAME}", "workers=fake"),
    *("workers.engine=inline", "workers.fake.step_seconds=0.0", "tracking=none", "pruner=none"),
    "hydra.sweeper.priors=[]",
    *("~hydra.sweeper.arms.full", f"hydra.sweeper.n_trials={N_TRIALS}", "sampler=random"),
    *("hydra.sweeper.finalists.top=1", "hydra.sweeper.finalists.seeds=2"),
)
PROCESSES = ("workers.engine=local", "workers.fake.step_seconds=0.01")
Change = Callable[[Path], None]
When = Callable[[pytest.MonkeyPatch, Callable[[], None]], None]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data file, a template and the folder of a base model, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    Path("template.jinja").write_text("{{ messages }}")
    Path("base").mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        Path("base", name).write_text(f"{{}} {name}")
    return tmp_path


OWN = ("data.train=rows.jsonl", "data.template=template.jinja", "model.base_model=base")


def _run(*overrides: str) -> None:
    (plan,) = studies([*FAKE, *OWN, *overrides])
    run_study(plan)


def _trials() -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///outputs/{NAME}/study.db"
    return optuna.load_study(study_name=f"{NAME}/lora", storage=storage).trials


def _causes() -> list[str]:
    return [trial.user_attrs["cause"] for trial in _trials() if trial.state.is_finished()]


def _write(path: Path) -> None:
    path.write_text("{} other content")


def _write_unnoticed(path: Path) -> None:
    """Other content of the same size, with the time of the earlier file."""
    stat, text = path.stat(), path.read_text()
    path.write_text(text.swapcase())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _empty(path: Path) -> None:
    path.write_text("")


def _remove(path: Path) -> None:
    path.unlink()


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _once(change: Callable[[], None]) -> Callable[[], None]:
    """A change that happens at the first call alone."""
    done: list[bool] = []

    def call() -> None:
        if not done:
            done.append(True)
            change()

    return call


def _before(owner: type, name: str) -> When:
    """Right before a method is called for the first time."""

    def when(patch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
        inner, once = getattr(owner, name), _once(change)

        def method(self: Any, *words: Any, **options: Any) -> Any:
            once()
            return inner(self, *words, **options)

        patch.setattr(owner, name, method)

    return when


def _in_a_pause(patch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """After the running trials have stopped for a pause, before they are continued."""
    inner, state = StudySupervisor.on_turn, {"paused": False, "ended": False}

    def on_turn(self: StudySupervisor, dispatcher: Dispatcher, source: Any) -> None:
        inner(self, dispatcher, source)
        if dispatcher.mode == "paused" and not dispatcher.busy:
            change()
            dispatcher.resume()
            state["ended"] = True
        elif not state["paused"] and any(job.stoppable for job in dispatcher.busy):
            state["paused"] = True
            dispatcher.pause()

    patch.setattr(StudySupervisor, "on_turn", on_turn)


BETWEEN, FINALISTS = _before(TrialRecorder, "record"), _before(StudyRun, "_run_finalists")
JUDGING, DEATH = _before(WinnerJudging, "run"), _before(Dispatcher, "_lost")
CRASH = ("++workers.fake.plan={1:crash}",)
TWO = ("hydra.sweeper.n_jobs=2",)
SETTLED = ("hydra.sweeper.fairness.min_finished=1",)
"""The answer is not PROVISIONAL, so the winner is judged on the test split."""


@pytest.mark.parametrize(
    ("name", "change", "when", "overrides", "words"),
    [
        ("rows.jsonl", _write, BETWEEN, (), "data.template=template.jinja"),
        pytest.param(
            *("rows.jsonl", _remove, FINALISTS, (), "rows digest"),
            marks=pytest.mark.slow,
        ),
        ("template.jinja", _write_unnoticed, JUDGING, SETTLED, "data.template=template.jinja"),
        pytest.param(
            *("base/config.json", _empty, BETWEEN, (), "base configuration digest"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("rows.jsonl", _make_folder, BETWEEN, (*PROCESSES, *TWO), "rows digest"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("base/model.safetensors", _write, _in_a_pause, PROCESSES, "base model digest"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("base/tokenizer.json", _write, DEATH, (*PROCESSES, *CRASH), "model.base_model=base"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("rows.jsonl", _empty, FINALISTS, (*PROCESSES, *TWO), "rows digest"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("base/chat_template.jinja", _write, BETWEEN, (), "model.base_model=base"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("rows.jsonl", _write, _in_a_pause, (*PROCESSES, *TWO), "rows digest"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("template.jinja", _write, DEATH, (*PROCESSES, *CRASH, *TWO), "template.jinja"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("base/model.safetensors", _remove, FINALISTS, (*PROCESSES, *TWO), "base model"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_changed_file_stops_the_study(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Change,
    when: When,
    overrides: Sequence[str],
    words: str,
) -> None:
    """The study names digests, setting and ways out; with the earlier file back, it continues."""
    path = files / name
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        when(patch, lambda: change(path))
        with pytest.raises(StudyMismatch) as stopped:
            _run(*overrides)
    message = str(stopped.value)
    assert words in message
    assert message.startswith(f"study '{NAME}' was stopped, because its data or base model")
    assert " then, " in message
    assert f"hydra.sweeper.study_name={NAME}_2" in message
    assert set(_causes()) <= {"finished", "cancelled"}
    assert not any(trial.state is optuna.trial.TrialState.RUNNING for trial in _trials())
    if path.is_dir():
        path.rmdir()
    path.write_bytes(before)
    _run(*(text for text in overrides if text not in CRASH))
    assert _causes().count("finished") == sum(map(counts, _trials())) == N_TRIALS
    judged = {
        Outcome.model_validate(trial.user_attrs["outcome"]).inputs
        for trial in _trials()
        if trial.user_attrs.get("cause") == "finished"
    }
    assert len({each.model_dump_json() for each in judged if each}) == 1


def test_a_cancelled_trial_keeps_its_checkpoint(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial that met the other file continues where it was, after the file was put back."""
    path = files / "rows.jsonl"
    before = path.read_text()
    with monkeypatch.context() as patch:
        DEATH(patch, lambda: path.write_text("other"))
        with pytest.raises(StudyMismatch, match="lora/0001 found other data"):
            _run(*PROCESSES, *CRASH)
    cut = TrialFolder(Path(f"outputs/{NAME}/lora/trial_0001"))
    steps = [json.loads(line)["step"] for line in cut.metrics.read_text().splitlines()]
    assert (cut.checkpoints / "fake.json").exists()
    path.write_text(before)
    _run(*PROCESSES)
    (continued,) = [trial for trial in _trials() if trial.user_attrs.get("continues") == 1]
    spool = TrialFolder(Path(f"outputs/{NAME}/lora/trial_{continued.number:04d}")).metrics
    found = [json.loads(line)["step"] for line in spool.read_text().splitlines()]
    assert found[: len(steps)] == steps
    assert found == sorted(set(found))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.jsonl", "base/model.safetensors"])
def test_a_real_study_stops_and_continues(
    tiny_base: Path, rows_file: Path, files: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its workers end with a pause, and those after it load the base and the data again."""
    shutil.rmtree("base")
    shutil.copytree(tiny_base, "base")
    shutil.copy(rows_file, "rows.jsonl")
    path = files / name
    before = path.read_bytes()
    (plan,) = studies(
        [
            *(text for text in FAKE if not text.startswith(("workers", "~"))),
            *("~hydra.sweeper.arms.full", *TWO, "model.base_model=base", "data.train=rows.jsonl"),
            *("space=tiny", "training=tiny", "evaluation=tiny", "quantization=none"),
            *("training.max_steps=40", "training.eval_steps=20", "data.max_length=128"),
        ]
    )

    def change() -> None:
        other = Path(name).with_name("other")
        if name == "rows.jsonl":
            other.write_bytes(b"".join(before.splitlines(keepends=True)[1:]))
        else:
            weights = load_file(path)
            save_file({key: value * 1.1 for key, value in weights.items()}, other, {"format": "pt"})
        other.replace(path)

    with monkeypatch.context() as patch:
        _in_a_pause(patch, change)
        with pytest.raises(StudyMismatch) as stopped:
            run_study(plan)
    part = "data digest" if name == "rows.jsonl" else "base model digest"
    assert f"    {part}: " in str(stopped.value)
    path.write_bytes(before)
    run_study(plan)
    assert _causes().count("finished") == N_TRIALS
    assert set(_causes()) == {"finished", "cancelled"}


def test_arms_on_the_same_files_must_find_the_same(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is replaced between two arms stops the study before the second one's first trial."""
    inner = FakeRunner.probe

    def probe(self: FakeRunner, settings: Any, adopted: Path | None = None) -> Any:
        if settings.adapter.method == "none":
            _write(files / "rows.jsonl")
        return inner(self, settings, adopted)

    monkeypatch.setattr(FakeRunner, "probe", probe)
    (plan,) = studies([text for text in (*FAKE, *OWN) if not text.startswith("~")])
    with pytest.raises(StudyMismatch, match="arm full found other data or another base model than"):
        run_study(plan)
    assert not Path(f"outputs/{NAME}/full").exists()


def test_a_single_trial_stops_as_well(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a study the message names the trial, and that its folder can be continued."""
    settings = make_settings(
        *("workers=fake", "workers.engine=inline", "tracking=none", "verbosity=quiet", *OWN)
    )
    _before(FakeRunner, "run")(monkeypatch, lambda: _write(files / "rows.jsonl"))
    with pytest.raises(TrialFailed) as failed:
        run_single(settings, TrialFolder(files / "one"), "one")
    assert "put the earlier files back" in str(failed.value)
    assert "rows digest" in str(failed.value)
    assert not (files / "one" / "outcome.json").exists()
