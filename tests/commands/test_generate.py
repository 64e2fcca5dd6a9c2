"""A base and two adapters asked the same prompts on one loaded base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sweeper.builtin.embedded import BASE_DIR
from sweeper.commands import generate
from sweeper.commands.generate import UNTUNED, StoredAdapter, side_by_side
from sweeper.config.compose import to_yaml
from sweeper.core.errors import ModelError
from sweeper.core.manifest import write_manifest
from sweeper.core.paths import TrialFolder, write_atomic
from sweeper.core.trained_form import TRAINED_FORM
from sweeper.data.encode import encode_prompts
from sweeper.data.examples import ChatMessage, Example, RawRow
from tests.conftest import make_settings
from tests.data.chat import CHATML, byte_level
from tests.reporting.test_winner import FORM

PROMPTS = ["def add(a, b)", "def load(path)"]


def store(path: Path, seed: int, *overrides: str) -> TrialFolder:
    """A trial's folder with an adapter of the embedded base that changes what it writes."""
    folder = TrialFolder(path)
    settings = make_settings("quantization=none", *overrides).trial
    write_atomic(folder.config, to_yaml(settings.model_dump(mode="json")))
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE_DIR), config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.mul_(8)
    model.save_pretrained(folder.adapter)
    write_manifest(folder.adapter)
    return folder


def test_answers_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One base is loaded; each adapter answers as it does alone, the base as without any."""
    loads = []
    real = generate.load_base
    monkeypatch.setattr(generate, "load_base", lambda *a, **k: loads.append(a) or real(*a, **k))
    first, second = store(tmp_path / "a", 1), store(tmp_path / "b", 2)
    asked = side_by_side([first.path, second.adapter], PROMPTS, max_new_tokens=8)
    assert len(loads) == 1
    assert [one.prompt for one in asked] == PROMPTS
    names = [UNTUNED, first.path.as_posix(), second.adapter.as_posix()]
    assert all(list(one.answers) == names for one in asked)
    assert len({tuple(one.answers[name] for one in asked) for name in names}) == 3
    alone = side_by_side([second.adapter], PROMPTS, max_new_tokens=8)
    for together, single in zip(asked, alone, strict=True):
        for name in (UNTUNED, second.adapter.as_posix()):
            assert together.answers[name] == single.answers[name]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("instruction", "### Instruction:\nHi\n\n### Response:\n"),
        ("chat", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("plain", "Hi"),
        (None, "Hi"),
    ],
)
def test_prompts_are_asked_in_the_template_of_the_training(
    template: str | None, expected: str, tmp_path: Path
) -> None:
    """The form that is stored with the adapter decides, not the chat template of its base."""
    (tmp_path / TRAINED_FORM).write_text(
        FORM.model_copy(update={"template": template}).model_dump_json()
    )
    adapter = StoredAdapter("mine", tmp_path, make_settings().trial)
    asked = Example(
        (ChatMessage("user", "Hi"), ChatMessage("assistant", "")), RawRow({}, "x"), adapter.asked_as
    )
    tokenizer = byte_level(chat_template=CHATML)
    (prompt,) = encode_prompts([asked], tokenizer, adapter.settings.data)
    assert prompt.text == expected


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    """A folder without one, one without its settings, and two bases: each said in words."""
    first = store(tmp_path / "a", 1)
    (tmp_path / "full" / "model").mkdir(parents=True)
    with pytest.raises(ModelError, match="a full fine-tune has none"):
        side_by_side([tmp_path / "full"], PROMPTS, 4)
    other = tmp_path / "other"
    shutil.copytree(first.path, other)
    other_base = make_settings("quantization=none", f"model.base_model={BASE_DIR}").trial
    write_atomic(other / "config.yaml", to_yaml(other_base.model_dump(mode="json")))
    with pytest.raises(ModelError, match="different bases"):
        side_by_side([first.path, other], PROMPTS, 4)
    (other / "config.yaml").unlink()
    with pytest.raises(ModelError, match=r"config\.yaml: no such file"):
        side_by_side([other], PROMPTS, 4)
