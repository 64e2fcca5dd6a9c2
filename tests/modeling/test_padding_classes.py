"""The committed table of classes that train without padding is what the proof finds today."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.padding_free_classes import EXACT, result
from sweeper.evaluation.chunked_head import FINISHES

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "benchmarks" / "padding_free_classes.json").read_text())["figures"]
RESULTS: dict[str, str] = TABLE["results"]
PADDED = sorted(name for name, found in RESULTS.items() if found != EXACT)
SAMPLE = [*PADDED, *(name for name in RESULTS if name not in PADDED)][::4]
"""Every fourth class: some of those with padding and some without."""


def test_table_has_every_class_with_a_known_head() -> None:
    """Each class has a result, and at least thirty train without padding."""
    assert RESULTS.keys() == FINISHES.keys()
    assert len(RESULTS) - len(PADDED) == TABLE["exact"] >= 30


def test_docs_name_every_class_with_padding_and_its_reason() -> None:
    """The table of docs/trial.md has the classes and reasons of the committed JSON, and the counts."""
    page = (ROOT / "docs" / "trial.md").read_text()
    assert f"{TABLE['exact']} of the {TABLE['classes']} classes" in page
    rows = re.findall(r"^\| ([A-Z]\w+(?:, \w+)*) \| (.+) \|$", page, re.MULTILINE)
    shown = {f"{name}ForCausalLM": why for names, why in rows for name in names.split(", ")}
    assert shown == {name: RESULTS[name].partition(": ")[2] for name in PADDED}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_result_of_a_class_is_that_of_the_table(name: str) -> None:
    """The proof gives the committed result again."""
    assert result(name) == RESULTS[name]
