"""The commands of vLLM that serve an adapter or a whole model as it was trained and judged."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from sweeper.config.settings import LoraAdapter
from sweeper.core.trained_form import TrainedForm

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts as --max-lora-rank (vllm/config/lora.py, MaxLoRARanks)."""
GREEDY = """--override-generation-config '{"temperature": 0}'"""
"""Option by which vLLM answers as the judge does. Its own default samples."""
TOOL_PARSERS = (
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3_json"),
    ("<tool_call>\\n<function=", "qwen3_coder"),
    ("<tool_call>\n<function=", "qwen3_coder"),
    # after qwen3_coder, whose mark contains this one
    ("<tool_call>", "hermes"),
    ("tool▁calls▁begin", "deepseek_v3"),
    ("<|channel|>", "openai"),
)
"""Text in a chat template, and the parser of vLLM (--tool-call-parser) that reads what it prints."""
ANY_PARSER = "PARSER_OF_THIS_TEMPLATE"


def tool_parser(chat_template: str) -> str:
    """Return the name of vLLM's parser for the tool calls of a chat template."""
    return next((name for mark, name in TOOL_PARSERS if mark in chat_template), ANY_PARSER)


def trained_options(form: TrainedForm | None, chat_template: str = "") -> list[str]:
    """Return the options of `vllm serve` that follow from how a model was trained."""
    if form is None:
        return []
    options = [GREEDY]
    if form.chat_template_kwargs:
        variables = json.dumps(form.chat_template_kwargs)
        options.append(f"--default-chat-template-kwargs {shlex.quote(variables)}")
    if form.tools:
        options.append(f"--enable-auto-tool-choice --tool-call-parser {tool_parser(chat_template)}")
    return options


def whole_serving(path: str, form: TrainedForm | None, chat_template: str = "") -> str:
    """Return vLLM's command for a full fine-tune or a merged model."""
    return " ".join(["vllm serve", shlex.quote(path), *trained_options(form, chat_template)])


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that vLLM is to serve on its base.

    Attributes:
        name: Name of the model that clients ask for.
        path: Folder of the adapter.
        base: Hub id or folder of the base.
        revision: Commit or revision of the base, or None.
        adapter: Settings of the adapter.
        form: Form that the adapter was trained in, or None if unknown.
        chat_template: Source of the stored chat template, or "" if there is none.
    """

    name: str
    path: str
    base: str
    revision: str | None
    adapter: LoraAdapter
    form: TrainedForm | None
    chat_template: str = ""

    @property
    def command(self) -> str:
        """The command for the adapter, or for the merged model with the reason."""
        if unsupported := self._unsupported():
            merged = whole_serving("merged", self.form, self.chat_template)
            words = " or ".join(unsupported)
            return f"{merged}    (after Merge below, vLLM serves no {words})"
        path = shlex.quote(self.path)
        parts = ["vllm serve", shlex.quote(self.base)]
        parts += [] if self.revision is None else [f"--revision {shlex.quote(self.revision)}"]
        parts.append(f"--enable-lora --max-lora-rank {self._rank}")
        parts.append(f"--lora-modules {self.name}={path}")
        if self.form is not None:
            # vLLM takes template and end tokens from the base, never from an adapter
            parts.append(f"--generation-config {path}")
            if self.chat_template:
                parts.append(f"--chat-template {path}/chat_template.jinja")
        return " ".join([*parts, *trained_options(self.form, self.chat_template)])

    @property
    def _largest(self) -> int:
        # rank_pattern may give single modules a higher rank than r.
        return max(self.adapter.rank, *self.adapter.rank_pattern.values(), 0)

    @property
    def _rank(self) -> int | None:
        return next((rank for rank in VLLM_RANKS if rank >= self._largest), None)

    def _unsupported(self) -> list[str]:
        """Return what vLLM cannot serve, which loads plain LoRA weights only."""
        reasons = {
            "DoRA": self.adapter.use_dora,
            "trained biases": self.adapter.bias != "none",
            "modules_to_save": bool(self.adapter.modules_to_save),
            f"ranks above {VLLM_RANKS[-1]}": self._rank is None,
        }
        return [reason for reason, holds in reasons.items() if holds]
