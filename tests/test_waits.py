"""Every call of the product that can wait has a limit, or its line in BOUNDED says what bounds it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sweeper.commands.dry_run import estimate
from sweeper.core.errors import SweeperError
from sweeper.nightly.challenge import judge_in_subprocess
from sweeper.tracking import registry

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    *sorted((ROOT / "sweeper").rglob("*.py")),
    *sorted((ROOT / "hydra_plugins").rglob("*.py")),
)

LIMITED = {"timeout", "timeout_s", "wait_s", "timeout_seconds"}
"""Names of arguments that are limits."""
PLACES = {
    # the position of the limit among the arguments, None where only a keyword names it
    **{"get": 1, "join": 0, "wait": 0, "wait_for": 1, "poll": 0, "acquire": None, "result": 0},
    **{"select": 3, "communicate": None, "recv": None, "recv_bytes": None, "receive": None},
    **{"next_event": 0, "accept": None, "create_connection": 1, "connect": None},
}
"""Methods that can wait, and the position of their limit."""
FUNCTIONS = {
    **{"subprocess.run": None, "subprocess.call": None, "subprocess.check_call": None},
    **{"subprocess.check_output": None, "urlopen": 2, "urllib.request.urlopen": 2, "input": None},
    **{"FileLock": 1, "SoftFileLock": 1, "ray.wait": None, "ray.get": None, "sqlite3.connect": 1},
    **{"requests.get": None, "requests.post": None, "requests.request": None, "http_request": None},
    **{"snapshot_download": None, "hf_hub_download": None, "os.wait": None, "os.waitpid": None},
    **{"process.wait": 0, "fcntl.flock": None, "load_dataset": None, "datasets.load_dataset": None},
}
"""Functions that can wait, and the position of their limit."""
QUEUES = {"down", "up", "work", "queue", "inbox", "orders", "events"}
"""Last words of the names of queues. The `get` of anything else is a dict's."""

HUB = "its HTTP client limits each read, and workers.probe_timeout_s limits the probe around it"
DRIVER = "a worker waits for its driver, and ends itself when the pipe to the driver breaks"
LOCK = "the lock was made with a limit"

BOUNDED = {
    "sweeper/commands/doctor.py:reach_database engine.connect": "its connect_args hold a limit",
    "sweeper/commands/guarded_steps.py:take self.sleep": "all steps together wait for SPACE_PATIENCE_S",
    "sweeper/reporting/study_status.py:_is_free fcntl.flock": "LOCK_NB: it does not wait",
    "sweeper/reporting/study_status.py:_is_free time.sleep": "until LOOK_SECONDS have passed",
    "sweeper/data/prefetch.py:_snapshot snapshot_download": "a person waits, and sees the progress",
    "sweeper/data/sources.py:hub_data datasets.load_dataset": HUB,
    "sweeper/modeling/model_source.py:_from_hub snapshot_download": HUB,
    "sweeper/modeling/quantized_cache.py:_locked lock.acquire": LOCK,
    "sweeper/nightly/night_claims.py:claim lock.acquire": LOCK,
    "sweeper/search/ownership.py:hold self._engine.connect": "its connect_args hold a limit",
    "sweeper/search/ownership.py:hold self._lock.acquire": LOCK,
    "sweeper/tracking/mlflow_tracker.py:_run_thread FileLock": "its acquire has a limit",
    "sweeper/tracking/mlflow_tracker.py:_run_thread self._changed.wait_for": (
        "a daemon thread waits for work. Its study waits for it with a limit (_wait_for_thread)"
    ),
    "sweeper/workers/followers.py:_listen connection.recv_bytes": DRIVER,
    "sweeper/workers/followers.py:_main work.get": DRIVER,
    "sweeper/workers/followers.py:report self.connection.recv_bytes": "poll has seen a report",
    "sweeper/workers/inline_engine.py:receive self.down.get": "a daemon thread of the driver",
    "sweeper/commands/steer.py:_wait time.sleep": "the loop ends at its time limit",
    "sweeper/data/render_limit.py:_watch time.sleep": "a daemon thread that watches for ever",
    "sweeper/search/storage.py:_open time.sleep": "a loop of STARTS turns, or of an OpeningWait",
    "sweeper/search/storage.py:repeated sleep": "the loop ends after PATIENCE_S",
    "sweeper/workers/local_engine.py:_read self.connection.recv_bytes": (
        "a daemon thread that ends with the worker. The driver reads its queue with a limit"
    ),
    "sweeper/workers/fake_runner.py:_train time.sleep": "a loop of workers.fake.steps turns",
    "sweeper/workers/local_engine.py:receive self.connection.recv_bytes": DRIVER,
    "sweeper/workers/ray_engine.py:_private_folder owner.acquire": LOCK,
    "sweeper/workers/ray_engine.py:_take ray.get": "ray.wait has seen the answer",
    "sweeper/workers/ray_engine.py:receive self._down.get": "Ray ends an actor with its driver",
    "sweeper/workers/worker.py:_outcome patience.wait": "sleeps for FULL_DISK_WAIT_S",
    "sweeper/workers/worker.py:_read channel.receive": DRIVER,
    "sweeper/workers/worker.py:serve orders.work.get": DRIVER,
    "sweeper/workers/worker.py:wait_for_answer self.answered.wait_for": DRIVER,
    "sweeper/workers/worker_session.py:lead_session time.sleep": "five times at most",
}
"""Calls without a limit, by file, function and call, and what bounds each of them."""


def waiting_calls(source: str) -> Iterator[str]:
    """Yield each call that can wait and has no limit, after the name of its function."""
    yield from _waiting(ast.parse(source), "", looping=False)


def _waiting(node: ast.AST, function: str, *, looping: bool) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef):
        function, looping = node.name, False
    looping |= isinstance(node, ast.While | ast.For)
    if isinstance(node, ast.Call) and (
        (_can_wait(node) and not _is_limited(node)) or (looping and _is_sleep(node))
    ):
        yield f"{function} {ast.unparse(node.func)}"
    for child in ast.iter_child_nodes(node):
        yield from _waiting(child, function, looping=looping)


def _is_sleep(call: ast.Call) -> bool:
    """True for a sleep, which in a loop may wait for ever."""
    return ast.unparse(call.func).rpartition(".")[2] == "sleep"


def _can_wait(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name in FUNCTIONS:
        return True
    owner, _, method = name.rpartition(".")
    if method not in PLACES or not owner:
        return False
    if method == "get":
        return owner.rpartition(".")[2].lstrip("_") in QUEUES
    if method == "join":  # the join of a text takes what it joins, that of a thread at most seconds
        return not call.args or _is_number(call.args[0])
    return not isinstance(call.func, ast.Attribute) or not isinstance(call.func.value, ast.Constant)


def _is_number(value: ast.expr) -> bool:
    """True for what may be a number of seconds and is no collection."""
    return isinstance(value, ast.Constant | ast.BinOp) and not isinstance(
        getattr(value, "value", 0), str
    )


def _is_limited(call: ast.Call) -> bool:
    """True if one of the call's arguments is a limit other than None."""
    name = ast.unparse(call.func)
    place = FUNCTIONS[name] if name in FUNCTIONS else PLACES[name.rpartition(".")[2]]
    named = [word.value for word in call.keywords if word.arg in LIMITED]
    placed = call.args[place : place + 1] if place is not None else []
    return any(not _is_none(value) for value in (*named, *placed))


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _found() -> list[str]:
    return [
        f"{path.relative_to(ROOT).as_posix()}:{call}"
        for path in SOURCES
        for call in waiting_calls(path.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize(
    "call",
    [
        *("events.get()", "self._up.get(True)", "thread.join()", "process.join(None)"),
        *("event.wait()", "changed.wait_for(lambda: done)", "engine.next_event(None)"),
        *("lock.acquire()", "FileLock(path)", "FileLock(path, timeout=None)", "connection.recv()"),
        *("subprocess.run(command)", "process.communicate()", "ray.get(call)", "ray.wait(calls)"),
        *("urllib.request.urlopen(url)", "future.result()", "select.select([], [], [])", "input()"),
        *("snapshot_download(name)", "channel.receive()", "socket.create_connection(address)"),
    ],
)
def test_a_wait_without_a_limit_is_found(call: str) -> None:
    """Whatever waits for another thread, process, machine, file or person."""
    assert list(waiting_calls(f"def it():\n    {call}\n")) == [f"it {call.partition('(')[0]}"]


def test_a_loop_that_sleeps_is_found() -> None:
    """It may never end, which no argument shows."""
    loop = "def it():\n    while not done():\n        if slow():\n            time.sleep(1)\n"
    assert list(waiting_calls(loop)) == ["it time.sleep"]


@pytest.mark.parametrize(
    "call",
    [
        *("events.get(timeout=1)", "settings.get('key')", "', '.join(words)", "thread.join(1.0)"),
        *("process.join(CLOSE_SECONDS)", "event.wait(wait_s)", "connection.poll(0)", "sleep(1)"),
        *("FileLock(path, timeout=0)", "lock.acquire(timeout=1)", "text.join(words)"),
        *("subprocess.run(command, timeout=5)", "ray.wait(calls, timeout=timeout_s)", "opened()"),
    ],
)
def test_a_wait_with_a_limit_is_none(call: str) -> None:
    """A limit by name or in its place, a dict's get and a text's join."""
    assert list(waiting_calls(f"def it():\n    {call}\n")) == []


def test_every_wait_of_the_product_is_bounded() -> None:
    """A wait has a limit, or exactly one line of BOUNDED with its reason; no line is left over."""
    found = _found()
    assert len(SOURCES) > 100
    assert sorted(found) == sorted(BOUNDED), "give the call a limit, or explain it in BOUNDED"
    assert all(BOUNDED.values())


@pytest.mark.parametrize(
    ("limit", "wait"),
    [
        ("sweeper.commands.dry_run.ESTIMATE_SECONDS", lambda: estimate([])),
        ("sweeper.nightly.challenge.GATE_SECONDS", lambda: judge_in_subprocess("gate", {})),
        ("sweeper.tracking.registry.GC_SECONDS", lambda: registry._run_gc("sqlite://", "1d")),
    ],
)
def test_a_process_that_gives_no_answer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, limit: str, wait: Callable[[], object]
) -> None:
    """The process is ended, and the message says how long it had."""
    monkeypatch.setattr(limit, 0.05)
    with pytest.raises(SweeperError, match=r"gave no answer for|did not end within"):
        wait()
