"""Take over a model that another run trained: check that it is kin of the base, and keep it.

What it is worth is judged as everything else is (sweeper.training.trial_runner).
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
from sweeper.modeling.model_source import MODEL, one_line, refuse_foreign

SHAPE = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size"),
)
"""What a model and its fine-tunes have in common, as far as its configuration names it."""
TOKENIZER = "tokenizer_config.json"


def require_kin(model: Path, base: LoadedBase) -> None:
    """Refuse a model that is no fine-tune of this base.

    Raises:
        ModelError: another architecture or vocabulary, or no model of transformers' layout.
        ArtifactError: it is not what its manifest says.
    """
    where = f"the adopted model {model}"
    refuse_foreign(model, where)
    if (model / MANIFEST).exists():
        verify_manifest(model)
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model) if (model / TOKENIZER).exists() else None
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(one_line(where, error)) from error
    if other := _differences(config, base.model.config):
        raise ModelError(f"{where} is no fine-tune of this base, its architecture differs: {other}")
    if tokenizer is not None and tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ModelError(
            f"{where} has another vocabulary than this base: their losses per token do not compare"
        )


def keep(model: Path, folder: TrialFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the model's files into a trial's folder, without a copy where the disk is the same.

    Args:
        model: of kin (require_kin).
        folder: where it becomes the artifact.
        tokenizer: the base's, for a model that was stored without one.
    """
    partial = folder.model.with_name(".model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and path.name != MANIFEST and any(fnmatch(path.name, p) for p in MODEL):
            _link(path.resolve(), partial / path.name)
    if not (partial / TOKENIZER).exists():
        tokenizer.save_pretrained(str(partial))
    write_manifest(partial)
    shutil.rmtree(folder.model, ignore_errors=True)
    partial.replace(folder.model)


def _differences(config: PretrainedConfig, base: PretrainedConfig) -> str:
    pairs = {key: (getattr(config, key, None), getattr(base, key, None)) for key in SHAPE}
    return ", ".join(f"{key} {a} and not {b}" for key, (a, b) in pairs.items() if a != b)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copy2(source, target)
