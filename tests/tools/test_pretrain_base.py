"""The recipe of the embedded base: its text, a build from end to end, what it may overwrite."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sweeper.builtin.docstring_pairs import docstring_pairs, first_sentence, normalised
from tools.guarded_build import OccupiedFolder
from tools.pretrain_base import (
    UnfitWidth,
    build_base,
    new_model,
    pretraining_text,
    train_tokenizer,
)


@pytest.mark.slow
def test_pretraining_text_holds_no_task_row() -> None:
    """No pre-training docstring begins with a sentence of the data set."""
    rows = docstring_pairs().rows
    outputs = {normalised(row["output"]) for split in rows.values() for row in split}
    text = pretraining_text()
    assert not any(normalised(first_sentence(doc)) in outputs for doc in text.held_out)
    assert not outputs & {normalised(first_sentence(doc)) for doc in text.train}
    assert not set(text.train) & set(text.held_out)
    assert text.task_repeats > 0


@pytest.mark.slow
def test_build_base_end_to_end(tmp_path: Path) -> None:
    """A tiny build learns a little, loads again, and leaves torch and the folder as they were."""
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    out = tmp_path / "nested" / "base"
    report = build_base(out, tokens=20_000, seed=1, threads=1)
    assert report.held_out_loss < math.log(2048) - 0.5
    assert (report.steps, report.trained_tokens, report.threads) == (19, 19 * 1024, 1)
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == report.parameters
    assert f"{report.held_out_loss:.3f} nats/token" in (out / "README.md").read_text("utf-8")
    assert [path.name for path in out.parent.iterdir()] == ["base"]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_build_base_replaces_an_earlier_base_only(tmp_path: Path) -> None:
    """A folder with anything else in it is refused before any work, and stays as it is."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OccupiedFolder, match="holds something else"):
        build_base(tmp_path, tokens=20_000)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_wider_base_has_at_most_four_times_the_parameters() -> None:
    """The base of held-out benchmarks is larger, but trains within minutes too."""
    tokenizer = train_tokenizer(["Return the sum of two numbers."] * 3)
    shipped, wider = (new_model(tokenizer, hidden).num_parameters() for hidden in (128, 256))
    assert shipped == 1_115_264
    assert 2 * shipped < wider <= 4 * shipped


def test_a_width_that_4_bit_kernels_do_not_take_is_refused(tmp_path: Path) -> None:
    """The width is refused before anything is trained or written."""
    with pytest.raises(UnfitWidth, match="multiple of 32"):
        build_base(tmp_path / "base", tokens=20_000, hidden=200)
    assert not (tmp_path / "base").exists()
