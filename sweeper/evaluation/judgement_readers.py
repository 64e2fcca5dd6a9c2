"""Name the reader of each judgement, because evaluating a model costs about as much as training it.

A judgement that no reader needs is not made. sweeper.training.schedule plans the looks inside a trial by
what can read them.
"""

from __future__ import annotations

from enum import StrEnum


class JudgementReader(StrEnum):
    """The part of a study that reads a judgement."""

    BASELINE = "baseline"
    """Comparison of every trial with the untuned base, measured once for each arm."""
    LOOK = "look"
    """Pruner, early stopping and the choice of the kept checkpoint, while a trial trains."""
    RESULT = "result"
    """The objective's value of a trial that ran to its own end, on the whole validation split."""
    ADOPTED = "adopted"
    """The same value of a model that another run trained."""
    MERGED = "merged"
    """Comparison of a merged model with the adapter that it was made of."""
    VERDICT = "verdict"
    """The comparison of winners on the test split."""
    FORGETTING = "forgetting"
    """The change of a winner's loss on general text."""
    CHAMPION = "champion"
    """The nightly decision between challenger and champion on the gate."""

    @property
    def subject(self) -> str:
        """Words for what is judged, as in "the untuned base"."""
        return _SUBJECTS[self]


_SUBJECTS = {
    JudgementReader.BASELINE: "the untuned base",
    JudgementReader.LOOK: "a sample of the validation split",
    JudgementReader.RESULT: "the trained model",
    JudgementReader.ADOPTED: "the adopted model",
    JudgementReader.MERGED: "the merged model",
    JudgementReader.VERDICT: "the test split",
    JudgementReader.FORGETTING: "general text",
    JudgementReader.CHAMPION: "the nightly gate",
}
