"""Cache tokenized splits on disk under a fingerprint of everything that determines them.

A wrong hit would train a model on another model's tokens, so the fingerprint covers the text of every
example, the template, the tokenizer, the options and the version of this code. A file whose checksum is
wrong is built again.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import platformdirs
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sweeper.config.settings import DataSettings
from sweeper.data.encode import EncodedSplit
from sweeper.data.examples import DropCounts, Example
from sweeper.data.templates import choose_template
from sweeper.data.tokens import Tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = 3
"""Version of the encoding, to be raised if encode, tokens, templates or packing change their output."""
KEPT_BYTES = 4 * 2**30
"""Maximum size of the cache in bytes. Least recently used files are removed first."""
OPTIONS = (
    *(
        "template",
        "chat_template_kwargs",
        "control_tokens",
        "train_on",
        "max_length",
        "over_length",
    ),
    *("packing", "max_bad_fraction"),
)

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the cache's folder: below $XDG_CACHE_HOME/sweeper or ~/.cache/sweeper on Linux."""
    return Path(platformdirs.user_cache_dir("sweeper")) / "tokens"


def fingerprint(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    **options: int | str | None,
) -> str:
    """Return the sha256 over everything that determines the encoding of a split.

    Args:
        examples: Examples of the split.
        tokenizer: Tokenizer of the base model.
        settings: Data settings: the keys in OPTIONS.
        options: Other inputs of the encoding: the split's kind, the model's positions, block lengths.
    """
    # File names and times are not included: the content decides. datasets' own cache keys miss changes
    # in imported functions.
    formats = sorted({example.format for example in examples})
    templates = [choose_template(settings.template, name, tokenizer) for name in formats]
    sources = [template.source for template in templates]
    parts = {
        "version": CODE_VERSION,
        "templates": sources,
        "day": _day(sources),
        "tokenizer": tokenizer_digest(tokenizer),
        "settings": settings.model_dump(mode="json", include=set(OPTIONS)),
        "options": options,
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for line in _lines(examples):
        digest.update(line)
    return digest.hexdigest()


def _day(sources: Iterable[str]) -> str:
    """Return today's date if a template prints it, else an empty string."""
    printed = any("strftime_now" in source for source in sources)
    return datetime.date.today().isoformat() if printed else ""


def _lines(examples: Iterable[Example]) -> Iterable[bytes]:
    for example in examples:
        yield json.dumps([example.format, example.row.where, example.identity]).encode() + b"\n"


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of a tokenizer's vocabulary, rules and special tokens, but not of its path."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Truncation and padding are set by the last caller and do not change the ids of this module.
        rules = {name: rules[name] for name in rules if name not in ("truncation", "padding")}
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    parts = [
        rules,
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        tokenizer("a")["input_ids"],  # shows add_bos_token, which the rules may not contain
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def cached(key: str, build: Callable[[], EncodedSplit], folder: Path) -> EncodedSplit:
    """Return the split stored under a fingerprint, or build and store the split.

    A damaged file is built again. If the folder cannot be written, the split is built every time and a
    warning is logged.
    """
    path = folder / f"{key}.safetensors"
    if (stored := _read(path)) is not None:
        os.utime(path)  # marks the file as used now, so that it is evicted last
        return stored
    encoded = build()
    try:
        _write(path, encoded)
        _evict(folder)
    except OSError as error:
        log.warning("cannot write the token cache %s: %s", folder, error)
    return encoded


def _read(path: Path) -> EncodedSplit | None:
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="numpy") as file:
            about = json.loads(file.metadata()["about"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # Flipped bits in token ids would train without any error.
        if about["sha256"] != _checksum(arrays):
            raise ValueError("wrong checksum")
        return _decoded(arrays, about)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s) and will be built again", path, error)
        return None


def _write(path: Path, encoded: EncodedSplit) -> None:
    arrays = _arrays(encoded)
    about = json.dumps({**_about(encoded), "sha256": _checksum(arrays)})
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several workers may write the same split at once: each writes its own file and renames it.
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with partial.open("xb") as file:
            file.write(save(arrays, {"about": about}))
            file.flush()
            # without it a power cut after the rename could leave an empty file
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _evict(folder: Path) -> None:
    files = sorted(
        folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > KEPT_BYTES:
            path.unlink(missing_ok=True)


Arrays = dict[str, "NDArray[np.int32]"]


def _arrays(encoded: EncodedSplit) -> Arrays:
    """Return the rows as one array per column, with an array of the row lengths."""
    names = list(encoded.rows[0]) if encoded.rows else []
    columns = {
        f"column.{name}": _flat(token for row in encoded.rows for token in row[name])
        for name in names
    }
    sizes = _flat(len(row["input_ids"]) for row in encoded.rows)
    return {**columns, "sizes": sizes, "lengths": _flat(encoded.lengths)}


def _flat(values: Iterable[int]) -> NDArray[np.int32]:
    return np.fromiter(values, dtype=np.int32)


def _about(encoded: EncodedSplit) -> dict[str, Any]:
    return {
        "examples": encoded.examples,
        "max_length": encoded.max_length,
        "truncated": encoded.truncated,
        "counts": {stage: dict(counts) for stage, counts in encoded.drops.counts.items()},
        "places": [[*key, shown] for key, shown in encoded.drops.places.items()],
        "changed": dict(encoded.drops.changed),
    }


def _decoded(arrays: Arrays, about: Mapping[str, Any]) -> EncodedSplit:
    drops = DropCounts()
    for stage, counts in about["counts"].items():
        drops.counts[stage].update(counts)
    for stage, reason, shown in about["places"]:
        drops.places[stage, reason] = list(shown)
    drops.changed.update(about["changed"])
    return EncodedSplit(
        rows=_rows(arrays),
        examples=about["examples"],
        lengths=arrays["lengths"].tolist(),
        max_length=about["max_length"],
        truncated=about["truncated"],
        drops=drops,
    )


def _rows(arrays: Arrays) -> list[Tokens]:
    names = [name.removeprefix("column.") for name in arrays if name.startswith("column.")]
    ends = np.cumsum(arrays["sizes"])
    columns = {name: arrays[f"column.{name}"].tolist() for name in names}
    return [
        {name: columns[name][end - size : end] for name in names}
        for size, end in zip(arrays["sizes"].tolist(), ends.tolist(), strict=True)
    ]


def _checksum(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()
