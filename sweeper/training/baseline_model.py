"""Use a model that another run trained as a baseline: check its architecture and store its files.

sweeper.training.trial_runner evaluates the model like any trial's.
"""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from sweeper.core.errors import ModelError
from sweeper.core.manifest import MANIFEST, verify_manifest, write_manifest
from sweeper.core.paths import TrialFolder
from sweeper.modeling.base_model import LoadedBase
from sweeper.modeling.model_source import MODEL, one_line, require_unquantized_base

SHAPE = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size"),
)
"""Configuration keys that a model and its fine-tunes share."""
TOKENIZER = "tokenizer_config.json"


def require_same_architecture(model: Path, base: LoadedBase) -> None:
    """Refuse a model whose architecture or vocabulary differs from the base's.

    Raises:
        ModelError: the architecture or vocabulary differs, or the folder holds no transformers model.
        ArtifactError: the files differ from their manifest.
    """
    where = f"the baseline model {model}"
    require_unquantized_base(model, where)
    if (model / MANIFEST).exists():
        verify_manifest(model)
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model) if (model / TOKENIZER).exists() else None
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(one_line(where, error)) from error
    if other := _differences(config, base.model.config):
        raise ModelError(
            f"{where} is not a fine-tune of this base. Its architecture differs: {other}"
        )
    if tokenizer is not None and tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ModelError(
            f"{where} has a different vocabulary than this base, so losses per token cannot be compared"
        )


def store_model(model: Path, folder: TrialFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the model's files into a trial's folder as its artifact, as hard links where possible.

    Args:
        model: folder of a model that passed `require_same_architecture`.
        folder: the trial's folder.
        tokenizer: the base's tokenizer, for a model that was stored without one.
    """
    partial = folder.model.with_name(".model.partial")
    # what a killed attempt has left
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and path.name != MANIFEST and any(fnmatch(path.name, p) for p in MODEL):
            # Hard links: the study no longer depends on the other run's folder, at no disk space
            _link(path.resolve(), partial / path.name)
    if not (partial / TOKENIZER).exists():
        tokenizer.save_pretrained(str(partial))
    write_manifest(partial)
    shutil.rmtree(folder.model, ignore_errors=True)
    partial.replace(folder.model)


def _differences(config: PretrainedConfig, base: PretrainedConfig) -> str:
    pairs = {key: (getattr(config, key, None), getattr(base, key, None)) for key in SHAPE}
    return ", ".join(f"{key} {a} instead of {b}" for key, (a, b) in pairs.items() if a != b)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
