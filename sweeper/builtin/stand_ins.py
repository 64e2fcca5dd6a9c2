"""Small stand-ins for models and data sets that cannot be downloaded.

A stand-in has the architecture, module names, kind of tokenizer and on-disk format of the original, so
that an experiment runs end to end through the same loaders. A run with stand-ins shows that the
experiment works, but not how good its result is, because the models' weights are random.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import platformdirs

PREFIX = "stand_in:"
"""Prefix of stand-ins' names: `model.base_model=stand_in:qwen3`, `data.train=stand_in:finetome`."""

VERSION = 1
"""Version of the stand-ins' contents, to be raised if they change, so that old builds are not used."""


def stand_in_folder(kind: str, name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of a stand-in, and build the stand-in if it is missing.

    Args:
        kind: `model` or `data`.
        name: Name of the stand-in without prefix.
        build: Function that fills a new, empty folder.
    """
    # The text comes from the running Python's library, so each Python build has its own stand-ins.
    python = f"{platform.python_implementation()}-{platform.python_version()}"
    key = hashlib.sha256(f"{VERSION} {kind} {name} {python}".encode()).hexdigest()[:8]
    kept = Path(platformdirs.user_cache_dir("sweeper"))
    target = kept / "stand_ins" / f"{kind}-{name}-{key}"
    if not target.is_dir():
        # Built under another name and renamed, so that a killed build leaves no half-filled folder.
        partial = target.with_name(f".{target.name}.{uuid4().hex}")
        partial.mkdir(parents=True)
        build(partial)
        try:
            partial.replace(target)
        except OSError:  # another process was faster, and its folder has the same content
            shutil.rmtree(partial)
    return target
