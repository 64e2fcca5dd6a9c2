"""The protocol between driver and worker: frozen messages that travel as JSON.

A worker announces free slots. The driver sends work (submit, judge, probe, check), and stop, proceed
and close. The worker answers with events that carry the key and the attempt of the job. A worker has
one slot today. Packed training would announce more without a change of the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, TypeAdapter

from sweeper.config.settings import TrialSettings
from sweeper.core.device_failures import DeathCause
from sweeper.core.input_digests import InputDigests
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
    job: str
    """The trial's key, as in "lora/0007"."""
    attempt: int
    folder: Path
    settings: TrialSettings
    provenance: dict[str, Any]
    adopted: Path | None = None
    """A model that another run trained: it is judged and kept, and nothing is trained."""
    expected: InputDigests | None = None
    """Digests that the worker must find when it loads data and base model."""
    watched: bool = False
    """True if each evaluation is answered with ProceedCommand or StopCommand, which the trial awaits."""


class JudgeCommand(FrozenValue):
    """Judge a stored artifact, or the untuned base, on the test split, on general text, or both.

    Sent only when every search has ended: no search ever sees these figures.
    """

    kind: Literal["judge"] = "judge"
    job: str
    attempt: int
    settings: TrialSettings
    folder: Path | None
    """The folder of the trial whose artifact is judged, or None for the untuned base."""
    kinds: tuple[HeldOutKind, ...]
    """The kinds of unseen text to judge on."""
    expected: InputDigests | None = None
    """See SubmitCommand."""


class StopCommand(FrozenValue):
    """End this trial at its next step."""

    kind: Literal["stop"] = "stop"
    job: str
    cause: StopCause


class ProceedCommand(FrozenValue):
    """Continue this trial after its evaluation at this step."""

    kind: Literal["proceed"] = "proceed"
    job: str
    step: int


class ProbeCommand(FrozenValue):
    """Report what an arm's trials have in common, and how good the untuned base is."""

    kind: Literal["probe"] = "probe"
    job: str
    attempt: int
    settings: TrialSettings
    adopted: Path | None = None
    """The model that is judged instead of any training."""


class CheckCommand(FrozenValue):
    """Report whether this trial is possible on its model, and how large it is."""

    kind: Literal["check"] = "check"
    job: str
    attempt: int
    settings: TrialSettings
    expected: InputDigests | None = None
    """See SubmitCommand. A trial that is impossible on other files is not refused for it."""


class CloseCommand(FrozenValue):
    """End when idle."""

    kind: Literal["close"] = "close"


class SlotsEvent(FrozenValue):
    """A worker can take this many jobs more than it has."""

    kind: Literal["slots"] = "slots"
    worker: int
    free: int


class ProgressEvent(FrozenValue):
    """A trial took steps."""

    kind: Literal["progress"] = "progress"
    job: str
    attempt: int
    step: int
    total_steps: int
    tokens_per_second: float


class EvaluatedEvent(FrozenValue):
    """A trial was judged on the validation split. `value` is of the metric that pruning goes by."""

    kind: Literal["evaluated"] = "evaluated"
    job: str
    attempt: int
    step: int
    total_steps: int
    value: float


class WaitingEvent(FrozenValue):
    """A trial waits until a person has freed something, and then continues by itself."""

    kind: Literal["waiting"] = "waiting"
    job: str
    attempt: int
    message: str


class WorkingEvent(FrozenValue):
    """A worker says what it does at the moment. No sign of life: no time limit begins again."""

    kind: Literal["working"] = "working"
    job: str
    attempt: int
    message: str
    """Words as in "judging the untuned base: 3,200 of 17,436 rows"."""


class EndedEvent(FrozenValue):
    """A trial ended, and its folder is complete."""

    kind: Literal["ended"] = "ended"
    job: str
    attempt: int
    outcome: Outcome


class JudgedEvent(FrozenValue):
    """The answer to JudgeCommand: the losses, or why there are none."""

    kind: Literal["judged"] = "judged"
    job: str
    attempt: int
    losses: HeldOutLosses | None
    message: str | None


class ProbedEvent(FrozenValue):
    """The answer to ProbeCommand: facts, or why there are none."""

    kind: Literal["probed"] = "probed"
    job: str
    attempt: int
    facts: ArmBaseline | None
    message: str | None
    misfit: MemoryShortfall | None = None
    """Set if the arm's trainings are larger than the device."""


class CheckedEvent(FrozenValue):
    """The answer to CheckCommand: the trial's size, or how it ended before it began."""

    kind: Literal["checked"] = "checked"
    job: str
    attempt: int
    size: TrialSize | None
    refusal: Outcome | None
    """The outcome of an impossible trial (refused), or of an error in the code. None with a size."""


class InputsChangedEvent(FrozenValue):
    """A worker found other data or another base model than a command expects, and did nothing."""

    kind: Literal["changed"] = "changed"
    job: str
    attempt: int
    message: str
    """A line for each difference: both digests, and the settings that name the files."""


class LostEvent(FrozenValue):
    """A worker died or was killed. `job` is the key of its unanswered work, or None without any."""

    kind: Literal["lost"] = "lost"
    worker: int
    job: str | None
    attempt: int
    cause: Literal["timeout"] | DeathCause
    message: str


Work = SubmitCommand | JudgeCommand | ProbeCommand | CheckCommand
"""Commands that occupy a slot until they are answered."""
WorkAnswer = EndedEvent | JudgedEvent | ProbedEvent | CheckedEvent | InputsChangedEvent
"""Events that answer a command of Work and free its slot."""


def lost(
    worker: int,
    current: Work | None,
    killed_for: str | None,
    message: str,
    died_of: DeathCause = "crash",
) -> LostEvent:
    """Return the event of a dead worker: cause timeout if the driver killed it, else `died_of`."""
    return LostEvent(
        worker=worker,
        job=current.job if current else None,
        attempt=current.attempt if current else 0,
        cause=died_of if killed_for is None else "timeout",
        message=message if killed_for is None else killed_for,
    )


WorkerCommand = Work | StopCommand | ProceedCommand | CloseCommand
WorkerEvent = (
    SlotsEvent
    | ProgressEvent
    | EvaluatedEvent
    | WaitingEvent
    | WorkingEvent
    | WorkAnswer
    | LostEvent
)
# the kind chooses one class of a union, so that pydantic reports the errors of that class alone
COMMANDS: TypeAdapter[WorkerCommand] = TypeAdapter(
    Annotated[WorkerCommand, Field(discriminator="kind")]
)
EVENTS: TypeAdapter[WorkerEvent] = TypeAdapter(Annotated[WorkerEvent, Field(discriminator="kind")])


class TrialRunner(Protocol):
    """The part of a worker that does the work: the real trainer, or the fake one of the tests."""

    @property
    def worn_out(self) -> bool:
        """True if this process has lost so much memory that another should take its place."""

    def probe(self, settings: TrialSettings, adopted: Path | None) -> ArmBaseline:
        """Return the facts shared by the trials of an arm.

        Raises:
            SweeperError: they cannot be had.
        """

    def check(self, settings: TrialSettings, expected: InputDigests | None) -> TrialSize:
        """Return the size of a trial, without loading weights.

        Raises:
            InputsChanged: the base model is not the expected one.
            SweeperError: the trial is impossible.
        """

    def run(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        provenance: dict[str, Any],
        observer: TrialObserver,
        expected: InputDigests | None,
    ) -> Outcome:
        """Train one trial, write its folder, and return its outcome.

        Raises:
            InputsChanged: data or base model are not the expected ones. The checkpoints stay.
        """

    def judge_baseline(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        provenance: dict[str, Any],
        model: Path,
        expected: InputDigests | None,
    ) -> Outcome:
        """Judge a model that another run trained and keep it as a trial of this study.

        Raises:
            InputsChanged: data or base model are not the expected ones.
        """

    def test(
        self,
        settings: TrialSettings,
        folder: TrialFolder | None,
        kinds: Sequence[HeldOutKind],
        expected: InputDigests | None,
    ) -> HeldOutLosses:
        """Return the losses of a trial's artifact (None: the untuned base) on unseen texts.

        Raises:
            InputsChanged: data or base model are not the expected ones.
        """


class Engine(Protocol):
    """Hosts workers somewhere and carries messages to and from them.

    The dispatcher calls an engine from one thread. `next_event` is the only call that waits. A worker
    takes work after it announced a slot (SlotsEvent). A dead worker is announced (LostEvent) and
    replaced.
    """

    def send(self, worker: int, work: Work) -> None:
        """Hand work to a free slot. Its answer (WorkAnswer) or LostEvent follows."""

    def stop(self, job: str, cause: StopCause) -> None:
        """Ask a running trial to end. Its EndedEvent follows. Unknown keys are ignored."""

    def proceed(self, job: str, step: int) -> None:
        """Let a watched trial continue after its evaluation at this step."""

    def kill(self, worker: int, reason: str) -> None:
        """End a worker at once, whatever it is doing. Its LostEvent follows with cause timeout.

        Events that the worker sent before come first: a job that was just answered is not lost. A slot
        among them is announced as none (free=0), because the worker takes no work any more.
        """

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        """Return the next event, or None if none came in time.

        Raises:
            WorkerError: workers die before they can do anything.
        """

    def close(self) -> None:
        """End all workers, whatever they are doing."""
