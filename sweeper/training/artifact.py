"""Store a trial's artifact: the adapter (or all weights), tokenizer, manifest and archive."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sweeper.config.settings import TrialSettings
from sweeper.core.manifest import write_manifest
from sweeper.core.paths import TrialFolder, write_atomic
from sweeper.training.model_card import README, model_card

EPOCH = (1980, 1, 1, 0, 0, 0)
"""Date of every file in an archive, the earliest in the zip format. Equal files give equal bytes."""


@dataclass(frozen=True)
class TrainedModel:
    """A model with its best weights in place, and its tokenizer."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase


def save_artifact(
    trained: TrainedModel,
    settings: TrialSettings,
    folder: TrialFolder,
    figures: Mapping[str, float],
) -> None:
    """Store a trained model: the adapter alone, or all weights of a full fine-tune.

    Args:
        trained: model and tokenizer.
        settings: the settings of the training.
        folder: the trial's folder.
        figures: metrics for the model card (sweeper.training.model_card).
    """
    target = folder.adapter if isinstance(trained.model, PeftModel) else folder.model
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(trained.model, PeftModel):
        trained.model.save_pretrained(str(partial), save_embedding_layers=False)
        _name_base(partial / "adapter_config.json", settings)
    else:
        trained.model.save_pretrained(str(partial))
    trained.tokenizer.save_pretrained(str(partial))
    save_bpe(trained.tokenizer, partial)
    base_folder = Path(trained.model.config.name_or_path)
    write_atomic(partial / README, model_card(settings, figures, base_folder))
    write_manifest(partial)  # in the artifact's folder, so that copies and archives contain it
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    if settings.artifacts.zip:
        write_zip(target, folder.archive)


def save_bpe(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write vocab.json and merges.txt of a byte-level BPE tokenizer (GPT-2, Qwen, Llama 3).

    transformers 5 no longer writes these files, but other tools read them.
    """
    # Tokens of other BPE models may contain line breaks, which merges.txt cannot represent
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a slow tokenizer has none
    if (
        backend is not None
        and isinstance(backend.model, BPE)
        and isinstance(backend.decoder, ByteLevel)
    ):
        backend.model.save(str(folder))


def write_zip(folder: Path, target: Path) -> None:
    """Archive a folder so that equal files give equal bytes at any time and on any machine."""
    # Not compressed: weights hardly shrink, and deflate's output differs between builds of zlib
    partial = target.with_name(f".{target.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), EPOCH)
            entry.external_attr = 0o644 << 16
            entry.create_system = 3  # Unix, also if written on another system
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, archive.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink)
    partial.replace(target)


def _name_base(path: Path, settings: TrialSettings) -> None:
    """Make adapter_config.json portable and reproducible: the base's configured name, sorted lists."""
    config = json.loads(path.read_text(encoding="utf-8"))
    # PEFT writes the folder that the weights were loaded from, which other machines do not have
    config["base_model_name_or_path"] = settings.model.base_model
    config["revision"] = settings.model.revision
    # PEFT writes sets, whose order changes from process to process
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])
    write_atomic(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
