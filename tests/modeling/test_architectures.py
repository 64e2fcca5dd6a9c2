"""The committed table of architectures is what is found today, and documents say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.architectures import configurations, examine, stored, table

ROOT = Path(__file__).resolve().parents[2]
FIGURES = stored()
RESULTS = FIGURES["results"]
EXACT = ("loads", "kernel", "reached", "equal", "without_gradient", "stops")
"""What does not depend on rounding."""


@pytest.mark.slow
def test_every_class_has_a_result() -> None:
    """Each of transformers' causal language models is in the table, and the count of loads is right."""
    assert RESULTS.keys() == configurations().keys()
    loads = sum(found["loads"] == "yes" for found in RESULTS.values())
    assert (loads, len(RESULTS)) == (FIGURES["loads"], FIGURES["classes"])


def test_documents_say_what_the_table_says() -> None:
    """docs/models.md has the rows of the committed JSON, and README has its counts."""
    page = (ROOT / "docs" / "models.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| ")][1:] == table(RESULTS)
    counts = f"{FIGURES['loads']} of the {FIGURES['classes']} classes"
    assert counts in page
    assert counts in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RESULTS)[::4])
def test_result_of_an_architecture_is_that_of_the_table(name: str) -> None:
    """A small model of the class gives the committed result again."""
    found = examine(configurations()[name])
    assert {key: found.get(key) for key in EXACT} == {key: RESULTS[name].get(key) for key in EXACT}
    assert found.get("quantized") == pytest.approx(RESULTS[name].get("quantized"), abs=0.001)
