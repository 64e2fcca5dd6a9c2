"""The winner's loss as it is served, on the unquantized base and merged, against its trained form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sweeper.core.outcome import ExampleLosses, HeldOutLosses, ServeForm
from sweeper.core.value import FrozenValue
from sweeper.reporting.intervals import IntervalEstimate, contrast, example_rows
from sweeper.reporting.text_table import perplexity_factor

FORM_WORDS: Mapping[str, str] = {
    "trained": "as it was trained",
    "unquantized": "on the unquantized base",
    "merged": "merged into the unquantized base",
}


class ServedContrast(FrozenValue):
    """The winner of an arm on the test split in one form, and the difference to the trained form."""

    arm: str
    form: ServeForm
    loss: float
    """Loss in this form, in nats per target token."""
    difference: IntervalEstimate
    """Loss in this form minus loss in the trained form, with the interval of paired rows."""
    examples: int

    @property
    def is_worse(self) -> bool:
        """True if the whole interval lies above zero."""
        return self.difference.low is not None and self.difference.low > 0

    @property
    def differs(self) -> bool:
        """True if the interval does not contain zero."""
        return self.difference.low is not None and not self.difference.has(0)

    @property
    def words(self) -> str:
        """The loss and its difference in words."""
        change = self.difference
        interval = "" if change.low is None else f" [{change.low:+.4f}, {change.high:+.4f}]"
        factor = perplexity_factor(change.value)
        return f"{self.loss:.4f} {FORM_WORDS[self.form]} ({change.value:+.4f}{interval}, {factor})"


def served_contrasts(arm: str, served: Mapping[ServeForm, HeldOutLosses]) -> list[ServedContrast]:
    """Return the contrast of each form with the trained form, on the same rows of the test split."""
    trained = served.get("trained")
    if trained is None or trained.test is None:
        return []
    return [
        _contrast(arm, form, found.test, trained.test)
        for form, found in served.items()
        if form != "trained" and found.test is not None
    ]


def _contrast(
    arm: str, form: ServeForm, served: ExampleLosses, trained: ExampleLosses
) -> ServedContrast:
    own, reference = example_rows([served]), example_rows([trained])
    # The trained form is both the reference and the zero line.
    found = contrast((form, "trained"), own, reference, reference)
    return ServedContrast(
        arm=arm,
        form=form,
        loss=served.loss,
        difference=found.difference,
        examples=found.examples,
    )


def served_sentences(
    found: Sequence[ServedContrast],
    names: Mapping[str, str],
    served_as: Sequence[tuple[str, ServeForm]] = (),
) -> Iterator[str]:
    """Yield the form that the verdict is about, and for each arm its winner's losses as it is served.

    Args:
        found: contrasts of all arms.
        names: label of each arm.
        served_as: arms that were compared in another form than the trained one, and that form.
    """
    for arm, form in served_as:
        yield (
            f"The test losses of {names.get(arm, arm)} are those of the model {FORM_WORDS[form]} "
            f"(evaluation.serve_as={form})."
        )
    for arm in dict.fromkeys(each.arm for each in found):
        parts = ", ".join(each.words for each in found if each.arm == arm)
        yield f"Test loss of {names.get(arm, arm)} as it is served: {parts}."


def served_warning(found: Sequence[ServedContrast], names: Mapping[str, str]) -> str:
    """Return a warning for each winner that differs from the judged model as it is served, or ''.

    The intervals stand in `served_sentences`.
    """
    by_side: dict[tuple[str, bool], dict[str, list[ServeForm]]] = {}
    for each in found:
        if each.differs:
            change = each.difference.value
            words = f"{change:+.4f} nats, {perplexity_factor(change)}"
            by_side.setdefault((each.arm, each.is_worse), {}).setdefault(words, []).append(
                each.form
            )
    return " ".join(
        f"WARNING: {names.get(arm, arm)} is {'worse' if worse else 'better'} as it is served than as "
        f"it was trained: {_listed(changes)}."
        for (arm, worse), changes in by_side.items()
    )


def _listed(changes: Mapping[str, Sequence[ServeForm]]) -> str:
    """Name the forms of each change, because both forms of a small adapter often change alike."""
    return "; ".join(f"{words} ({', '.join(forms)})" for words, forms in changes.items())
