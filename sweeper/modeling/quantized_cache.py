"""Cache quantized bases on disk, so each base is quantized once per machine, not once per worker.

An entry is a quantized model written by transformers' save_pretrained (safetensors only) with a
manifest, under a key of everything that affects its bits. Entries are written atomically, and damaged
ones are made again. Independent of adapters and training.
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
from sweeper.modeling.expert_weights import hidden_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST_BYTES = 64 * 2**20
"""Bytes of weight files below which a base is not cached, because its own files load as fast
(benchmarks/warm_base.json)."""
KEPT_BYTES = 32 * 2**30
"""Maximum bytes of the cache. The least recently used entries are removed first."""
LOCK_SECONDS = 1800
"""Seconds that a worker waits for another one that quantizes the same base."""
FORMAT = 2
"""Version of the stored format. Increment it with every change of what is stored for the same key."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationKey:
    """Everything that affects the bits of a quantized base."""

    base: str
    """Digest of the weight files."""
    config: str
    """Digest of the configuration, which an entry contains as well."""
    quantization: str
    """Quantization settings as JSON, without `auto`."""
    dtype: str
    """Dtype of the weights that are not quantized."""
    device: str
    """cpu or cuda, because bitsandbytes has different kernels for them."""
    format: int = FORMAT
    bitsandbytes: str = version("bitsandbytes")
    transformers: str = version("transformers")

    @property
    def name(self) -> str:
        """Name of the entry's folder."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


def cache_folder() -> Path:
    """Return the cache's folder: in $XDG_CACHE_HOME/sweeper or ~/.cache/sweeper on Linux."""
    return Path(platformdirs.user_cache_dir("sweeper")) / "quantized"


def quantized_once(
    key: QuantizationKey,
    folder: Path,
    quantize: Callable[[], PreTrainedModel],
    load: Callable[[Path], PreTrainedModel],
) -> PreTrainedModel:
    """Load a quantized base from its entry, or quantize and store it.

    If several workers need the same base, one of them quantizes it and the others wait. If the cache
    cannot be written, the base is quantized each time, with a warning.

    Args:
        key: key of the base.
        folder: folder of the cache.
        quantize: returns the base, quantized from its own files.
        load: returns the base, read from an entry.
    """
    entry = folder / key.name
    with _locked(folder, key) as usable:
        if usable and is_whole(entry):
            os.utime(entry)  # marks the entry as just used, so it is evicted last
            return load(entry)
        model = quantize()
        if usable:
            _store(model, entry)
            _evict(folder, entry)
        return model


@contextmanager
def _locked(folder: Path, key: QuantizationKey) -> Iterator[bool]:
    """Hold the lock of a key. Yield True if the cache can be used."""
    lock = FileLock(_lock(folder / key.name), timeout=LOCK_SECONDS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # Timeout is an OSError
        log.warning("the cache of quantized bases in %s cannot be used: %s", folder, error)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_whole(entry: Path) -> bool:
    """Return True if an entry exists and is undamaged. Remove a damaged one."""
    if not entry.is_dir():
        return False
    try:
        verify_manifest(entry)
    except ArtifactError as error:
        log.warning("%s. The base will be quantized again", error)
        shutil.rmtree(entry)
        return False
    return True


def _store(model: PreTrainedModel, entry: Path) -> None:
    """Write an entry into a temporary folder, then rename the folder."""
    if hidden_weights(model):
        return  # transformers cannot read packed experts back
    partial = entry.with_name(f".{entry.name}.{uuid4().hex}")
    try:
        model.save_pretrained(partial)
        write_manifest(partial)
        # Otherwise a power cut after the rename could leave an entry with empty files
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.rename(entry)
    except (OSError, ValueError) as error:  # a full disk, or a configuration that cannot be saved
        log.warning("this quantized base was not cached: %s", error)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _evict(folder: Path, newest: Path) -> None:
    """Remove half-written folders of killed workers, and old entries while the cache is too large."""
    for partial in folder.glob(f".{newest.name}.*/"):
        # Only the holder of the lock, this process, writes folders of this name
        shutil.rmtree(partial, ignore_errors=True)
    total = 0.0
    for entry in sorted(_entries(folder), key=lambda path: path.stat().st_mtime, reverse=True):
        total += size_mib(entry) * 2**20
        if total > KEPT_BYTES and entry != newest:
            _remove(entry)


def forget(folder: Path, *, dry_run: bool = False) -> dict[Path, float]:
    """Empty the cache, except entries that a worker is reading or writing.

    Returns:
        The removed entries with their sizes in MiB. With `dry_run`, the entries that would be removed.
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
