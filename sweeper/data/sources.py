"""Read rows from files, folders, URLs and hub data sets.

This is the only module that uses `datasets` and fsspec. Local and remote files are read by `row_files`,
so that a broken row costs only that row. A hub data set is loaded by `datasets.load_dataset`, or from
its cache without a network. Folders follow the hub's layout: a README.md with a YAML card, or splits by
the names of files and folders.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
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
from sweeper.core.regular_files import irregular
from sweeper.data.examples import DropCounts, RawRow
from sweeper.data.row_files import (
    READERS,
    STAGE,
    BadRow,
    RowFile,
    checked_values,
    file_kind,
    read_file,
    unknown_kind_problem,
)

GENERAL_TEXT = "evaluation.general_text"
GENERAL_SPLIT = "test"
"""Default split of general text: its publishers kept this split out of training as well."""
TEXT_KINDS = frozenset({".txt", ".md"})
"""Kinds of files that one folder may hold together, because both are plain text."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MARKS = re.compile(r"[\[\]*?{}]|::")
"""Marks that a pattern of file names gives a meaning."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def read_source(source: DataSource, key: str, drops: DropCounts) -> list[RawRow]:
    """Return all usable rows of one source, and count the bad ones in `drops`.

    Args:
        source: A file, a folder, a URL or a hub id.
        key: Split to read if the source names none: train, validation or test.
        drops: Counter of bad rows.

    Raises:
        DataError: The source does not exist, cannot be reached, or cannot be read as a whole.
    """
    if problem := path_problem(source.path):
        raise DataError(f"data.{key}={problem}")
    if source.path.startswith(stand_ins.PREFIX):
        source = source.model_copy(update={"path": str(data_path(source.path))})
    if is_hub_id(source.path):
        return _hub_rows(source, source.split or key, drops)
    rows = []
    with _reaching(source.path):
        for file in _files(source, key):
            rows += read_file(file, drops)
    if rows and all(row.whole_file for row in rows) and Path(source.path, "README.md").is_file():
        # The hub's rules take it for the folder's description.
        drops.changed["README.md describes the folder and is not read as text"] += 1
    return rows


def own_splits(source: DataSource) -> tuple[str, ...]:
    """Return the splits that a local folder names by its files, or none for any other source."""
    folder = Path(source.path).expanduser()
    if source.split is not None or "://" in source.path or not folder.is_dir():
        return ()
    with _reaching(source.path):
        return tuple(_folder_splits(str(folder), source))


def is_hub_id(path: str) -> bool:
    """Return True if a path is a hub data set: it has the form org/name and nothing local matches."""
    local = Path(path).expanduser()
    # A path whose folder exists is a misspelt local file. The hub is not asked for it.
    return (
        _HUB_ID.fullmatch(path) is not None
        and file_kind(path)[0] is None
        and not local.exists()
        and not local.parent.is_dir()
    )


def path_problem(path: str) -> str | None:
    """Return why a path cannot be a source, or None. Nothing is opened."""
    if path == EMBEDDED or "://" in path or is_hub_id(path):
        return None
    if path.startswith(stand_ins.PREFIX):
        return unknown_stand_in(path)
    local = Path(path).expanduser()
    if problem := irregular(local):
        return problem
    if not local.exists():
        return f"{path}: no such file or folder{_close_matches(local)}"
    if local.is_file() and file_kind(local.name)[0] is None:
        return f"{path}: {unknown_kind_problem(path)}"
    return None


def not_made(path: str, made_by: Mapping[str, str]) -> str | None:
    """Return that a path is missing and which command makes it, or None if it exists or none does."""
    # A name such as folder/model could be one of the hub too, which is not asked for it
    place = Path(path).expanduser()
    roots = [root for root in made_by if place.is_relative_to(root)]
    if not roots or place.exists():
        return None
    # A path below several of them is made by the command of the deepest one
    command = made_by[max(roots, key=lambda root: len(Path(root).parts))]
    return f"{path}: no such file or folder. Make it first with `{command}`"


def all_sources(
    data: DataSettings, general: GeneralTextSettings
) -> Iterator[tuple[str, str, DataSource]]:
    """Yield each source of a configuration as (key, default split, source)."""
    for key in SPLIT_KEYS:
        yield from ((f"data.{key}", key, source) for source in sources(getattr(data, key)))
    for source in sources(general.source):
        yield f"{GENERAL_TEXT}.source", GENERAL_SPLIT, source


def path_problems(
    data: DataSettings, general: GeneralTextSettings, made_by: Mapping[str, str]
) -> list[str]:
    """Return a message for each invalid path of a configuration. Nothing is opened.

    Args:
        data: Data settings.
        general: Settings of the general text.
        made_by: Commands that make the files below a path.
    """
    found = [
        (key, not_made(source.path, made_by) or path_problem(source.path))
        for key, _, source in all_sources(data, general)
    ]
    found.append(("data.template", irregular(Path(data.template).expanduser())))
    return [f"{key}={problem}" for key, problem in found if problem]


def describe_sources(data: DataSettings) -> str:
    """Return the origin of the training rows in one line for people."""
    return " + ".join(describe_source(source) for source in sources(data.train))


def describe_source(source: DataSource) -> str:
    """Return one source with its parts in one line for people."""
    parts = [source.name, source.split, source.revision and f"@{source.revision[:12]}"]
    named = ", ".join(part for part in parts if part)
    weight = "" if source.weight is None else f" × {source.weight:g}"
    return source.path + (f" [{named}]" if named else "") + weight


def _close_matches(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    if close := difflib.get_close_matches(path.name, names, n=3):
        return f". Did you mean {', '.join(str(path.parent / name) for name in close)}?"
    return "" if len(path.parts) > 1 else ". A hub data set is named org/name."


def _files(source: DataSource, key: str) -> list[RowFile]:
    """Return the files of a path or URL. A folder gives the files of one split."""
    remote = "://" in source.path
    path = source.path if remote else str(Path(source.path).expanduser())
    folder = file_kind(path)[0] is None if remote else Path(path).is_dir()
    _refuse_unused(source, folder)
    names = _folder_files(path.rstrip("/"), source, source.split or key) if folder else [path]
    kinds = sorted({str(file_kind(name)[0]) for name in names})
    if len(kinds) > 1 and not TEXT_KINDS.issuperset(kinds):
        raise DataError(
            f"{path}: holds files of several kinds ({', '.join(kinds)}). Name the files or folders "
            f"one by one: data.{key}=[a.jsonl,b.csv]"
        )
    return [RowFile(name, partial(_open, name)) for name in names]


def _refuse_unused(source: DataSource, folder: bool) -> None:
    """Raise if keys are given that a file or folder cannot honour."""
    given = [key for key in ("name", "split", "revision") if getattr(source, key) is not None]
    if unused := [key for key in given if key == "revision" or not folder]:
        raise DataError(
            f"{source.path}: {' and '.join(unused)} cannot be given for a "
            f"{'folder' if folder else 'file'}. A folder takes split and name. Only a hub data set "
            "takes a revision."
        )


def _open(path: str) -> BinaryIO:
    if "://" not in path:
        return Path(path).open("rb")  # to fsspec :: and * in a name mean more
    import fsspec

    # fsspec's remote files ignore the limit of readline. BufferedReader honours it.
    return io.BufferedReader(fsspec.open(path, "rb").open())


def _folder_files(folder: str, source: DataSource, split: str) -> list[str]:
    """Return the data files of one split of a folder, sorted."""
    if "://" in folder or not _MARKS.search(folder):
        return _split_files(folder, source, split)
    # in a pattern [v2] means one of two letters, so the folder is reached by another name
    with tempfile.TemporaryDirectory(prefix="sweeper-data-") as place:
        link = Path(place, "folder")
        link.symlink_to(Path(folder).resolve(), target_is_directory=True)
        found = _split_files(str(link), source, split)
        return [str(Path(folder, Path(name).relative_to(link))) for name in found]


def _split_files(folder: str, source: DataSource, split: str) -> list[str]:
    # datasets' own rules decide, so that a downloaded copy of a hub data set reads as on the hub.
    from datasets.data_files import DEFAULT_PATTERNS_ALL, resolve_pattern

    if "://" not in folder and (saved := _saved_by_datasets(Path(folder))):
        raise DataError(saved)
    splits = _folder_splits(folder, source)
    if list(splits.items()) == [(str(name), list(p)) for name, p in DEFAULT_PATTERNS_ALL.items()]:
        patterns = next(iter(splits.values()))  # no file is named after a split, so all are used
    elif split in splits:
        patterns = splits[split]
    else:
        raise DataError(
            f"{folder}: no split {split!r}. Its splits are {', '.join(splits)}. Choose one with "
            f"{{path: {source.path}, split: …}}"
        )
    found: set[str] = set()
    for pattern in patterns:
        try:
            found |= {*resolve_pattern(pattern, folder, allowed_extensions=[*READERS, ".gz"])}
        except FileNotFoundError:  # a split has many patterns, most of which match nothing
            continue
    found = {name for name in found if file_kind(name)[0] is not None}
    if not found:
        raise DataError(f"{folder}: contains no data files ({', '.join(READERS)})")
    if "://" in folder:
        return sorted(found)
    return sorted(str(Path(folder, os.path.relpath(name, folder))) for name in found)


def _saved_by_datasets(folder: Path) -> str | None:
    """Return why a folder that datasets' save_to_disk wrote is not read, or None for another one."""
    # Its state.json would otherwise be taken for rows. A file of that name alone may hold some.
    kinds = (("state.json", "dataset_info.json"), ("dataset_dict.json",))
    if not any(all((folder / name).is_file() for name in names) for names in kinds):
        return None
    return (
        f"{folder}: written by save_to_disk of datasets, whose .arrow files are not read. Write the "
        "rows as Parquet: datasets.load_from_disk(FOLDER), then to_parquet('train.parquet') of each "
        "split"
    )


def _folder_splits(folder: str, source: DataSource) -> dict[str, list[str]]:
    """Return the file patterns by split, from the YAML card of README.md or from the file names."""
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
            f"{folder}: {'needs a configuration' if name is None else f'no configuration {name!r}'}. "
            f"Its README.md names {known}. Choose one with {{path: {source.path}, name: …}}"
        )
    if name is not None and (files := configs[name].get("data_files")):
        return dict(sanitize_patterns(files))
    return {str(key): list(found) for key, found in get_data_patterns(folder).items()}


@contextmanager
def _reaching(path: str) -> Iterator[None]:
    """Turn errors of file systems and networks into DataError."""
    try:
        yield
    except SweeperError:
        raise
    except ImportError as error:
        raise DataError(
            f"{path}: needs a package that is not installed ({error}). "
            "For s3:// and gs://: pip install 'sweeper[remote]'"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found ({_first_line(error)})") from error
    except Exception as error:  # every remote file system raises its own exception types
        raise DataError(f"{path}: cannot be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _hub_rows(source: DataSource, split: str, drops: DropCounts) -> list[RawRow]:
    rows = []
    for number, values in enumerate(hub_data(source, split), start=1):
        where = f"{source.path}[{split}]:{number}"
        try:
            rows.append(RawRow(checked_values(values), where))
        except BadRow as bad:
            drops.drop(STAGE, bad.reason, where + bad.shown)
    return rows


def hub_data(source: DataSource, split: str) -> Any:
    """Return one split of a hub data set as a datasets.Dataset, from the cache without a network.

    Raises:
        DataError: The data set does not exist, is gated, is neither reachable nor cached, or has no such
            split or configuration.
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
            f"{source.path}: the hub cannot be reached, and the data set is not in the local cache "
            f"({_first_line(error)}). On a machine with network access, fill the cache with "
            f"`sweeper prefetch data.train={source.path}`, or use a local file or folder."
        ) from error
    except Exception as error:  # wrong names raise ValueError, broken files raise anything
        message = " ".join(str(error).split())[:300]
        raise DataError(
            f"{source.path} [{split}]: {message} (keys of a source: name, split, revision)"
        ) from error
    _check_revision(source, data)
    return data


def _not_on_hub(source: DataSource, error: Exception) -> str:
    page = f"https://huggingface.co/datasets/{source.path}"
    if "gated" in str(error):
        return (
            f"{source.path}: access is gated. Accept the terms at {page}, "
            "then run `hf auth login` or set HF_TOKEN."
        )
    if source.revision is not None and "Revision" in str(error):
        return f"{source.path}: no revision {source.revision!r}. See {page}/commits/main"
    return (
        f"{source.path}: not a local path, and not a public data set on the hub. Check the name, or run "
        "`hf auth login` if the data set is private."
    )


def _check_revision(source: DataSource, data: Any) -> None:
    """Raise if the loaded rows are not of the pinned commit."""
    # Without a network datasets takes the newest cached version and ignores the revision.
    pinned = source.revision
    cached = {Path(item["filename"]).parent.name for item in data.cache_files}
    commits = {name for name in cached if _COMMIT.fullmatch(name)}
    if pinned is not None and _COMMIT.fullmatch(pinned) and commits - {pinned}:
        raise DataError(
            f"{source.path}: the cache holds revision {', '.join(sorted(commits))}, not {pinned}. "
            "Run `sweeper prefetch` with this revision on a machine with network access."
        )
