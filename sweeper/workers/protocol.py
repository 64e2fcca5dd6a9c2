"""The protocol between driver and worker: frozen messages that travel as JSON.

A worker announces free slots; down go submit, stop, probe, check and close; up come events that carry
the trial and the attempt. One slot a worker today; packed training announces more and changes nothing
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, TypeAdapter

from sweeper.config.settings import TrialSettings
from sweeper.core.outcome import (
    ArmBaseline,
    HeldOutKind,
    HeldOutLosses,
    Outcome,
    StopCause,
    TrialSize,
)
from sweeper.core.paths import TrialFolder
from sweeper.core.value import FrozenValue, MemoryShortfall
from sweeper.training.observer import TrialObserver


class SubmitCommand(FrozenValue):
    """Train this trial."""

    kind: Literal["submit"] = "submit"
    trial: str
    attempt: int
    folder: Path
    settings: TrialSettings
    provenance: dict[str, Any]
    adopted: Path | None = None
    """A model that another run trained: it is judged and kept, and nothing is trained."""


class JudgeCommand(FrozenValue):
    """Judge a stored artifact, or the untuned base, on the test split, on general text, or both.

    Sent only when every search has ended: no search ever sees these figures.
    """

    kind: Literal["test"] = "test"
    trial: str
    attempt: int
    settings: TrialSettings
    folder: Path | None
    """Of the trial whose artifact is judged; None for the untuned base."""
    kinds: tuple[HeldOutKind, ...]
    """On what."""


class StopCommand(FrozenValue):
    """End this trial at its next step."""

    kind: Literal["stop"] = "stop"
    trial: str
    cause: StopCause


class ProbeCommand(FrozenValue):
    """Tell what an arm's trials have in common, and how good the untuned base is."""

    kind: Literal["probe"] = "probe"
    arm: str
    settings: TrialSettings
    adopted: Path | None = None
    """The model that is judged in the place of any training."""


class CheckCommand(FrozenValue):
    """Tell whether this trial is possible on its model, and how large it is."""

    kind: Literal["check"] = "check"
    settings: TrialSettings


class CloseCommand(FrozenValue):
    """End when idle."""

    kind: Literal["close"] = "close"


class SlotsEvent(FrozenValue):
    """A worker can take this many trials more than it has."""

    kind: Literal["slots"] = "slots"
    worker: int
    free: int


class ProgressEvent(FrozenValue):
    """A trial took steps."""

    kind: Literal["progress"] = "progress"
    trial: str
    attempt: int
    step: int
    total_steps: int
    tokens_per_second: float


class EvaluatedEvent(FrozenValue):
    """A trial was judged on the validation split; `value` is of the metric that pruning goes by."""

    kind: Literal["evaluated"] = "evaluated"
    trial: str
    attempt: int
    step: int
    total_steps: int
    value: float


class WaitingEvent(FrozenValue):
    """A trial waits for something that a person has to see to; it goes on by itself afterwards."""

    kind: Literal["waiting"] = "waiting"
    trial: str
    attempt: int
    message: str


class EndedEvent(FrozenValue):
    """A trial ended, and its folder is complete."""

    kind: Literal["ended"] = "ended"
    trial: str
    attempt: int
    outcome: Outcome


class JudgedEvent(FrozenValue):
    """The answer to a test: the losses, or why there are none."""

    kind: Literal["tested"] = "tested"
    trial: str
    attempt: int
    losses: HeldOutLosses | None
    message: str | None


class ProbedEvent(FrozenValue):
    """The answer to a probe: facts, or why there are none."""

    kind: Literal["probed"] = "probed"
    arm: str
    facts: ArmBaseline | None
    message: str | None
    misfit: MemoryShortfall | None = None
    """Set if the arm's trainings are larger than the device."""


class CheckedEvent(FrozenValue):
    """A worker's answer to a check: the trial's size, or how it ended before it began."""

    kind: Literal["checked"] = "checked"
    worker: int
    size: TrialSize | None
    refusal: Outcome | None
    """Refused, or an error in the code."""


class LostEvent(FrozenValue):
    """A worker died or was killed; `trial` is what it was training or testing, if anything."""

    kind: Literal["lost"] = "lost"
    worker: int
    trial: str | None
    attempt: int
    cause: Literal["crash", "timeout", "oom"]
    message: str


def lost(
    worker: int,
    current: SubmitCommand | JudgeCommand | None,
    killed_for: str | None,
    message: str,
    died_of: Literal["crash", "oom"] = "crash",
) -> LostEvent:
    """What becomes of a dead worker's trial: a timeout if the driver killed it, else what it died of."""
    return LostEvent(
        worker=worker,
        trial=current.trial if current else None,
        attempt=current.attempt if current else 0,
        cause=died_of if killed_for is None else "timeout",
        message=message if killed_for is None else killed_for,
    )


WorkerCommand = (
    SubmitCommand | JudgeCommand | StopCommand | ProbeCommand | CheckCommand | CloseCommand
)
WorkerEvent = (
    SlotsEvent
    | ProgressEvent
    | EvaluatedEvent
    | WaitingEvent
    | EndedEvent
    | JudgedEvent
    | ProbedEvent
    | CheckedEvent
    | LostEvent
)
COMMANDS: TypeAdapter[WorkerCommand] = TypeAdapter(
    Annotated[WorkerCommand, Field(discriminator="kind")]
)
EVENTS: TypeAdapter[WorkerEvent] = TypeAdapter(Annotated[WorkerEvent, Field(discriminator="kind")])


class TrialRunner(Protocol):
    """What a worker runs: the real trainer, or the fake one of the tests."""

    @property
    def worn_out(self) -> bool:
        """Whether so much memory is lost in this process that another should take its place."""

    def probe(self, settings: TrialSettings, adopted: Path | None) -> ArmBaseline:
        """Facts shared by the trials of an arm; raises SweeperError if they cannot be had."""

    def check(self, settings: TrialSettings) -> TrialSize:
        """How large a trial is; raises SweeperError if it is impossible. Loads no weights."""

    def run(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        provenance: dict[str, Any],
        observer: TrialObserver,
    ) -> Outcome:
        """Train one trial to its outcome and write its folder."""

    def adopt(
        self, settings: TrialSettings, folder: TrialFolder, provenance: dict[str, Any], model: Path
    ) -> Outcome:
        """Judge a model that another run trained and keep it as a trial of this study."""

    def test(
        self, settings: TrialSettings, folder: TrialFolder | None, kinds: Sequence[HeldOutKind]
    ) -> HeldOutLosses:
        """Judge a trial's artifact (None: the untuned base) on these kinds of unseen text."""


class Engine(Protocol):
    """Hosts workers somewhere and carries messages to and from them.

    Who calls it: the driver, from one thread. `next_event` is the only call that waits. A worker
    takes work after it announced a slot (`Slots`); a dead one is announced (`Lost`) and replaced.
    """

    def probe(self, worker: int, probe: ProbeCommand | CheckCommand) -> None:
        """Have a free worker answer with `Probed` or `Checked`."""

    def submit(self, worker: int, submit: SubmitCommand) -> None:
        """Hand a trial to a free slot; `Ended` or `Lost` follows."""

    def test(self, worker: int, test: JudgeCommand) -> None:
        """Hand a judgement on unseen texts to a free slot; `Tested` or `Lost` follows."""

    def stop(self, trial: str, cause: StopCause) -> None:
        """Ask for a trial's end; its `Ended` follows. Unknown trials (just ended) are ignored."""

    def kill(self, worker: int, reason: str) -> None:
        """End a worker at once, whatever it is doing; its `Lost` follows, cause timeout.

        What it sent before comes first: a trial that had just ended is not lost.
        """

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        """The next event, or None if none came in time.

        Raises:
            WorkerError: workers die before they can do anything.
        """

    def close(self) -> None:
        """End all workers, whatever they are doing."""
