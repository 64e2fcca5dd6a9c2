"""Sources: files, folders, URLs and hub data sets into rows.

Knows where rows lie and how they get here; the only user of `datasets` and fsspec. Local and remote
files are read by `rows`, so that a broken row costs one row; a hub data set comes through
`datasets.load_dataset`, from its cache where there is no network. Folders follow the hub's layout: a
README.md with a YAML card, or splits by the names of files and folders.
"""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from sweeper.builtin import stand_ins
from sweeper.builtin.stand_in_data import data_path, unknown_stand_in
from sweeper.config.settings import (
    EMBEDDED,
    SPLIT_KEYS,
    DataSettings,
    DataSource,
    GeneralTextSettings,
    sources,
)
from sweeper.core.errors import DataError, SweeperError
from sweeper.data.examples import DropCounts, RawRow
from sweeper.data.row_files import (
    READERS,
    STAGE,
    BadRow,
    RowFile,
    checked,
    kind_of,
    read_file,
    unknown_kind,
)

GENERAL_TEXT = "evaluation.general_text"
GENERAL_SPLIT = "test"
"""Of general text that names no split: its publishers kept it apart, too."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def read_source(source: DataSource, key: str, ledger: DropCounts) -> list[RawRow]:
    """All sound rows of one source; broken ones are counted in the ledger.

    Args:
        source: a file, a folder, a URL or a hub id.
        key: train, validation or test: the split taken where the source names none.
        ledger: where broken rows are counted.

    Raises:
        DataError: nothing is there, or it cannot be reached, or it is not what it claims to be.
    """
    if problem := path_problem(source.path):
        raise DataError(f"data.{key}={problem}")
    if source.path.startswith(stand_ins.PREFIX):
        source = source.model_copy(update={"path": str(data_path(source.path))})
    if is_hub_id(source.path):
        return _hub_rows(source, source.split or key, ledger)
    rows = []
    with _reaching(source.path):
        for file in _files(source, key):
            rows += read_file(file, ledger)
    return rows


def is_hub_id(path: str) -> bool:
    """Whether a path means a data set on the Hugging Face hub: org/name that is nothing local."""
    local = Path(path).expanduser()
    return (
        _HUB_ID.fullmatch(path) is not None
        and kind_of(path)[0] is None
        and not local.exists()
        and not local.parent.is_dir()
    )


def path_problem(path: str) -> str | None:
    """Why a path cannot be a source, as far as that is known without opening it."""
    if path == EMBEDDED or "://" in path or is_hub_id(path):
        return None
    if path.startswith(stand_ins.PREFIX):
        return unknown_stand_in(path)
    local = Path(path).expanduser()
    if not local.exists():
        return f"{path}: no such file or folder{_close_matches(local)}"
    if local.is_file() and kind_of(local.name)[0] is None:
        return f"{path}: {unknown_kind(path)}"
    return None


def all_sources(
    data: DataSettings, general: GeneralTextSettings
) -> Iterator[tuple[str, str, DataSource]]:
    """Each source of a configuration: its key, the split taken where it names none, and itself."""
    for key in SPLIT_KEYS:
        yield from ((f"data.{key}", key, source) for source in sources(getattr(data, key)))
    for source in sources(general.source):
        yield f"{GENERAL_TEXT}.source", GENERAL_SPLIT, source


def path_problems(data: DataSettings, general: GeneralTextSettings) -> list[str]:
    """What is wrong with the paths of a configuration, by key, without opening them."""
    found = [(key, path_problem(source.path)) for key, _, source in all_sources(data, general)]
    return [f"{key}={problem}" for key, problem in found if problem]


def describe_sources(data: DataSettings) -> str:
    """Where the training rows come from, in one line for people."""
    return " + ".join(_described(source) for source in sources(data.train))


def _described(source: DataSource) -> str:
    parts = [source.name, source.split, source.revision and f"@{source.revision[:12]}"]
    named = ", ".join(part for part in parts if part)
    weight = "" if source.weight is None else f" × {source.weight:g}"
    return source.path + (f" [{named}]" if named else "") + weight


def _close_matches(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    if close := difflib.get_close_matches(path.name, names, n=3):
        return f"; close: {', '.join(str(path.parent / name) for name in close)}"
    return "" if len(path.parts) > 1 else "; a hub data set is named org/name"


def _files(source: DataSource, key: str) -> list[RowFile]:
    """The files of a path or URL; those of one split in a folder."""
    remote = "://" in source.path
    path = source.path if remote else str(Path(source.path).expanduser())
    folder = kind_of(path)[0] is None if remote else Path(path).is_dir()
    _refuse_unused(source, folder)
    names = _folder_files(path.rstrip("/"), source, source.split or key) if folder else [path]
    kinds = sorted({str(kind_of(name)[0]) for name in names})
    if len(kinds) > 1:
        raise DataError(
            f"{path}: holds files of several kinds ({', '.join(kinds)}); name the files or folders "
            f"one by one: data.{key}=[a.jsonl,b.csv]"
        )
    return [RowFile(name, partial(_open, name)) for name in names]


def _refuse_unused(source: DataSource, folder: bool) -> None:
    """What a file or folder does not have must not be asked for in vain."""
    given = [word for word in ("name", "split", "revision") if getattr(source, word) is not None]
    if unused := [word for word in given if word == "revision" or not folder]:
        raise DataError(
            f"{source.path}: {' and '.join(unused)} given for a {'folder' if folder else 'file'}; "
            "a folder has splits and configurations (split, name), only a hub data set a revision"
        )


def _open(path: str) -> BinaryIO:
    import fsspec

    # remote files have a readline without a limit; the buffer has one that honours it
    return io.BufferedReader(fsspec.open(path, "rb").open())


def _folder_files(folder: str, source: DataSource, split: str) -> list[str]:
    """The data files of one split of a folder, sorted, as the hub would find them."""
    from datasets.data_files import DEFAULT_PATTERNS_ALL, resolve_pattern

    splits = _folder_splits(folder, source)
    if list(splits.items()) == [(str(name), list(p)) for name, p in DEFAULT_PATTERNS_ALL.items()]:
        patterns = next(iter(splits.values()))  # no file is named after a split: all are meant
    elif split in splits:
        patterns = splits[split]
    else:
        raise DataError(
            f"{folder}: has no split {split!r}; it has {', '.join(splits)}: give "
            f"{{path: {source.path}, split: …}}"
        )
    found: set[str] = set()
    for pattern in patterns:
        try:
            found |= {*resolve_pattern(pattern, folder, allowed_extensions=[*READERS, ".gz"])}
        except FileNotFoundError:  # a split has many patterns; most match nothing
            continue
    found = {name for name in found if kind_of(name)[0] is not None}
    if not found:
        raise DataError(f"{folder}: holds no data files ({', '.join(READERS)})")
    if "://" in folder:
        return sorted(found)
    return sorted(str(Path(folder, os.path.relpath(name, folder))) for name in found)


def _folder_splits(folder: str, source: DataSource) -> dict[str, list[str]]:
    """Split -> file patterns: by the YAML card of README.md, else by the names of the files."""
    import fsspec
    from datasets.data_files import get_data_patterns, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    system, root = fsspec.url_to_fs(f"{folder}/README.md")
    configs = MetadataConfigs()
    if system.isfile(root):
        card = DatasetCard(system.read_text(root, encoding="utf-8"), ignore_metadata_errors=True)
        configs = MetadataConfigs.from_dataset_card_data(card.data)
    name = source.name or configs.get_default_config_name()
    if (name is not None and name not in configs) or (name is None and configs):
        known = ", ".join(configs) or "none"
        raise DataError(
            f"{folder}: {'needs a configuration' if name is None else f'no configuration {name!r}'}; "
            f"its README.md names {known}: give {{path: {source.path}, name: …}}"
        )
    if name is not None and (files := configs[name].get("data_files")):
        return dict(sanitize_patterns(files))
    return {str(key): list(found) for key, found in get_data_patterns(folder).items()}


@contextmanager
def _reaching(path: str) -> Iterator[None]:
    """Turn what file systems and networks raise into errors for people."""
    try:
        yield
    except SweeperError:
        raise
    except ImportError as error:
        raise DataError(
            f"{path}: needs a package that is not installed ({error}); "
            "for s3:// and gs://: pip install 'sweeper[remote]'"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: nothing there ({_first_line(error)})") from error
    except Exception as error:  # every remote file system has errors of its own
        raise DataError(f"{path}: cannot be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _hub_rows(source: DataSource, split: str, ledger: DropCounts) -> list[RawRow]:
    rows = []
    for number, values in enumerate(hub_data(source, split), start=1):
        where = f"{source.path}[{split}]:{number}"
        try:
            rows.append(RawRow(checked(values), where))
        except BadRow as bad:
            ledger.drop(STAGE, bad.reason, where + bad.shown)
    return rows


def hub_data(source: DataSource, split: str) -> Any:
    """One split of a hub data set (a datasets.Dataset), from the cache where there is no network.

    Raises:
        DataError: not there, gated, not reachable and not cached, or no such split or configuration.
    """
    import datasets

    try:
        data = datasets.load_dataset(
            source.path, source.name, split=split, revision=source.revision
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(_not_on_hub(source, error)) from error
    except (ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"{source.path}: neither on a hub that can be reached nor in its cache "
            f"({_first_line(error)}); where there is a network, fill the cache with "
            f"`sweeper prefetch data.train={source.path}`, or give a local file or folder"
        ) from error
    except Exception as error:  # wrong names are ValueErrors, broken files may be anything
        words = " ".join(str(error).split())[:300]
        raise DataError(
            f"{source.path} [{split}]: {words} (keys of a source: name, split, revision)"
        ) from error
    _check_revision(source, data)
    return data


def _not_on_hub(source: DataSource, error: Exception) -> str:
    page = f"https://huggingface.co/datasets/{source.path}"
    if "gated" in str(error):
        return (
            f"{source.path}: access is gated; accept its terms at {page}, "
            "then `hf auth login` or set HF_TOKEN"
        )
    if source.revision is not None and "Revision" in str(error):
        return f"{source.path}: no revision {source.revision!r}; see {page}/commits/main"
    return (
        f"{source.path}: no such data set on the hub, or a private one (then `hf auth login`); "
        "it is no local path either"
    )


def _check_revision(source: DataSource, data: Any) -> None:
    """Without a network datasets takes the newest cached version, whatever was asked for."""
    pinned = source.revision
    cached = {Path(item["filename"]).parent.name for item in data.cache_files}
    commits = {name for name in cached if _COMMIT.fullmatch(name)}
    if pinned is not None and _COMMIT.fullmatch(pinned) and commits - {pinned}:
        raise DataError(
            f"{source.path}: the cache holds revision {', '.join(sorted(commits))}, not {pinned}; "
            f"run `sweeper prefetch` for it where there is a network"
        )
