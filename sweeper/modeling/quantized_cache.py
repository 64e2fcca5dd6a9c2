"""Quantized bases on disk: a base is quantized once a machine, not by every worker of every study.

An entry is what transformers' save_pretrained makes of a quantized model (safetensors only), under a
key of everything that decides its bits, with a manifest of its files. It appears whole or not at all,
and one that is not what its manifest says is made again. Knows nothing of adapters and training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import platformdirs
from filelock import FileLock, Timeout

from sweeper.core.errors import ArtifactError
from sweeper.core.manifest import verify_manifest, write_manifest
from sweeper.core.paths import size_mib

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST_BYTES = 64 * 2**20
"""Of the weight files. Below it nothing is gained: the embedded base loads as fast from its own files
(benchmarks/warm_base.json)."""
KEPT_BYTES = 32 * 2**30
"""The cache's size; what was used longest ago goes first."""
LOCK_SECONDS = 1800
"""How long a worker waits for another one that quantizes the same base."""
FORMAT = 1
"""Raised by whoever changes what is stored for the same key."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationKey:
    """Everything that decides the bits of a quantized base."""

    base: str
    """The digest of the weight files."""
    quantization: str
    """Its settings as JSON, after `auto` was decided."""
    dtype: str
    """Of the weights that are not quantized."""
    device: str
    """cpu or cuda: bitsandbytes quantizes with other kernels there."""
    format: int = FORMAT
    bitsandbytes: str = version("bitsandbytes")
    transformers: str = version("transformers")

    @property
    def name(self) -> str:
        """Of the entry's folder."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


def cache_folder() -> Path:
    """Where the platform keeps caches: $XDG_CACHE_HOME/sweeper or ~/.cache/sweeper on Linux."""
    return Path(platformdirs.user_cache_dir("sweeper")) / "quantized"


def quantized_once(
    key: QuantizationKey,
    folder: Path,
    quantize: Callable[[], PreTrainedModel],
    load: Callable[[Path], PreTrainedModel],
) -> PreTrainedModel:
    """The base under a key, loaded from its entry, or quantized and stored now.

    Of several workers that need the same base one quantizes, and the others wait for it. Where the
    cache cannot be written the base is quantized each time, with a warning.

    Args:
        key: of the base.
        folder: of the cache.
        quantize: makes the base from its own files.
        load: reads it from an entry.
    """
    entry = folder / key.name
    with _turn(folder, key) as usable:
        if usable and is_whole(entry):
            os.utime(entry)  # used now: the last to be evicted
            return load(entry)
        model = quantize()
        if usable:
            _store(model, entry)
            _evict(folder, entry)
        return model


@contextmanager
def _turn(folder: Path, key: QuantizationKey) -> Iterator[bool]:
    """Hold a key for this process; yields whether the cache can be used."""
    lock = FileLock(_lock(folder / key.name), timeout=LOCK_SECONDS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # Timeout is an OSError
        log.warning("the cache of quantized bases %s cannot be used: %s", folder, error)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_whole(entry: Path) -> bool:
    """Whether an entry is what was stored; one that is not is removed."""
    if not entry.is_dir():
        return False
    try:
        verify_manifest(entry)
    except ArtifactError as error:
        log.warning("%s, and is made again", error)
        shutil.rmtree(entry)
        return False
    return True


def _store(model: PreTrainedModel, entry: Path) -> None:
    """Write an entry beside its place, then move it there."""
    partial = entry.with_name(f".{entry.name}.{uuid4().hex}")
    try:
        model.save_pretrained(partial)
        write_manifest(partial)
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.rename(entry)
    except (OSError, ValueError) as error:  # disk full; a configuration that cannot be saved again
        log.warning("this quantized base is not cached: %s", error)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _evict(folder: Path, newest: Path) -> None:
    """Entries used longest ago, while the cache is too large; what a killed worker left half-written."""
    for partial in folder.glob(f".{newest.name}.*/"):
        shutil.rmtree(partial, ignore_errors=True)  # only who holds the lock writes here
    total = 0.0
    for entry in sorted(_entries(folder), key=lambda path: path.stat().st_mtime, reverse=True):
        total += size_mib(entry) * 2**20
        if total > KEPT_BYTES and entry != newest:
            _remove(entry)


def forget(folder: Path, *, dry_run: bool = False) -> dict[Path, float]:
    """Empty the cache, but for an entry that a worker is reading or writing.

    Returns:
        What was (or would be) removed, with its size in MiB.
    """
    sizes = {entry: size_mib(entry) for entry in _entries(folder)}
    return {entry: mib for entry, mib in sizes.items() if dry_run or _remove(entry)}


def _remove(entry: Path) -> bool:
    try:
        with FileLock(_lock(entry), timeout=0):
            shutil.rmtree(entry, ignore_errors=True)
    except Timeout:
        return False
    return True


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*/") if not path.name.startswith(".")]


def _lock(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.lock")
