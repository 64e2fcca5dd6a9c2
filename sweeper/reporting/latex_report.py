"""Studies as a LaTeX document: one table over models and data sets, and the protocol of each study.

A row is one comparison of one study. Every row is one more chance of a false lead, so the outcome of a
row must survive Holm's procedure over all rows of the table. The document needs booktabs, geometry and
textcomp, and compiles with any engine. Letters beyond Latin ones need LuaLaTeX or XeLaTeX.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from sweeper.core.redaction import redact
from sweeper.reporting.arm_comparison import ArmComparison
from sweeper.reporting.intervals import IntervalEstimate
from sweeper.reporting.result_tables import describe_data
from sweeper.reporting.results import ArmResult, StudyResults
from sweeper.reporting.search_protocol import outlook_sentences, protocol_sentences
from sweeper.reporting.split_looks import holm, look_alpha
from sweeper.reporting.text_table import capital
from sweeper.reporting.verdict import Verdict, judge
from sweeper.reporting.verdict_doubts import label

SPECIAL = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    # A row's first bracket would be read as the space after the row before.
    "[": "{[}",
    "]": "{]}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': r"\textquotedbl{}",
    "×": r"$\times$",
    "–": "--",
    "−": "$-$",
    "…": r"\ldots{}",
    "≥": r"$\ge$",
    "≤": r"$\le$",
    "→": r"$\to$",
    "·": r"$\cdot$",
}
"""Characters that LaTeX does not print as they are."""
PREAMBLE = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[a4paper,landscape]{geometry}
\usepackage{booktabs}
\usepackage{textcomp}
\setlength{\tabcolsep}{4pt}
\begin{document}"""
COLUMNS = (
    *("model", "data", "arm", "reference", "base", "arm's value", "reference's value"),
    *("difference [95\\,\\%]", "perplexity ratio [95\\,\\%]", "retained, \\% [95\\,\\%]"),
    *("$p$", "outcome"),
)
OPEN = ("undecided", "provisional")
"""Outcomes of a row that decide nothing."""
LEFT = 4
"""Number of columns of words, which stand first."""


@dataclass(frozen=True)
class LatexRow:
    """One comparison of one study."""

    results: StudyResults
    verdict: Verdict
    duel: ArmComparison
    p_value: float | None
    equivalence_p: float | None


def latex_report(studies: Sequence[StudyResults]) -> str:
    """Return a whole LaTeX document on the studies."""
    verdicts = [judge(results) for results in studies]
    rows = [
        _row(results, verdict, duel)
        for results, verdict in zip(studies, verdicts, strict=True)
        for duel in verdict.duels
    ]
    parts = [PREAMBLE, _table(rows) if rows else "No study compares two arms.", r"\appendix"]
    parts.append(r"\section{Protocol}")
    for results, verdict in zip(studies, verdicts, strict=True):
        parts += _protocol(results, verdict)
    return "\n".join([*parts, r"\end{document}", ""])


def in_latex(text: str) -> str:
    """Return a text with every character that means something to LaTeX as LaTeX prints it."""
    # A control character of a name is no character of a document.
    return "".join(SPECIAL.get(letter, letter) for letter in redact(text) if letter.isprintable())


def _row(results: StudyResults, verdict: Verdict, duel: ArmComparison) -> LatexRow:
    found = results.contrast(duel.side.arm)
    p_values = (None, None) if found is None else (found.p_value, found.equivalence_p)
    return LatexRow(results, verdict, duel, *p_values)


def _table(rows: Sequence[LatexRow]) -> str:
    outcomes = _outcomes(rows)
    head = " & ".join(COLUMNS)
    shape = "l" * LEFT + "r" * (len(COLUMNS) - LEFT - 1) + "l"
    body = [
        " & ".join((*_cells(row, outcome in OPEN), outcome)) + r" \\"
        for row, outcome in zip(rows, outcomes, strict=True)
    ]
    count = len(rows)
    caption = (
        f"Arms on the test split. Difference is the arm's value minus the reference's. Outcomes hold "
        f"over all {count} rows together (Holm). Values of undecided rows show no lead and no tie."
    )
    return "\n".join(
        [
            r"\begin{table}",
            r"\scriptsize",
            r"\centering",
            rf"\caption{{{in_latex(caption)}}}",
            rf"\begin{{tabular}}{{{shape}}}",
            r"\toprule",
            head + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _outcomes(rows: Sequence[LatexRow]) -> list[str]:
    """Return each row's outcome at the strictest level of the rows' looks, after Holm's procedure."""
    alpha = min(look_alpha(row.results.look or 1) for row in rows)
    leads = holm([1.0 if row.p_value is None else row.p_value for row in rows], alpha)
    same = holm([1.0 if row.equivalence_p is None else row.equivalence_p for row in rows], alpha)
    found = []
    for row, lead, equal in zip(rows, leads, same, strict=True):
        outcome = row.duel.outcome
        if outcome == "equivalent" and equal:
            found.append("equivalent")
        elif outcome == "ahead" and lead:
            found.append(f"{in_latex(row.duel.better.label)} ahead")
        else:
            found.append(OPEN[row.verdict.provisional])
    return found


def _cells(row: LatexRow, undecided: bool) -> Iterator[str]:
    """Yield the cells of a row but its outcome."""
    duel, arm = row.duel, row.results.arms[0]
    yield in_latex(_last_part(str(arm.settings.get("model.base_model", "?"))))
    yield in_latex(_data_name(arm))
    yield in_latex(duel.side.label)
    yield in_latex(duel.reference.label)
    yield "--" if duel.base is None else f"{duel.base:.4f}"
    yield from (f"{value:.4f}" for value in duel.values)
    yield _interval(duel.difference, "{:+.4f}")
    yield _interval(_ratio(duel.difference), "{:.4f}") if duel.objective.unit == "nats" else "--"
    # A share of what is undecided would be read as an answer.
    retained = None if undecided else duel.retained
    yield "--" if retained is None else _interval(retained, "{:.1f}")
    yield "--" if row.p_value is None else f"{row.p_value:.2g}"


def _ratio(found: IntervalEstimate) -> IntervalEstimate:
    """Return a difference of losses as a ratio of perplexities."""
    low = None if found.low is None else math.exp(found.low)
    high = None if found.high is None else math.exp(found.high)
    return IntervalEstimate(value=math.exp(found.value), low=low, high=high)


def _interval(found: IntervalEstimate, form: str) -> str:
    value = form.format(found.value)
    if found.low is None or found.high is None:
        return f"${value}$"
    # In text mode a minus would be a hyphen. A bracket after \\ would be its argument, so none leads.
    return f"${value}$ [${form.format(found.low)}$, ${form.format(found.high)}$]"


def _data_name(arm: ArmResult) -> str:
    train = arm.settings.get("data.train")
    return (
        _last_part(train)
        if isinstance(train, str) and train != "embedded"
        else arm.facts.data_source
    )


def _last_part(path: str) -> str:
    return PurePath(path).name or path


def _protocol(results: StudyResults, verdict: Verdict) -> Iterator[str]:
    """Yield the protocol of a study as a subsection."""
    yield rf"\subsection{{{in_latex(results.study_name)}}}"
    yield in_latex(" ".join(_sentences(results, verdict)))
    yield r"\begin{itemize}"
    for arm in results.arms:
        yield rf"\item {in_latex(_arm(arm))}"
    yield r"\end{itemize}"
    # A shell's quote must stay one when it is copied.
    command = in_latex(f"python -m sweeper {results.command}").replace("'", r"\textquotesingle{}")
    yield rf"Command: \texttt{{{command}}}"
    provenance = ", ".join(
        f"{name} {value}"
        for name, value in results.provenance.items()
        if not re.match(r"command|executable", name)
    )
    yield ""
    yield in_latex(f"Made with: {provenance}.")


def _sentences(results: StudyResults, verdict: Verdict) -> Iterator[str]:
    arm = results.arms[0]
    yield f"Data: {describe_data(arm.facts)}."
    yield from protocol_sentences(results)
    yield from outlook_sentences(results)
    margin = results.equivalence_margin
    if margin is not None:
        yield f"Margin of equivalence, fixed before the first trial: {margin}."
    for found in results.decisive:
        groups = "" if found.groups is None else f" in {found.groups} groups"
        yield (
            f"{capital(found.arm)} against {found.reference}: {found.seeds[0]} and {found.seeds[1]} "
            f"seeds{' that took no part in the choice' if found.fresh else ''}, {found.examples} "
            f"examples of the {found.split} split{groups}."
        )
    if results.contrasts:
        yield (
            "Intervals cover paired examples and seeds (Student's t at Satterthwaite's degrees of "
            "freedom), equivalence is tested by two one-sided tests, shares have Fieller's intervals."
        )
    if verdict.look is not None:
        level = look_alpha(verdict.look)
        yield f"Look {verdict.look} at this test split, at a level of {level:.2g}."
    if verdict.untested is not None:
        yield f"Not evaluated on the test split: {verdict.untested}."
    yield from (f"Provisional: {doubt.reason}." for doubt in verdict.doubts)


def _arm(arm: ArmResult) -> str:
    searched = "; ".join(
        f"{key} {'from' if found.continuous else 'among'} "
        + (
            f"{found.values[0]:g} to {found.values[-1]:g}"
            if found.continuous
            else ", ".join(f"{value:g}" for value in found.values)
        )
        for key, found in arm.ranges.items()
    )
    best = arm.best
    point = "none" if best is None else ", ".join(f"{key}={v}" for key, v in best.params.items())
    return f"{label(arm)}: searched {searched or 'nothing'}. Best: {point}."
