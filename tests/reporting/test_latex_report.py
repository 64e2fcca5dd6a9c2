"""The LaTeX document: it would compile, and its outcomes hold over all of its rows."""

from __future__ import annotations

import re

import pytest

from sweeper.reporting.intervals import IntervalEstimate
from sweeper.reporting.latex_report import COLUMNS, in_latex, latex_report
from sweeper.reporting.results import StudyResults
from tests.reporting.studies import two_arms
from tests.reporting.test_result_tables import CONTRAST

SPECIAL = set("&%$#_^~")
HOSTILE = r"a_b & 50 % \input{/etc/passwd} $x^2$ #1 ~ {<>} \\ × – …"


def check(text: str) -> None:
    """Read a document as LaTeX does, as far as specials, groups and environments go."""
    depth, math, environments, place = 0, False, [], 0
    while place < len(text):
        letter = text[place]
        if letter == "\\":
            command = re.match(r"\\([A-Za-z]+|.|\n)", text[place:])
            assert command is not None
            name = command[1]
            place += len(command[0])
            if name in ("begin", "end"):
                found = re.match(r"\{(\w+)\}", text[place:])
                assert found is not None
                if name == "begin":
                    environments.append(found[1])
                else:
                    assert environments.pop() == found[1]
            continue
        depth += {"{": 1, "}": -1}.get(letter, 0)
        assert depth >= 0
        if letter == "$":
            math = not math
        elif letter == "&":
            assert environments[-1:] == ["tabular"]
        else:
            assert letter not in SPECIAL or (letter in "^_" and math), text[place - 30 : place + 9]
        place += 1
    assert (depth, math, environments) == (0, False, [])


def study(name: str, p_value: float, **fields: object) -> StudyResults:
    """A study whose lead has a p value."""
    contrast = CONTRAST.model_copy(update={"p_value": p_value})
    update = {"study_name": name, "contrasts": (contrast,), "look": 1, **fields}
    return two_arms(4.05, 4.0).model_copy(update=update)


def rows(text: str) -> list[list[str]]:
    """The cells of the table's rows."""
    body = text.partition(r"\midrule")[2].partition(r"\bottomrule")[0]
    return [line.removesuffix(r" \\").split(" & ") for line in body.strip().splitlines()]


def test_a_document_compiles_whatever_names_hold() -> None:
    """Names of studies, commands and packages with every special character are printed as they are."""
    results = study(HOSTILE, 0.001, command=HOSTILE, provenance={HOSTILE: HOSTILE})
    text = latex_report([results, study("other", 0.2)])
    check(text)
    assert r"\input{/etc" not in text
    assert text.startswith(r"\documentclass{article}")
    assert all(len(row) == len(COLUMNS) for row in rows(text))


def test_the_checker_finds_what_does_not_compile() -> None:
    """An open brace, an unescaped special and a crossed environment are found."""
    for broken in ("{", "50 %", "a_b", r"\begin{table}\end{tabular}", "$x", "a & b"):
        with pytest.raises(AssertionError):
            check(broken)


def test_each_row_has_its_intervals() -> None:
    """The difference and the ratio of perplexities with their ends, and the share of a decided row."""
    (row,) = rows(latex_report([study("mine", 0.001)]))
    assert row[2:4] == ["QLoRA", "full fine-tuning"]
    assert row[7] == "$+0.0500$ [$+0.0300$, $+0.0700$]"
    assert row[8] == "$1.0513$ [$1.0305$, $1.0725$]"
    assert row[9] == "$90.0$ [$86.0$, $94.0$]"
    assert row[-1] == "full fine-tuning ahead"


def test_outcomes_hold_over_all_rows() -> None:
    """A p value of 0.03 is a lead by itself, and none beside another one that is no smaller."""
    alone = rows(latex_report([study("a", 0.03)]))
    assert alone[0][-1] == "full fine-tuning ahead"
    three = rows(latex_report([study("a", 0.03), study("b", 0.001), study("c", 0.04)]))
    assert [row[-1] for row in three] == ["undecided", "full fine-tuning ahead", "undecided"]


def test_the_appendix_states_the_protocol() -> None:
    """Data, seeds, margin, look and the way the intervals are made, for each study."""
    text = latex_report([study("mine", 0.001)])
    for words in ("3 and 2 seeds that took no part", "300 examples", "Look 1 at this test split"):
        assert words in text
    assert "Satterthwaite" in text
    assert r"\texttt{python -m sweeper +experiment=mine -m}" in text


def test_a_study_without_a_rival_has_a_protocol_only() -> None:
    """A single arm makes no row, and the document still compiles."""
    text = latex_report([two_arms(4.05, None)])
    check(text)
    assert "No study compares two arms." in text
    assert in_latex("100 %") == r"100 \%"
    assert IntervalEstimate(value=1.0).low is None
