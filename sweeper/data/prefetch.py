"""Prefetch: fill the hub's cache with models and data sets, so that workers need no network.

Knows where the hub's clients keep things, and loads neither models nor rows into the program. What is
local, embedded or read by URL is named, so that nobody wonders about it.
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
"""Fetched only where a model has no safetensors."""
OTHER_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
COPIES = ("original/*", "consolidated*", "onnx/*")
"""The same weights once more, in forms that transformers does not load."""
MIB = 2**20


@dataclass(frozen=True)
class FetchedItem:
    """One thing that a configuration needs, and where it is now."""

    what: str
    where: str
    bytes: int | None
    """None = nothing had to be fetched."""

    def __str__(self) -> str:
        size = "" if self.bytes is None else f"  {self.bytes / MIB:,.1f} MiB"
        return f"{self.what}: {self.where}{size}"


def prefetch(settings: Sequence[TrialSettings]) -> Iterator[FetchedItem]:
    """Fetch every model and data set of some configurations, each once.

    Raises:
        ModelError: a model is not on the hub, gated, or cannot be reached.
        DataError: the same of a data set.
    """
    models = {(item.model.base_model, item.model.revision): item.model for item in settings}
    yield from (_model(model) for model in models.values())
    wanted = {
        (key, source.model_dump_json()): (key, split, source)
        for item in settings
        for key, split, source in all_sources(item.data, item.evaluation.general_text)
    }
    yield from (_data(*found) for found in wanted.values())


def _data(key: str, default_split: str, source: DataSource) -> FetchedItem:
    what = f"{key} {source.path}"
    if not is_hub_id(source.path):
        kind = "read by URL at every start" if "://" in source.path else "local"
        return FetchedItem(what, f"{kind}, nothing to fetch", None)
    split = source.split or default_split
    files = [Path(item["filename"]) for item in hub_data(source, split).cache_files]
    folders = sorted({str(file.parent) for file in files})
    return FetchedItem(
        f"{what} [{split}]", ", ".join(folders), sum(file.stat().st_size for file in files)
    )


def _model(model: ModelSettings) -> FetchedItem:
    what = f"model {model.base_model}"
    made_here = model.base_model == EMBEDDED or model.base_model.startswith(stand_ins.PREFIX)
    if made_here or Path(model.base_model).expanduser().exists():
        return FetchedItem(what, "local, nothing to fetch", None)
    folder = _snapshot(model, WEIGHTS)
    if not any(folder.glob(WEIGHTS)):
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
            f"{name}: access is gated; accept its licence at {page}, then `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"{name}: no such model on the hub, or a private one (then `hf auth login`); "
            "it is no local folder either"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{name}: no revision {model.revision!r}; see {page}/commits/main"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ModelError(
            f"{name}: the hub cannot be reached ({reason}); run this where there is a network, "
            "without HF_HUB_OFFLINE"
        ) from error
    return Path(found)
