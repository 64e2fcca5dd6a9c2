"""General text: what is kept of it, cut into windows, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sweeper.builtin.docstring_pairs import docstring_pairs, first_sentence, normalised
from sweeper.builtin.embedded import BASE_DIR
from sweeper.config.settings import GeneralTextSettings, validate
from sweeper.core.errors import ConfigError, DataError
from sweeper.data.general_text import digest, embedded_documents, general_rows
from sweeper.data.sources import path_problems
from sweeper.data.tokens import IGNORED
from tests.conftest import make_settings
from tests.data.samples import example, make_data


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded base's; it puts nothing before a text."""
    return AutoTokenizer.from_pretrained(BASE_DIR)


def _settings(source: object, tokens: int = 64, window: int = 8) -> GeneralTextSettings:
    return validate(GeneralTextSettings, {"source": source, "tokens": tokens, "window": window})


def _write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_windows_are_the_first_whole_ones(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Texts joined by the end-of-text token, cut every 8 tokens, 8 windows; loss on 7 of each."""
    texts = [f"Stars are far away, and number {n} is no nearer." for n in range(20)]
    source = _write(tmp_path / "general.jsonl", texts)
    rows = general_rows(_settings(source), [], tokenizer, None)
    end = tokenizer.eos_token
    whole = tokenizer(end.join(texts), add_special_tokens=False)["input_ids"]
    assert [row["input_ids"] for row in rows] == [whole[at : at + 8] for at in range(0, 64, 8)]
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in rows)


def test_what_the_task_answers_is_no_general_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A document that is an example's answer, or begins with it, is left out; case does not count."""
    kept = [f"Stars are far away, and number {n} is no nearer." for n in range(20)]
    repeats = ["return the SUM.", "Return the sum. And more."]
    task = [example("def add(a, b)", "Return the sum.")]
    with_repeats = _write(tmp_path / "a.jsonl", [*repeats, *kept])
    without = _write(tmp_path / "b.jsonl", kept)
    found = general_rows(_settings(with_repeats), task, tokenizer, None)
    assert found == general_rows(_settings(without), [], tokenizer, None)
    assert digest(found) != digest(general_rows(_settings(with_repeats), [], tokenizer, None))


@pytest.mark.parametrize(
    ("tokens", "window", "limit", "words"),
    [
        (64, 512, 256, r"evaluation\.general_text\.window=512: the model has only 256 positions"),
        (32, 8, None, r"4 windows of 8 tokens, and at least 8 are needed"),
    ],
)
def test_a_window_must_fit_and_there_must_be_enough(
    tokenizer: PreTrainedTokenizerBase, tokens: int, window: int, limit: int | None, words: str
) -> None:
    """Both name the key and what to do."""
    with pytest.raises(DataError, match=words):
        general_rows(_settings("embedded", tokens, window), [], tokenizer, limit)


def test_rows_of_another_kind_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Instruction rows have no column `text`; `columns` names another one."""
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"body": "Stars are far away, and they are many. " * 30}) + "\n"
    path.write_text(row)
    with pytest.raises(DataError, match=r"holds no text .* column `text`"):
        general_rows(_settings(str(path)), [], tokenizer, None)
    renamed = {"path": str(path), "columns": {"text": "body"}}
    assert len(general_rows(_settings(renamed), [], tokenizer, None)) == 8


def test_a_missing_file_is_found_before_anything_runs(tmp_path: Path) -> None:
    """The path is checked with those of data.*; weights and formats are none of general text."""
    missing = _settings(str(tmp_path / "gone.txt"))
    (problem,) = path_problems(make_data(), missing, {})
    assert problem.startswith("evaluation.general_text.source=")
    assert "gone.txt: no such file or folder" in problem
    with pytest.raises(ConfigError, match="Leave its weight and format out"):
        _settings({"path": "a.txt", "weight": 2})


def test_the_embedded_text_is_in_no_split() -> None:
    """223 docstrings and more of six modules, of which no task row's output begins one that is kept."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    documents = embedded_documents()
    assert len(documents) > 150
    outputs = [row["output"] for rows in docstring_pairs().rows.values() for row in rows]
    task = [example("", output) for output in outputs]
    general = make_settings().evaluation.general_text
    rows = general_rows(general, task, tokenizer, 512)
    assert len(rows) * general.window == general.tokens
    text = "".join(tokenizer.decode(row["input_ids"]) for row in rows)
    began = {normalised(output) for output in outputs}
    assert not began & {normalised(first_sentence(each)) for each in text.split("<|endoftext|>")}
