"""Limits on a trial's time, with a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sweeper.config.settings import FakeTrainer, WorkerSettings
from sweeper.core.errors import WorkerError
from sweeper.core.outcome import Outcome, StopCause
from sweeper.workers.protocol import (
    CheckCommand,
    CheckedEvent,
    EndedEvent,
    EvaluatedEvent,
    JudgeCommand,
    LostEvent,
    ProbeCommand,
    ProgressEvent,
    SlotsEvent,
    SubmitCommand,
    WaitingEvent,
    Work,
    WorkerEvent,
    lost,
)
from sweeper.workers.time_limits import LimitedEngine, start_limit_s
from tests.conftest import make_settings

SETTINGS = make_settings().trial


@dataclass
class ScriptedEngine:
    """An engine that waits by moving a clock: each entry is the time that passes and what comes."""

    script: list[tuple[float, WorkerEvent | None]] = field(default_factory=list)
    now: float = 0.0
    killed: dict[int, str] = field(default_factory=dict)
    current: Work | None = None

    def send(self, worker: int, work: Work) -> None:
        self.current = work

    def proceed(self, job: str, step: int) -> None:
        pass

    def stop(self, job: str, cause: StopCause) -> None:
        raise NotImplementedError

    def kill(self, worker: int, reason: str) -> None:
        assert worker not in self.killed, "killed twice"
        self.killed[worker] = reason
        self.script.insert(0, (0.0, lost(worker, self.current, reason, "")))

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        seconds, event = self.script.pop(0) if self.script else (timeout_s, None)
        self.now += seconds
        return event

    def close(self) -> None: ...


def _limited(
    engine: ScriptedEngine,
    trial_timeout_s: float | None = None,
    stall_timeout_s: float | None = 10,
    probe_timeout_s: float | None = 60,
    count: int = 0,
) -> LimitedEngine:
    workers = WorkerSettings(
        engine="local",
        trainer="fake",
        address=None,
        trial_timeout_s=trial_timeout_s,
        stall_timeout_s=stall_timeout_s,
        probe_timeout_s=probe_timeout_s,
        fake=FakeTrainer(
            step_seconds=0,
            steps=1,
            plan={},
            finalists={},
            requests={},
            free_mib=None,
            room_mib=None,
        ),
    )
    return LimitedEngine(engine, workers, clock=lambda: engine.now, count=count)


def _submit(worker: int = 0) -> SubmitCommand:
    return SubmitCommand(
        job=f"lora/{worker:04d}",
        attempt=2,
        folder=Path("unused"),
        settings=SETTINGS,
        provenance={},
    )


def _progress(worker: int = 0) -> ProgressEvent:
    return ProgressEvent(
        job=f"lora/{worker:04d}", attempt=2, step=1, total_steps=9, tokens_per_second=1.0
    )


def _listen(engine: LimitedEngine, times: int) -> list[WorkerEvent]:
    events = [engine.next_event(1.0) for _ in range(times)]
    return [event for event in events if event is not None]


def test_a_silent_trial_is_killed_once_and_lost_as_timeout() -> None:
    """Ten seconds without a word: the worker is killed, and the loss names trial, attempt and key."""
    inner = ScriptedEngine()
    engine = _limited(inner)
    engine.send(0, _submit())
    assert _listen(engine, 9) == []
    assert inner.killed == {}
    (event,) = _listen(engine, 5)
    assert isinstance(event, LostEvent)
    assert (event.job, event.attempt, event.cause) == ("lora/0000", 2, "timeout")
    assert "workers.stall_timeout_s" in event.message


@pytest.mark.parametrize(
    "word",
    [
        _progress(),
        EvaluatedEvent(job="lora/0000", attempt=2, step=1, total_steps=9, value=1.0),
    ],
)
def test_a_word_from_the_trial_starts_the_count_again(word: WorkerEvent) -> None:
    """Progress and evaluations are signs of life."""
    inner = ScriptedEngine(script=[(1.0, None)] * 9 + [(0.5, word)])
    engine = _limited(inner)
    engine.send(0, _submit())
    _listen(engine, 10 + 9)
    assert inner.killed == {}
    _listen(engine, 1)
    assert list(inner.killed) == [0]


def test_a_trial_that_waits_for_a_person_is_not_silent() -> None:
    """A full disk may stay full for longer than the limit; the count starts again with the next step."""
    waiting = WaitingEvent(job="lora/0000", attempt=2, message="the disk is full")
    inner = ScriptedEngine(script=[(0.5, waiting), *[(1.0, None)] * 100, (0.5, _progress())])
    engine = _limited(inner)
    engine.send(0, _submit())
    _listen(engine, 102)
    assert inner.killed == {}
    _listen(engine, 15)
    assert list(inner.killed) == [0]


@pytest.mark.parametrize("kind", ["probe", "check", "judge"])
def test_an_unanswered_request_is_killed_after_a_limit_of_its_own(kind: str) -> None:
    """A probe, a check or a judgement may take 60 s, six times as long as a silent trial."""
    requests: dict[str, Work] = {
        "probe": ProbeCommand(job="lora", attempt=1, settings=SETTINGS),
        "check": CheckCommand(job="lora/0000", attempt=1, settings=SETTINGS),
        "judge": JudgeCommand(
            job="lora/0000_untuned", attempt=1, settings=SETTINGS, folder=None, kinds=("test",)
        ),
    }
    inner = ScriptedEngine()
    engine = _limited(inner)
    engine.send(0, requests[kind])
    assert _listen(engine, 59) == []
    assert inner.killed == {}
    (event,) = _listen(engine, 2)
    assert isinstance(event, LostEvent)
    assert (event.job, event.attempt, event.cause) == (requests[kind].job, 1, "timeout")
    assert event.message == "killed: no answer for 60 s (workers.probe_timeout_s)"


def test_an_answered_request_is_watched_no_more() -> None:
    """After its answer a worker may be idle for longer than any limit."""
    answer = CheckedEvent(job="lora/0000", attempt=1, size=None, refusal=None)
    inner = ScriptedEngine(script=[(1.0, answer)])
    engine = _limited(inner)
    engine.send(0, CheckCommand(job="lora/0000", attempt=1, settings=SETTINGS))
    _listen(engine, 100)
    assert inner.killed == {}


def test_a_talkative_neighbour_hides_no_stall() -> None:
    """Worker 1 speaks every half second; worker 0, silent for ten, is killed all the same."""
    inner = ScriptedEngine(script=[(0.5, _progress(1))] * 20)
    engine = _limited(inner)
    engine.send(0, _submit(0))
    engine.send(1, _submit(1))
    _listen(engine, 20)
    assert list(inner.killed) == [0]


def test_a_suspended_driver_kills_nobody() -> None:
    """An hour passes within one call, or between two: the messages are heard before any verdict."""
    inner = ScriptedEngine(script=[(3600.0, None)])
    engine = _limited(inner)
    engine.send(0, _submit())
    _listen(engine, 1)
    inner.now += 3600
    inner.script = [(0.0, _progress())]
    _listen(engine, 9)
    assert inner.killed == {}


def test_the_wall_clock_limit_ends_a_trial_that_still_talks() -> None:
    """An attempt may take 5 s, however busy it is; the next attempt starts its own count."""
    inner = ScriptedEngine(script=[(0.5, _progress())] * 10)
    engine = _limited(inner, trial_timeout_s=5)
    engine.send(0, _submit())
    events = _listen(engine, 11)
    assert isinstance(events[-1], LostEvent)
    assert "workers.trial_timeout_s" in inner.killed.pop(0)
    engine.send(0, _submit())
    _listen(engine, 4)
    assert inner.killed == {}


@pytest.mark.parametrize(
    "end",
    [
        lambda: EndedEvent(job="lora/0000", attempt=2, outcome=Outcome(cause="cancelled")),
        lambda: lost(0, _submit(), None, "died by itself"),
    ],
)
def test_a_trial_that_ended_is_watched_no_more(end: Callable[[], WorkerEvent]) -> None:
    """An idle worker may be silent for ever."""
    inner = ScriptedEngine(script=[(1.0, end()), (0.0, SlotsEvent(worker=0, free=1))])
    engine = _limited(inner, trial_timeout_s=5)
    engine.send(0, _submit())
    _listen(engine, 60)
    assert inner.killed == {}


def test_null_is_no_limit() -> None:
    """All limits can be switched off."""
    inner = ScriptedEngine()
    engine = _limited(inner, stall_timeout_s=None, probe_timeout_s=None)
    engine.send(0, _submit())
    engine.send(1, ProbeCommand(job="lora", attempt=1, settings=SETTINGS))
    _listen(engine, 10_000)
    assert inner.killed == {}


def test_a_worker_that_never_starts_is_killed_three_times() -> None:
    """No slot for the limit of an answer, three times in a row, is an error with the reason."""
    inner = ScriptedEngine()
    engine = _limited(inner, count=1)
    _listen(engine, 61)
    assert inner.killed.pop(0) == "killed: not ready within 60 s of its start"
    _listen(engine, 61)
    inner.killed.clear()
    with pytest.raises(WorkerError, match="worker 0 never starts: killed: not ready within 60 s"):
        _listen(engine, 62)


def test_a_start_has_a_limit_of_its_own() -> None:
    """An answer may take four hours, a start a quarter of an hour; Ray's own limit counts there."""
    inner = ScriptedEngine()
    engine = _limited(inner, probe_timeout_s=14400, count=2)
    inner.script = [(1.0, SlotsEvent(worker=1, free=1))]
    _listen(engine, 898)
    assert inner.killed == {}
    _listen(engine, 3)
    assert list(inner.killed) == [0]
    assert start_limit_s(make_settings("workers=ray").workers) is None


class LateKill(ScriptedEngine):
    """An engine whose worker had sent its answer and a slot before it was killed."""

    def kill(self, worker: int, reason: str) -> None:
        self.killed[worker] = reason
        self.script.append((0.0, lost(worker, None, reason, "")))
        self.script.append((0.0, SlotsEvent(worker=worker, free=1)))


def test_a_killed_worker_offers_no_slot() -> None:
    """The answer counts, the slot after it does not: another job would die with the worker."""
    ended = EndedEvent(job="lora/0000", attempt=2, outcome=Outcome(cause="finished"))
    engine = LateKill([(31.0, _progress()), (0.0, ended), (0.0, SlotsEvent(worker=0, free=1))])
    limited = _limited(engine, trial_timeout_s=30)
    limited.send(0, _submit())
    events = _listen(limited, 5)
    assert list(engine.killed) == [0]
    assert events[1] == ended
    assert [event.free for event in events if isinstance(event, SlotsEvent)] == [0, 1]
