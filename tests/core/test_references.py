"""What came from the environment is written as its reference, and read again as its value."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeper.config.compose import read_yaml, to_yaml
from sweeper.core import references
from sweeper.core.paths import write_atomic
from sweeper.core.redaction import redact

VALUES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=8, max_size=40)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Leave no value behind for other tests."""
    yield
    references._VALUES.clear()
    references._spell()


@given(VALUES)
def test_a_value_is_found_in_every_spelling(value: str) -> None:
    """JSON, YAML, Python, HTML, and one inside the other."""
    references._VALUES.clear()
    references.remember({"SOME_NAME": value})
    spelled = [json.dumps([value]), repr([value]), html.escape(repr([value])), f"a{value}b"]
    for text in (*spelled, json.dumps({"text": repr([value])})):
        assert "${oc.env:SOME_NAME}" in references.referenced(text)


def test_a_stored_configuration_is_read_again_with_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long value would be folded by YAML; its reference is not, and resolves."""
    value = "a secret " * 30 + "with 'quotes' and \"more\""
    monkeypatch.setenv("SOME_NAME", value)
    references.remember({"SOME_NAME": value})
    write_atomic(tmp_path / "config.yaml", to_yaml({"prompt": f"Say {value}!"}))
    assert (tmp_path / "config.yaml").read_text() == "prompt: Say ${oc.env:SOME_NAME}!\n"
    assert read_yaml(tmp_path / "config.yaml") == {"prompt": f"Say {value}!"}


def test_short_values_and_public_variables_are_written_out() -> None:
    """A word of five letters stands in any text, and paths below HOME are for people."""
    references.remember({"SHORT": "train", "HOME": "/home/somebody"})
    assert redact("train /home/somebody/x") == "train /home/somebody/x"


def test_the_folder_of_all_output_is_written_out() -> None:
    """Its path is needed as it is, and only while it is the folder."""
    references.remember({"OUT_DIR": "/scratch/somebody"})
    references.leave_out({"OUT_DIR"})
    assert references.referenced("/scratch/somebody/x") == "/scratch/somebody/x"
    references.leave_out(())
    assert references.referenced("/scratch/somebody/x") == "${oc.env:OUT_DIR}/x"
