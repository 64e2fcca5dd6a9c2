"""Files as new users have them are used, named as unread, or refused with what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from sweeper.core.errors import DataError
from sweeper.data.splits import DataSplits, load_splits
from sweeper.reporting.results import load_results
from tests.conftest import Program
from tests.data.chat import byte_level
from tests.data.own_files import OWN_FILES, TOLD
from tests.data.samples import make_data
from tests.data.test_your_data import AS_OBJECT


def _load(name: str, folder: Path) -> DataSplits:
    case = OWN_FILES[name]
    given = (each.removeprefix("data.").split("=", 1) for each in case.overrides)
    values = {key: yaml.safe_load(value) for key, value in given}
    return load_splits(make_data(train=str(case.write(folder)), **values))


def _missing(parts: Sequence[str], text: str) -> list[str]:
    """Return the parts that a text lacks. {told} stands for any of the answers."""
    return [
        part
        for part in parts
        if not any(
            part.replace("{told}", told) in text for told in (TOLD if "{told}" in part else ("",))
        )
    ]


@pytest.mark.parametrize("name", [name for name, case in OWN_FILES.items() if case.format])
def test_a_file_that_can_be_used_is_used_whole(name: str, tmp_path: Path) -> None:
    """Its format is recognised, and all that is not used of it is named."""
    case, splits = OWN_FILES[name], _load(name, tmp_path)
    assert splits.format == case.format
    assert sum(splits.counts.values()) == case.rows
    assert {each or "''" for each in splits.unread} == set(case.unread)
    assert not _missing(case.told, str([splits.dropped, splits.changed]))


@pytest.mark.parametrize("name", [name for name, case in OWN_FILES.items() if case.refused])
def test_a_file_that_cannot_be_used_is_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    """The message names what is wrong and what to do."""
    with pytest.raises(DataError) as caught:
        _load(name, tmp_path)
    assert not _missing(OWN_FILES[name].refused, str(caught.value))


@pytest.fixture(scope="module")
def tool_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer, whose chat template knows tools and reasoning."""
    folder = tmp_path_factory.mktemp("tool_base")
    tokenizer = byte_level(chat_template=AS_OBJECT)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(
        **shape, num_attention_heads=2, max_position_embeddings=512, vocab_size=len(tokenizer)
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN_FILES)
def test_the_command_line_says_what_becomes_of_a_file(
    name: str, tool_base: Path, tmp_path: Path, in_process: Program
) -> None:
    """`sweeper data` shows the format, what is unread or dropped, and the rows with their mask."""
    case = OWN_FILES[name]
    path = case.write(tmp_path)
    shown = in_process(
        *("data", f"data.train={path}", f"model.base_model={tool_base}", "--rows=20"),
        *("evaluation.over_length=drop", *case.overrides),
    )
    text = " ".join((shown.stdout + shown.stderr).split())
    if case.refused:
        assert shown.returncode != 0
        assert not _missing(case.refused, text)
        assert "Traceback" not in text
        return
    assert shown.returncode == 0, text
    assert f"format: {case.format} " in text
    assert not _missing((*case.unread, *case.told, *case.encoded), text)
    assert "WRONG<|im_end|>»" not in text


TRAINED = (
    *("axolotl_training_flags", "boolq_as_the_hint_says", "dolly", "excel_separator_line"),
    *("folder_with_splits", "llama_factory_tools_as_text", "many_scripts", "tools_of_parquet"),
    *("openai_preferences_as_the_hint_says", "reasoning", "turns_in_a_table", "web_texts"),
)
"""Files that a study is really run on, of each kind of format, container and text."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_study_runs_on_the_file(
    name: str, tool_base: Path, tmp_path: Path, program: Program
) -> None:
    """Two trials are trained on all its rows, through the command line of a new user."""
    case = OWN_FILES[name]
    overrides = (
        *("+experiment=lr_rank_sweep", f"model.base_model={tool_base}", "quantization=none"),
        *(f"data.train={case.write(tmp_path)}", *case.overrides, "study_name=mine", "n_trials=2"),
        *("~hydra.sweeper.arms.full", "finalists=none", "tracking=none", "training.max_steps=2"),
    )
    done = program(*overrides, "-m", timeout_s=600)
    assert done.returncode == 0, done.stdout + done.stderr
    results = load_results("mine", tmp_path / "outputs")
    (arm,) = results.arms
    assert [trial.outcome.cause for trial in arm.trials] == ["finished", "finished"]
    text = " ".join(done.stdout.split())
    assert not _missing((f"({case.format}): ", *case.unread), text)
