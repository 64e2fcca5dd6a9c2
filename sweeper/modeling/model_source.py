"""Where the files of a base model lie: a folder, the hub or its cache; and what is refused unseen.

Reads configuration and hashes weights; loads no model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, PretrainedConfig

from sweeper.builtin import stand_ins
from sweeper.builtin.embedded import BASE_DIR
from sweeper.builtin.stand_in_models import model_folder
from sweeper.config.settings import EMBEDDED, ModelSettings
from sweeper.core.errors import ModelError, first_line

CONFIG = ("config.json", "adapter_config.json")
MODEL = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja")
"""What is fetched from a hub: safe formats only."""
NOT_THE_MODEL = ("*/*.safetensors", "*/*.json", "consolidated*")
"""Second copies of the weights that some repositories carry."""
NO_CODE = {"trust_remote_code": False}
"""Said at every loading: left open, transformers asks at the terminal whether to run foreign code."""
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ModelSource:
    """The files of one base model on this machine."""

    folder: Path
    commit: str | None
    """The hub's commit hash, where the files come from a hub or its cache."""


def find_source(settings: ModelSettings) -> ModelSource:
    """The base model's files; those of a hub id are fetched into the hub's cache first.

    Raises:
        ModelError: neither a folder nor a hub id that can be fetched, or files that are refused.
    """
    source = _locate(settings, MODEL)
    refuse_foreign(source.folder, f"model.base_model={settings.base_model!r}")
    require_safetensors(source.folder, f"model.base_model={settings.base_model!r}")
    return source


def require_safetensors(folder: Path, where: str) -> None:
    """Weights in any other format are not read, though transformers and PEFT would fall back to them.

    Raises:
        ModelError: the folder has no others.
    """
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{where}: no *.safetensors weights in {folder} "
            "(other formats can run code; save the model again with save_pretrained)"
        )


def load_config(settings: ModelSettings) -> PretrainedConfig:
    """The architecture alone: of a hub id only config.json is fetched.

    Raises:
        ModelError: as `find_source`, or config.json is not one that transformers knows.
    """
    source = _locate(settings, CONFIG)
    refuse_foreign(source.folder, f"model.base_model={settings.base_model!r}")
    try:
        return AutoConfig.from_pretrained(source.folder, **NO_CODE)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(one_line(f"model.base_model={settings.base_model!r}", error)) from error


def one_line(where: str, error: BaseException) -> str:
    """A library's error as one line about what the user named."""
    return f"{where}: {first_line(error)}"


def weights_digest(folder: Path) -> str:
    """sha256 over the safetensors files of a folder, by name; of files that stay as they are, once."""
    stats = [(path, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    return _digest(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@lru_cache(maxsize=8)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def weights_bytes(folder: Path) -> int:
    """Size of the safetensors files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _locate(settings: ModelSettings, patterns: Sequence[str]) -> ModelSource:
    if settings.base_model == EMBEDDED:
        return ModelSource(BASE_DIR, None)
    if settings.base_model.startswith(stand_ins.PREFIX):
        return ModelSource(model_folder(settings.base_model), None)
    path = Path(settings.base_model).expanduser()
    if not path.is_dir():
        return _from_hub(settings, patterns)
    folder = path if (path / "config.json").exists() else _snapshot(path, settings)
    in_cache = folder.resolve().parent.name == "snapshots"
    return ModelSource(folder, folder.resolve().name if in_cache else None)


def _snapshot(path: Path, settings: ModelSettings) -> Path:
    """The revision inside a folder of the hub cache's layout (models--org--name); else the folder."""
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return path
    there = sorted(folder.name for folder in snapshots.iterdir() if folder.is_dir())
    wanted = settings.revision or "main"
    ref = path / "refs" / wanted
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else wanted
    if commit not in there and settings.revision is None and len(there) == 1:
        commit = there[0]
    if commit not in there:
        raise ModelError(
            f"model.revision={settings.revision!r}: {path} holds no such revision; "
            f"it holds {', '.join(there) or 'none'}"
        )
    return snapshots / commit


def _from_hub(settings: ModelSettings, patterns: Sequence[str]) -> ModelSource:
    name = settings.base_model
    try:
        fetched = Path(
            snapshot_download(
                name,
                revision=settings.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(NOT_THE_MODEL),
            )
        )
    except Exception as error:  # huggingface_hub, its HTTP client and the OS: all mean "not there"
        raise ModelError(f"model.base_model={name!r} {_why_not(error, settings)}") from error
    return ModelSource(fetched, fetched.name if COMMIT.fullmatch(fetched.name) else None)


def _why_not(error: Exception, settings: ModelSettings) -> str:
    """What keeps a hub id from being fetched, and what to do about it."""
    name = settings.base_model
    match error:
        case GatedRepoError():
            return (
                f"is gated: accept its licence at https://huggingface.co/{name} with your account, "
                "then set HF_TOKEN to a token of that account "
                "(https://huggingface.co/settings/tokens)"
            )
        case RevisionNotFoundError():
            return f"has no revision {settings.revision!r}: give a branch, a tag or a commit of it"
        case RepositoryNotFoundError():
            return (
                "is no local folder, and the hub knows no such model: check its spelling at "
                f"https://huggingface.co/{name}; for a private one set HF_TOKEN"
            )
        case HFValidationError():
            return (
                "is neither a local folder nor a hub id (organisation/name): "
                "give the folder that holds config.json and *.safetensors"
            )
        case LocalEntryNotFoundError():
            return (
                "is no local folder, the hub's cache on this machine does not hold it, and the hub "
                "cannot be reached (no network, or HF_HUB_OFFLINE is set); on a machine with a "
                f"network run `sweeper prefetch model.base_model={name}` and share its cache "
                "(HF_HOME), or give a folder: model.base_model=/path/to/folder"
            )
        case _:
            return (
                f"could not be fetched from the hub ({type(error).__name__}: {first_line(error)})"
            )


def refuse_foreign(folder: Path, where: str) -> None:
    """Adapters are no bases, and weights that are already quantized cannot be trained or merged into.

    Args:
        folder: what claims to hold a base model.
        where: how the user named it.

    Raises:
        ModelError: it does not.
    """
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise ModelError(
                f"{where} is an adapter, not a base; merge it into its base first, "
                "or give the base itself"
            )
        raise ModelError(f"{where}: no config.json in {folder}")
    try:
        config = PretrainedConfig.get_config_dict(folder)[0]
    except (OSError, ValueError) as error:
        raise ModelError(one_line(where, error)) from error
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "unknown method")
        raise ModelError(
            f"{where} is already quantized ({method}); give the unquantized checkpoint: "
            "quantization=nf4, fp4 or int8 quantizes it while it is loaded"
        )
