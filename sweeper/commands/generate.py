"""`sweeper generate`: ask a base and its adapters the same prompts, on one loaded base.

Knows the folders of trials. Neither trains nor scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError

from sweeper.config.compose import read_yaml
from sweeper.config.settings import TrialSettings, stored_settings
from sweeper.core.errors import ModelError
from sweeper.core.manifest import verify_manifest
from sweeper.core.paths import TrialFolder
from sweeper.core.trained_form import read_trained_form
from sweeper.data.encode import encode_prompts
from sweeper.data.examples import ChatMessage, Example, RawRow
from sweeper.evaluation.generation import generate
from sweeper.modeling.adapter import load_adapter, restore_precision
from sweeper.modeling.base_model import LoadedBase, load_base
from sweeper.modeling.model_source import one_line, require_safetensors

UNTUNED = "untuned"
CHATS = "messages"
FORMAT_BY_TEMPLATE = {
    None: "prompt_completion",
    "plain": "prompt_completion",
    "instruction": "alpaca",
    "instruction_input": "alpaca",
}
"""Formats of rows by the template of the training, None for texts. Others are those of chats."""


@dataclass(frozen=True)
class SideBySide:
    """One prompt with the answer of each model, the untuned base first."""

    prompt: str
    answers: dict[str, str]
    """Answers by the adapter's path as the user gave it."""


@dataclass(frozen=True)
class StoredAdapter:
    """A stored adapter and the settings it was trained with."""

    name: str
    path: Path
    settings: TrialSettings

    @property
    def asked_as(self) -> str:
        """A format of rows for which data.template=auto chooses the template of the training."""
        form = read_trained_form(self.path)
        return FORMAT_BY_TEMPLATE.get(form.template, CHATS) if form is not None else CHATS


def side_by_side(
    paths: Sequence[Path], prompts: Sequence[str], max_new_tokens: int
) -> list[SideBySide]:
    """Answer every prompt greedily with the untuned base and with each adapter.

    The base is loaded once, with the quantization of the first adapter's trial. Each adapter
    receives the prompts in the template that it was trained with.

    Args:
        paths: folders of trials, or the adapter/ in them.
        prompts: user messages.
        max_new_tokens: length at which an answer is cut.

    Raises:
        ModelError: there is no adapter at a path, or the adapters have different bases.
        ConfigError: a prompt and its answer exceed the model's positions.
        DataError: the template cannot print a prompt.
    """
    adapters = [find_adapter(path) for path in paths]
    first = adapters[0].settings
    require_one_base(adapters)
    base = load_base(first.model, first.quantization, trained=False)
    # The untuned answers come first, while the base has no adapter.
    answers = {UNTUNED: _ask(base, base.model, adapters[0], prompts, max_new_tokens)}
    model: PeftModel | None = None
    for index, adapter in enumerate(adapters):
        model = _loaded(base, model, adapter, f"adapter_{index}")
        answers[adapter.name] = _ask(base, model, adapter, prompts, max_new_tokens)
    return [
        SideBySide(prompt, {name: texts[place] for name, texts in answers.items()})
        for place, prompt in enumerate(prompts)
    ]


def find_adapter(path: Path) -> StoredAdapter:
    """Return the adapter of a trial with the trial's settings.

    Raises:
        ModelError: the path holds no adapter, or its trial's config.yaml is missing.
        ArtifactError: the files differ from their manifest.
    """
    folder = TrialFolder(path.parent if path.name == "adapter" else path)
    if not (folder.adapter / "adapter_config.json").exists():
        kind = "a full fine-tune has none" if folder.model.is_dir() else "nor is it one"
        raise ModelError(
            f"{path}: holds no adapter ({kind}). Give a folder like "
            "outputs/STUDY/lora/trial_0007 or the adapter/ in it"
        )
    if not folder.config.exists():
        raise ModelError(
            f"{folder.config}: no such file. It names the base and the template: keep it beside adapter/"
        )
    require_safetensors(folder.adapter, path.as_posix())
    verify_manifest(folder.adapter)
    settings = stored_settings(read_yaml(folder.config))
    return StoredAdapter(path.as_posix(), folder.adapter, settings)


def require_one_base(adapters: Sequence[StoredAdapter]) -> None:
    """Require that all adapters were trained on the same base, so that they can share a loaded one.

    Raises:
        ModelError: names the bases.
    """
    bases = {
        adapter.name: (adapter.settings.model.base_model, adapter.settings.model.revision)
        for adapter in adapters
    }
    if len(set(bases.values())) > 1:
        listed = "; ".join(f"{name}: {base}" for name, (base, _) in bases.items())
        raise ModelError(f"the adapters have different bases ({listed}). Ask them one by one")


def _loaded(
    base: LoadedBase, model: PeftModel | None, adapter: StoredAdapter, name: str
) -> PeftModel:
    """Return the base with this adapter active. Adapters loaded before stay loaded."""
    try:
        if model is None:
            return load_adapter(base.model, adapter.path, name)
        model.load_adapter(str(adapter.path), adapter_name=name)
        restore_precision(model, adapter.path, name)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(one_line(f"{adapter.name} on its base", error)) from error
    model.set_adapter(name)
    return model


def _ask(
    base: LoadedBase,
    model: PeftModel,
    adapter: StoredAdapter,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    row = RawRow({}, "--prompt")
    # An example ends with an answer, which generation does not read.
    examples = [
        Example((ChatMessage("user", prompt), ChatMessage("assistant", "")), row, adapter.asked_as)
        for prompt in prompts
    ]
    encoded = encode_prompts(examples, base.tokenizer, adapter.settings.data)
    return generate(
        model,
        base.tokenizer,
        [prompt.input_ids for prompt in encoded],
        max_new_tokens,
        len(encoded),
        base.compute_dtype,
        {prompt.end_token_id for prompt in encoded},
    ).texts
