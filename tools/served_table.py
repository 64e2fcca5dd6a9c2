"""The table of a winner's forms: loss, ROUGE-L and answers of each, beside those of the trained form.

Knows judgements of the same rows and prompts. Does not know models, files or llama.cpp. The intervals
are sweeper's own, of paired examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sweeper.core.outcome import ExampleLosses, ExampleScores
from sweeper.reporting.intervals import IntervalEstimate, SeedLosses, contrast, example_rows
from sweeper.reporting.text_table import DASH, TextTable

ROUGE = "eval/rougeL"
FORM_WORDS = {
    "trained": "as trained",
    "unquantized": "unquantized base + adapter",
    "merged": "merged",
    "F16": "GGUF float16",
    "Q8_0": "GGUF Q8_0",
    "Q4_K_M": "GGUF Q4_K_M",
}


@dataclass(frozen=True)
class FormJudgement:
    """One form of a model on the held-out rows and prompts.

    Attributes:
        form: Key of FORM_WORDS.
        losses: Loss of each row.
        answers: Greedy answer to each prompt.
        ended: True for each answer that the model ended itself.
        rouge: ROUGE-L of each answer.
        seconds: Seconds of wall time for losses and answers.
        mib: Size of the file that is served, or None for a form in several folders.
    """

    form: str
    losses: ExampleLosses
    answers: tuple[str, ...]
    ended: tuple[bool, ...]
    rouge: ExampleScores
    seconds: float
    mib: float | None = None


@dataclass(frozen=True)
class FormRow:
    """One row of the table.

    Attributes:
        form: Key of FORM_WORDS.
        loss: Nats per target token.
        loss_change: Loss minus that of the first form, or None for the first form.
        rouge: Mean ROUGE-L of the answers.
        rouge_change: ROUGE-L minus that of the first form, or None for the first form.
        ended_share: Share of answers that the model ended itself.
        same_answers: Number of answers that equal those of the first form.
        answers: Number of answers.
        rows: Number of rows of the loss.
        mib: Size of the file that is served.
        seconds: Seconds of wall time.
    """

    form: str
    loss: float
    loss_change: IntervalEstimate | None
    rouge: float
    rouge_change: IntervalEstimate | None
    ended_share: float
    same_answers: int
    answers: int
    rows: int
    mib: float | None
    seconds: float

    @property
    def figures(self) -> dict[str, Any]:
        """The row as JSON holds it."""
        changes = {"loss_change": self.loss_change, "rouge_change": self.rouge_change}
        return {
            **vars(self),
            **{name: None if each is None else each.model_dump() for name, each in changes.items()},
        }


def form_rows(judged: Sequence[FormJudgement]) -> list[FormRow]:
    """Return a row for each form, with differences to the first one.

    Raises:
        ValueError: The forms were judged on different rows.
    """
    first = judged[0]
    return [
        FormRow(
            form=each.form,
            loss=each.losses.loss,
            loss_change=None if each is first else _change(each, first, "eval/loss"),
            rouge=each.rouge.value,
            rouge_change=None if each is first else _change(each, first, ROUGE),
            ended_share=fmean(each.ended),
            same_answers=sum(map(str.__eq__, each.answers, first.answers)),
            answers=len(each.answers),
            rows=len(each.losses.nll),
            mib=each.mib,
            seconds=each.seconds,
        )
        for each in judged
    ]


def as_markdown(rows: Sequence[FormRow]) -> str:
    """Return the table in Markdown."""
    columns = ("form", "MiB", "loss", "change", "ROUGE-L", "change of it", "ended", "same answer")
    return TextTable(
        "",
        columns,
        tuple(
            (
                FORM_WORDS[row.form],
                DASH if row.mib is None else f"{row.mib:,.0f}",
                f"{row.loss:.4f}",
                _interval(row.loss_change),
                f"{row.rouge:.4f}",
                _interval(row.rouge_change),
                f"{row.ended_share:.0%}",
                f"{row.same_answers} of {row.answers}",
            )
            for row in rows
        ),
        left=frozenset({"form"}),
    ).markdown()


def _change(judged: FormJudgement, first: FormJudgement, metric: str) -> IntervalEstimate:
    """Return the difference of two forms with the interval of paired examples."""
    own, reference = (_scored(each, metric) for each in (judged, first))
    # The first form is both the reference and the zero line.
    names = (judged.form, first.form)
    return contrast(names, own, reference, reference, metric=metric).difference


def _scored(judged: FormJudgement, metric: str) -> SeedLosses:
    losses = judged.losses.model_copy(update={"scores": judged.rouge})
    return example_rows([losses], metric)


def _interval(change: IntervalEstimate | None) -> str:
    if change is None:
        return DASH
    if change.low is None:
        return f"{change.value:+.4f}"
    return f"{change.value:+.4f} ({change.low:+.4f} to {change.high:+.4f})"
