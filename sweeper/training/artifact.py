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
from sweeper.core.manifest import MANIFEST, write_manifest
from sweeper.core.paths import TrialFolder, write_atomic
from sweeper.training.artifact_form import ArtifactForm
from sweeper.training.model_card import README, model_card

EPOCH = (1980, 1, 1, 0, 0, 0)
"""Date of every file in an archive, the earliest in the zip format. Equal files give equal bytes."""


@dataclass(frozen=True)
class TrainedModel:
    """A model with its best weights in place, and what is needed to use it as it was trained."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    form: ArtifactForm


def save_artifact(
    trained: TrainedModel,
    settings: TrialSettings,
    folder: TrialFolder,
    figures: Mapping[str, float],
) -> None:
    """Store a trained model: the adapter alone, or all weights of a full fine-tune.

    Args:
        trained: model, tokenizer, and the form that it was trained in.
        settings: the settings of the training.
        folder: the trial's folder.
        figures: metrics for the model card (sweeper.training.model_card).
    """
    target = folder.adapter if isinstance(trained.model, PeftModel) else folder.model
    partial = target.with_name(f".{target.name}.partial")
    # what a killed attempt has left
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(trained.model, PeftModel):
        # PEFT's default, "auto", asks the hub for the base's config to compare the vocabulary sizes
        trained.model.save_pretrained(str(partial), save_embedding_layers=False)
        _name_base(partial / "adapter_config.json", trained.form)
    else:
        trained.model.save_pretrained(str(partial))
    trained.form.save(trained.tokenizer, partial)
    save_bpe(trained.tokenizer, partial)
    card = model_card(settings, figures, trained.form.folder, trained.form.form)
    write_atomic(partial / README, card)
    write_manifest(partial)  # in the artifact's folder, so that copies and archives contain it
    # a folder that is not empty cannot be replaced
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
            # Unix permissions are in the upper two bytes
            entry.external_attr = 0o644 << 16
            entry.create_system = 3  # Unix, also if written on another system
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, archive.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink)
    partial.replace(target)


def archive_differs(folder: Path, archive: Path) -> bool:
    """Return True if an archive holds another manifest than its folder, or cannot be read."""
    try:
        with zipfile.ZipFile(archive) as stored:
            # The manifest has the checksums of all other files
            return stored.read(MANIFEST) != (folder / MANIFEST).read_bytes()
    except (zipfile.BadZipFile, KeyError):
        return True


def _name_base(path: Path, form: ArtifactForm) -> None:
    """Make adapter_config.json resolvable and reproducible: the base's pinned hub id, sorted lists."""
    config = json.loads(path.read_text(encoding="utf-8"))
    # A relative path would be the name of a stranger's repository on the hub, so a folder is absolute
    config["base_model_name_or_path"] = form.form.base or form.folder.resolve().as_posix()
    config["revision"] = form.form.revision
    # PEFT writes sets, whose order changes from process to process
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])
    write_atomic(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
