"""One contract for every engine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from sweeper.config.settings import FakeTrainer
from sweeper.core.errors import WorkerError
from sweeper.core.input_digests import InputDigests
from sweeper.workers.engines import open_engine
from sweeper.workers.local_engine import LocalEngine, ProcessHost
from sweeper.workers.protocol import (
    CheckCommand,
    EndedEvent,
    Engine,
    EvaluatedEvent,
    InputsChangedEvent,
    JudgeCommand,
    JudgedEvent,
    LostEvent,
    ProbeCommand,
    ProbedEvent,
    ProgressEvent,
    SlotsEvent,
    SubmitCommand,
    Work,
    WorkAnswer,
    WorkerEvent,
)
from sweeper.workers.worker_log import begin_log, tail_of
from tests.conftest import make_settings
from tests.workers.conftest import make_workers

Open = Callable[..., Engine]
ENGINES = ["inline", "local", pytest.param("ray", marks=pytest.mark.slow)]


@pytest.fixture(params=ENGINES)
def open_one(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Open an engine of each kind with a fake trainer; it is closed after the test."""
    engines: list[Engine] = []
    address = request.getfixturevalue("ray_cluster").address if request.param == "ray" else None

    def open_(
        steps: int = 10,
        step_seconds: float = 0.001,
        requests: dict[str, str] | None = None,
        **plan: str,
    ) -> Engine:
        fake = FakeTrainer(
            step_seconds=step_seconds,
            steps=steps,
            plan={int(key[1:]): value for key, value in plan.items()},
            finalists={},
            requests=requests or {},
            free_mib=None,
            room_mib=None,
        )
        workers = make_workers(request.param, fake, address)
        engines.append(open_engine(workers, 1, lambda worker: tmp_path / f"{worker}.log"))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


def until(
    engine: Engine, kind: Any, timeout_s: float = 60
) -> tuple[list[WorkerEvent], WorkerEvent]:
    seen: list[WorkerEvent] = []
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        event = engine.next_event(0.5)
        if event is None:
            continue
        if isinstance(event, kind):
            return seen, event
        seen.append(event)
    raise AssertionError(f"no {kind} within {timeout_s} s; saw {seen}")


def submit_trial(engine: Engine, tmp_path: Path, number: int = 0) -> SubmitCommand:
    _, slot = until(engine, SlotsEvent)
    assert isinstance(slot, SlotsEvent)
    submit = SubmitCommand(
        job=f"lora/{number:04d}",
        attempt=1,
        folder=tmp_path / "lora" / f"trial_{number:04d}",
        settings=make_settings().trial,
        provenance={},
    )
    engine.send(slot.worker, submit)
    return submit


def test_a_trial_is_evaluated_then_ends(open_one: Open, tmp_path: Path) -> None:
    """Submit: evaluations in the order of steps, then an outcome with the best of them."""
    engine = open_one()
    submit = submit_trial(engine, tmp_path)
    seen, ended = until(engine, EndedEvent)
    losses = [event.value for event in seen if isinstance(event, EvaluatedEvent)]
    steps = [event.step for event in seen if isinstance(event, EvaluatedEvent)]
    assert isinstance(ended, EndedEvent)
    assert ended.job == submit.job
    assert ended.outcome.cause == "finished"
    assert ended.outcome.best_value == min(losses)
    assert steps == sorted(steps)
    assert (submit.folder / "outcome.json").exists()


def test_a_broken_context_ends_its_worker(open_one: Open, tmp_path: Path) -> None:
    """Every later use of the GPU by that process would fail, so another worker takes the next job."""
    engine = open_one(t0="context")
    submit = submit_trial(engine, tmp_path)
    _, gone = until(engine, LostEvent)
    assert isinstance(gone, LostEvent)
    assert (gone.cause, gone.job) == ("device", submit.job)
    assert "illegal memory access" in gone.message.splitlines()[0]
    submit_trial(engine, tmp_path, 1)
    _, ended = until(engine, EndedEvent)
    assert isinstance(ended, EndedEvent)
    assert ended.outcome.cause == "finished"


def test_a_library_that_ends_the_process_for_memory_is_out_of_memory(tmp_path: Path) -> None:
    """bitsandbytes prints one line and exits with 1: that line is the cause, and is said."""
    fake = FakeTrainer(
        step_seconds=0.001,
        steps=10,
        plan={0: "native_oom"},
        finalists={},
        requests={},
        free_mib=None,
        room_mib=None,
    )
    engine = open_engine(make_workers("local", fake), 1, lambda worker: tmp_path / "0.log")
    try:
        submit_trial(engine, tmp_path)
        _, gone = until(engine, LostEvent)
    finally:
        engine.close()
    assert isinstance(gone, LostEvent)
    assert gone.cause == "oom"
    assert gone.message.startswith(
        "worker 0 ended with exit code 1: Error out of memory at line 541 in file"
    )


def test_a_probe_is_answered(open_one: Open) -> None:
    """Probe: facts come back."""
    engine = open_one()
    _, slot = until(engine, SlotsEvent)
    assert isinstance(slot, SlotsEvent)
    engine.send(slot.worker, ProbeCommand(job="lora", attempt=1, settings=make_settings().trial))
    _, probed = until(engine, ProbedEvent)
    assert isinstance(probed, ProbedEvent)
    assert probed.facts is not None


def test_a_judgement_on_the_test_split_is_answered(open_one: Open, tmp_path: Path) -> None:
    """Judge: the loss of each example of the untuned base; of an empty folder, the reason."""
    engine = open_one()
    answers = []
    for folder in (None, tmp_path / "nothing"):
        _, slot = until(engine, SlotsEvent)
        assert isinstance(slot, SlotsEvent)
        engine.send(
            slot.worker,
            JudgeCommand(
                job="x",
                attempt=1,
                settings=make_settings().trial,
                folder=folder,
                kinds=("test",),
            ),
        )
        answers.append(until(engine, JudgedEvent)[1])
    base, nothing = answers
    assert isinstance(base, JudgedEvent)
    assert isinstance(nothing, JudgedEvent)
    assert base.losses is not None
    assert base.losses.test is not None
    assert len(base.losses.test.nll) == len(base.losses.test.tokens) > 0
    assert (nothing.losses, "nothing was trained here" in (nothing.message or "")) == (None, True)


def test_work_on_changed_files_is_refused(open_one: Open, tmp_path: Path) -> None:
    """Submit, then judge: both answers say what differs, and the worker takes further work."""
    engine, other = open_one(), InputDigests(base="other")
    settings = make_settings().trial
    folder = tmp_path / "lora" / "trial_0000"
    commands = (
        SubmitCommand(
            **{"job": "x", "attempt": 2, "provenance": {}},
            folder=folder,
            settings=settings,
            expected=other,
        ),
        JudgeCommand(
            **{"job": "x", "attempt": 2, "folder": None, "kinds": ("test",)},
            settings=settings,
            expected=other,
        ),
    )
    for command in commands:
        _, slot = until(engine, SlotsEvent)
        assert isinstance(slot, SlotsEvent)
        engine.send(slot.worker, command)
        _, refused = until(engine, InputsChangedEvent)
        assert isinstance(refused, InputsChangedEvent)
        assert (refused.job, refused.attempt) == ("x", 2)
        assert "base model digest: other then, fake now" in refused.message
    assert not (folder / "outcome.json").exists()
    until(engine, SlotsEvent)


def test_a_stop_ends_the_trial_with_its_cause(open_one: Open, tmp_path: Path) -> None:
    """Stop: the trial ends within a moment, by the cause it was given."""
    engine = open_one(steps=100_000)
    submit = submit_trial(engine, tmp_path)
    time.sleep(0.3)
    engine.stop(submit.job, "pruned")
    _, ended = until(engine, EndedEvent)
    assert isinstance(ended, EndedEvent)
    assert ended.outcome.cause == "pruned"


def test_an_error_of_a_trial_leaves_the_worker_alive(open_one: Open, tmp_path: Path) -> None:
    """A code error is an outcome with its traceback, and the next trial trains."""
    engine = open_one(n0="error")
    submit_trial(engine, tmp_path)
    _, ended = until(engine, EndedEvent)
    assert isinstance(ended, EndedEvent)
    assert ended.outcome.cause == "error"
    assert "an error in the code" in (ended.outcome.message or "")
    submit_trial(engine, tmp_path, number=1)
    _, second = until(engine, EndedEvent)
    assert isinstance(second, EndedEvent)
    assert second.outcome.cause == "finished"


def test_after_oom_the_worker_offers_a_slot_again(open_one: Open, tmp_path: Path) -> None:
    """Out of memory recycles the worker; the next trial trains."""
    engine = open_one(n0="oom")
    submit_trial(engine, tmp_path)
    _, ended = until(engine, EndedEvent)
    assert isinstance(ended, EndedEvent)
    assert ended.outcome.cause == "oom"
    submit_trial(engine, tmp_path, number=1)
    _, second = until(engine, EndedEvent)
    assert isinstance(second, EndedEvent)
    assert second.outcome.cause == "finished"


def test_a_killed_trial_is_lost_as_timeout_and_the_worker_replaced(
    open_one: Open, tmp_path: Path
) -> None:
    """Kill: a hanging trial comes back as Lost with the reason given, and the next one trains."""
    engine = open_one(n0="hang")
    submit = submit_trial(engine, tmp_path)
    time.sleep(0.3)
    engine.kill(0, "because the test says so")
    _, lost = until(engine, LostEvent)
    assert isinstance(lost, LostEvent)
    assert (lost.job, lost.attempt, lost.cause) == (submit.job, 1, "timeout")
    assert lost.message == "because the test says so"
    submit_trial(engine, tmp_path, number=1)
    _, second = until(engine, EndedEvent)
    assert isinstance(second, EndedEvent)
    assert second.outcome.cause == "finished"


def _request(kind: str) -> Work:
    settings = make_settings().trial
    requests: dict[str, Work] = {
        "probe": ProbeCommand(job="lora probe", attempt=2, settings=settings),
        "check": CheckCommand(job="lora/0000", attempt=2, settings=settings),
        "judge": JudgeCommand(
            job="lora/0000_untuned", attempt=2, settings=settings, folder=None, kinds=("test",)
        ),
    }
    return requests[kind]


@pytest.mark.parametrize("kind", ["probe", "check", "judge"])
def test_a_worker_killed_in_a_request_names_it_and_is_replaced(
    open_one: Open, tmp_path: Path, kind: str
) -> None:
    """Kill during a probe, a check or a judgement: Lost carries its key, and the next trial trains."""
    engine, request = open_one(requests={kind: "hang"}), _request(kind)
    _, slot = until(engine, SlotsEvent)
    assert isinstance(slot, SlotsEvent)
    engine.send(slot.worker, request)
    assert engine.next_event(0.3) is None
    engine.kill(slot.worker, "because the test says so")
    _, lost = until(engine, LostEvent)
    assert isinstance(lost, LostEvent)
    assert (lost.job, lost.attempt, lost.cause) == (request.job, 2, "timeout")
    submit_trial(engine, tmp_path)
    _, ended = until(engine, EndedEvent)
    assert isinstance(ended, EndedEvent)
    assert ended.outcome.cause == "finished"


def test_workers_killed_while_they_start_are_replaced(open_one: Open, tmp_path: Path) -> None:
    """Kill before any slot was announced, as often as a pause may: no job is lost, no start failed."""
    engine = open_one()
    for _ in range(3):
        engine.kill(0, "because the test says so")
        _, lost = until(engine, LostEvent)
        assert isinstance(lost, LostEvent)
        assert (lost.job, lost.cause) == (None, "timeout")
    submit_trial(engine, tmp_path)
    _, ended = until(engine, EndedEvent)
    assert isinstance(ended, EndedEvent)
    assert ended.outcome.cause == "finished"


@pytest.mark.parametrize("kind", ["probe", "check", "judge"])
def test_a_request_that_was_answered_is_not_lost(open_one: Open, kind: str) -> None:
    """Kill after the answer was sent but not heard: the answer comes first, the loss names nothing."""
    engine, request = open_one(), _request(kind)
    _, slot = until(engine, SlotsEvent)
    assert isinstance(slot, SlotsEvent)
    engine.send(slot.worker, request)
    time.sleep(0.5)  # until it has been answered
    engine.kill(slot.worker, "too late")
    _, answer = until(engine, WorkAnswer)
    assert isinstance(answer, WorkAnswer)
    assert answer.job == request.job
    _, lost = until(engine, LostEvent)
    assert isinstance(lost, LostEvent)
    assert lost.job is None


def test_a_trial_that_had_ended_is_not_lost(open_one: Open, tmp_path: Path) -> None:
    """Kill after the end was sent but not yet heard: Ended comes first, then a loss without a trial."""
    engine = open_one(steps=2)
    submit_trial(engine, tmp_path)
    outcome = tmp_path / "lora" / "trial_0000" / "outcome.json"
    while not outcome.exists():
        time.sleep(0.01)
    time.sleep(0.5)  # until it has been sent as well
    engine.kill(0, "too late")
    _, ended = until(engine, EndedEvent)
    assert isinstance(ended, EndedEvent)
    assert ended.outcome.cause == "finished"
    _, lost = until(engine, LostEvent)
    assert isinstance(lost, LostEvent)
    assert lost.job is None


def _local(tmp_path: Path, **plan: str) -> LocalEngine:
    fake = FakeTrainer(
        step_seconds=0.01,
        steps=1000,
        plan={0: plan.get("n0", "finish")},
        finalists={},
        requests={},
        free_mib=None,
        room_mib=None,
    )
    return LocalEngine(make_workers("local", fake), 1, 1, lambda worker: tmp_path / f"{worker}.log")


def test_a_killed_worker_is_announced_and_replaced(tmp_path: Path) -> None:
    """kill -9 of a worker: Lost names its trial and its exit code; a new worker offers a slot."""
    engine = _local(tmp_path)
    try:
        submit = submit_trial(engine, tmp_path)
        time.sleep(0.3)
        os.kill(engine._hosts[0].process.pid or 0, signal.SIGKILL)
        _, lost = until(engine, LostEvent)
        assert isinstance(lost, LostEvent)
        assert (lost.job, lost.attempt) == (submit.job, 1)
        assert "exit code -9" in lost.message
        until(engine, SlotsEvent)
    finally:
        engine.close()


def test_signals_to_every_process_end_no_worker(tmp_path: Path) -> None:
    """Slurm's notice and SIGTERM reach workers too; the trial goes on until the driver says stop."""
    engine = _local(tmp_path)
    try:
        submit = submit_trial(engine, tmp_path)
        until(engine, ProgressEvent)
        for number in (
            signal.SIGUSR1,
            signal.SIGUSR2,
            signal.SIGTERM,
            signal.SIGHUP,
            signal.SIGINT,
        ):
            os.kill(engine._hosts[0].process.pid or 0, number)
        time.sleep(0.3)
        engine.stop(submit.job, "cancelled")
        _, ended = until(engine, EndedEvent)
        assert isinstance(ended, EndedEvent)
        assert ended.outcome.cause == "cancelled"
    finally:
        engine.close()


def test_close_ends_a_hanging_worker(tmp_path: Path) -> None:
    """A worker that hangs in a trial does not outlive its engine."""
    engine = _local(tmp_path, n0="hang")
    submit_trial(engine, tmp_path)
    process = psutil.Process(engine._hosts[0].process.pid)
    time.sleep(0.3)
    engine.close()
    assert not process.is_running()


def test_a_worker_ends_when_its_driver_is_gone(tmp_path: Path) -> None:
    """The pipe breaks, the worker ends, though it is in the middle of a trial."""
    engine = _local(tmp_path, n0="hang")
    submit_trial(engine, tmp_path)
    time.sleep(0.3)
    host = engine._hosts[0]
    with socket.socket(fileno=os.dup(host.connection.fileno())) as pipe:
        pipe.shutdown(socket.SHUT_RDWR)
    host.process.join(10)
    assert host.process.exitcode == 1


class HalfMessages(LocalEngine):
    """An engine whose workers have announced a long message and frozen in its middle."""

    def _start(self, worker: int) -> ProcessHost:
        ours, self.theirs = multiprocessing.Pipe()
        os.write(self.theirs.fileno(), struct.pack("!i", 2**20) + b"half")
        host = ProcessHost(worker, Mock(pid=None, exitcode=-9), ours, Path(os.devnull))
        host.listen(self._arrived)
        return host


def test_a_worker_that_freezes_within_a_message_holds_up_nobody() -> None:
    """The driver listens on as if nothing had come, until the worker is killed."""
    engine = HalfMessages(make_settings("workers=fake").workers, 1, 1, lambda _: Path(os.devnull))
    assert engine.next_event(0.1) is None
    frozen = engine.theirs
    frozen.close()
    assert isinstance(engine.next_event(10), LostEvent)
    engine.theirs.close()


def test_workers_that_cannot_start_end_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three failed starts in a row are an error with the worker's own words."""
    monkeypatch.setenv("PYTHONHASHSEED", "nonsense")  # the interpreter refuses to start
    engine = _local(tmp_path)
    try:
        with pytest.raises(WorkerError, match="dies before it can start"):
            until(engine, SlotsEvent)
    finally:
        engine.close()


def test_a_worker_is_not_blamed_for_its_predecessors_words(tmp_path: Path) -> None:
    """The log goes on through all of a worker's processes; quoted is what the latest printed."""
    log = tmp_path / "worker_0.log"
    begin_log(log, 0)
    with log.open("a") as file:
        file.write("BrokenPipeError\n")
    assert tail_of(log) == "BrokenPipeError"
    begin_log(log, 0)
    assert tail_of(log) == ""
    assert "BrokenPipeError" in log.read_text()


def test_a_full_disk_keeps_no_worker_from_starting() -> None:
    """The line in its log is lost; the driver goes on."""
    begin_log(Path("/dev/full"), 0)
