"""Download models and data sets into the hub's cache, so that workers need no network.

Loads neither models nor rows into memory. Sources that are local, embedded or read by URL are listed
too, with the reason why nothing is downloaded for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sweeper.builtin import stand_ins
from sweeper.config.settings import EMBEDDED, DataSource, ModelSettings, TrialSettings
from sweeper.core.errors import ModelError
from sweeper.data.sources import all_sources, hub_data, is_hub_id

WEIGHTS = "*.safetensors"
OLDER_WEIGHTS = "*.bin"
"""PyTorch pickle files, fetched only if a model has no safetensors files."""
OTHER_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
COPIES = ("original/*", "consolidated*", "onnx/*")
"""Copies of the weights in formats that transformers does not load."""
MIB = 2**20


@dataclass(frozen=True)
class FetchedItem:
    """A model or data set that a configuration needs, and its location."""

    what: str
    where: str
    bytes: int | None
    """Size in bytes, or None if nothing had to be fetched."""

    def __str__(self) -> str:
        size = "" if self.bytes is None else f"  {self.bytes / MIB:,.1f} MiB"
        return f"{self.what}: {self.where}{size}"


def prefetch(settings: Sequence[TrialSettings]) -> Iterator[FetchedItem]:
    """Fetch every model and data set of the configurations, each once.

    Raises:
        ModelError: A model is not on the hub or gated, or the hub cannot be reached.
        DataError: A data set is not on the hub or gated, or the hub cannot be reached.
    """
    models = {(item.model.base_model, item.model.revision): item.model for item in settings}
    yield from (_model(model) for model in models.values())
    needed = {
        (key, source.model_dump_json()): (key, split, source)
        for item in settings
        for key, split, source in all_sources(item.data, item.evaluation.general_text)
    }
    yield from (_data(*item) for item in needed.values())


def _data(key: str, default_split: str, source: DataSource) -> FetchedItem:
    what = f"{key} {source.path}"
    if not is_hub_id(source.path):
        kind = "read from its URL at every start" if "://" in source.path else "local"
        return FetchedItem(what, f"{kind}, nothing to fetch", None)
    split = source.split or default_split
    files = [Path(item["filename"]) for item in hub_data(source, split).cache_files]
    folders = sorted({str(file.parent) for file in files})
    return FetchedItem(
        f"{what} [{split}]", ", ".join(folders), sum(file.stat().st_size for file in files)
    )


def _model(model: ModelSettings) -> FetchedItem:
    what = f"model {model.base_model}"
    shipped = model.base_model == EMBEDDED or model.base_model.startswith(stand_ins.PREFIX)
    if shipped or Path(model.base_model).expanduser().exists():
        return FetchedItem(what, "local, nothing to fetch", None)
    folder = _snapshot(model, WEIGHTS)
    if not any(folder.glob(WEIGHTS)):  # an older model without safetensors
        folder = _snapshot(model, OLDER_WEIGHTS)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return FetchedItem(what, str(folder), size)


def _snapshot(model: ModelSettings, weights: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    name = model.base_model
    page = f"https://huggingface.co/{name}"
    try:
        found = snapshot_download(
            name,
            revision=model.revision,
            allow_patterns=[weights, *OTHER_FILES],
            ignore_patterns=list(COPIES),
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name}: access is gated. Accept the licence at {page}, then run `hf auth login` or set "
            "HF_TOKEN."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        # The hub answers a request for a private model as if the model did not exist.
        raise ModelError(
            f"{name}: not a local folder, and not a public model on the hub. Check the name, or run "
            "`hf auth login` if the model is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{name}: no revision {model.revision!r}. See {page}/commits/main"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ModelError(
            f"{name}: the hub cannot be reached ({reason}). Run the command on a machine with network "
            "access and without HF_HUB_OFFLINE."
        ) from error
    return Path(found)
