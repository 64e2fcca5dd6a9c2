"""The lines of Python by which plain transformers and PEFT load a stored model and prompt it.

The same lines stand in the artifact's card and in `sweeper best`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BaseLines:
    """The lines of Python that load the base of an adapter.

    Attributes:
        name: Hub id or folder.
        revision: Commit or revision on the hub, or None.
        dtype: Dtype of its weights, or None for the one that its files have.
        quantization: Arguments of BitsAndBytesConfig, empty for an unquantized base.
    """

    name: str
    revision: str | None = None
    dtype: str | None = None
    quantization: Mapping[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """The call that loads the base."""
        arguments = [repr(self.name)]
        if self.revision is not None:
            arguments.append(f"revision={self.revision!r}")
        if self.dtype is not None:
            arguments.append(f"dtype={self.dtype!r}")
        if self.quantization:
            options = ", ".join(f"{name}={value!r}" for name, value in self.quantization.items())
            arguments.append(f"quantization_config=BitsAndBytesConfig({options})")
        return f"AutoModelForCausalLM.from_pretrained({', '.join(arguments)})"


def loading_code(path: str, base: BaseLines | None, *, stored_ends: bool) -> str:
    """Return the lines that define `model` and `tokenizer`.

    Args:
        path: Folder of the adapter or of the whole model.
        base: Base of an adapter, or None for a whole model.
        stored_ends: True if generation_config.json with the end tokens lies with the adapter.
    """
    if base is None:
        return "\n".join(
            [
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                f"model = AutoModelForCausalLM.from_pretrained({path!r})",
                f"tokenizer = AutoTokenizer.from_pretrained({path!r})",
            ]
        )
    names = ["AutoModelForCausalLM", "AutoTokenizer"]
    names += ["BitsAndBytesConfig"] if base.quantization else []
    names += ["GenerationConfig"] if stored_ends else []
    lines = [
        "from peft import PeftModel",
        f"from transformers import {', '.join(names)}",
        "",
        f"base = {base.code}",
        f"model = PeftModel.from_pretrained(base, {path!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({path!r})",
    ]
    if stored_ends:
        lines.append(f"model.generation_config = GenerationConfig.from_pretrained({path!r})")
    return "\n".join(lines)


def prompting_code(max_new_tokens: int, variables: Mapping[str, Any]) -> str:
    """Return the lines that ask the loaded model one question.

    Args:
        max_new_tokens: Length at which the judged answers were cut.
        variables: Variables of the chat template (data.chat_template_kwargs).
    """
    given = "".join(f", {name}={value!r}" for name, value in variables.items())
    return "\n".join(
        [
            'messages = [{"role": "user", "content": "Your prompt"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True'
            f"{given}",
            ").to(model.device)",
            f"answer = model.generate(**inputs, max_new_tokens={max_new_tokens})",
            'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], '
            "skip_special_tokens=True))",
        ]
    )
