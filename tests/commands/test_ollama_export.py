"""The Modelfile and the commands for Ollama."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeper.commands.ollama_export import export_ollama, modelfile
from sweeper.core.errors import ModelError
from sweeper.core.manifest import write_manifest
from sweeper.core.trained_form import TRAINED_FORM
from sweeper.data.ollama_template import TurnTexts
from tests.reporting.test_winner import FORM, _winner

TEXTS = TurnTexts("", ("<s>", "\n"), "<u>", "<a>", "<e>")


def test_a_modelfile_has_everything_but_an_adapter() -> None:
    """The GGUF, the template, every stop and the context; llama.cpp's adapters are another format."""
    form = FORM.model_copy(update={"end_tokens": ("<|im_end|>", 'a"b')})
    lines = modelfile("mine", form, TEXTS, 32768).splitlines()
    assert lines[0] == "FROM ./mine.Q4_K_M.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert 'PARAMETER stop "a\\"b"' in lines
    assert "PARAMETER num_ctx 8192" in lines
    assert any(line.startswith('TEMPLATE """{{ range .Messages }}') for line in lines)
    assert not any("ADAPTER" in line for line in lines)


def test_a_used_folder_and_an_old_artifact_are_refused(tmp_path: Path) -> None:
    """Nothing is overwritten, and nothing is guessed about a model without its form."""
    winner = _winner(tmp_path, "adapter=none", "quantization=none")
    with pytest.raises(ModelError, match="is in use"):
        export_ollama(winner, tmp_path)
    (winner.folder.model / TRAINED_FORM).unlink()
    write_manifest(winner.folder.model)
    with pytest.raises(ModelError, match="Train it again"):
        export_ollama(winner, tmp_path / "new")
