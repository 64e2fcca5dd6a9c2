"""Words about what a worker does at the moment, for the person who waits for it.

Code that takes long names its stage and counts within it, and does not know who listens. Without a
listener nothing happens. Threads that a listener did not start in are not heard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

COUNT_SECONDS = 2.0
"""Seconds between two counts that a listener hears. The begin of a stage is always heard."""


@dataclass
class StageListener:
    """A receiver of words, which is spared most counts."""

    pass_on: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _heard: float = 0.0

    def begin(self, words: str) -> None:
        """Pass on the begin of a stage."""
        self._heard = self.clock()
        self.pass_on(words)

    def count(self, words: str) -> None:
        """Pass on a count if the last words are old enough."""
        if self.clock() - self._heard >= COUNT_SECONDS:
            self.begin(words)


_LISTENER: ContextVar[StageListener | None] = ContextVar("stage_listener", default=None)
_STAGE: ContextVar[str] = ContextVar("stage", default="")


@contextmanager
def heard_by(listener: StageListener) -> Iterator[None]:
    """Let a listener hear all stages within the context."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def stage(words: str) -> Iterator[None]:
    """Name what is done within the context, as in "loading the base model"."""
    token = _STAGE.set(words)
    if (listener := _LISTENER.get()) is not None:
        listener.begin(words)
    try:
        yield
    finally:
        _STAGE.reset(token)


def count(done: int, total: int, things: str) -> None:
    """Report how much of the current stage is done, as in "3,200 of 17,436 rows"."""
    if (listener := _LISTENER.get()) is not None:
        listener.count(f"{_STAGE.get()}: {done:,} of {total:,} {things}")


def report(words: str) -> None:
    """Report words that need no stage, as in "step 40 of 200", at most as often as counts."""
    if (listener := _LISTENER.get()) is not None:
        listener.count(words)
