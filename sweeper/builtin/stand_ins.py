"""Small models and data sets that stand in for the real ones where those cannot be fetched.

A stand-in has the architecture class, the module names, the kind of tokenizer and the on-disk format of
what it replaces, so that an experiment runs end to end through the same loaders. It proves that the
experiment works, never how good its result is: the models' weights are random.
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
"""`model.base_model=stand_in:qwen3`, `data.train=stand_in:finetome`."""

VERSION = 1
"""Raised when what is built changes, so that no older build is used again."""


def built(kind: str, name: str, build: Callable[[Path], None]) -> Path:
    """The folder of a stand-in, built once for each Python build (the text comes from its library).

    Two processes may build at once: whoever is first is kept, and both folders hold the same.
    """
    python = f"{platform.python_implementation()}-{platform.python_version()}"
    key = hashlib.sha256(f"{VERSION} {kind} {name} {python}".encode()).hexdigest()[:8]
    kept = Path(platformdirs.user_cache_dir("sweeper"))
    target = kept / "stand_ins" / f"{kind}-{name}-{key}"
    if not target.is_dir():
        partial = target.with_name(f".{target.name}.{uuid4().hex}")
        partial.mkdir(parents=True)
        build(partial)
        try:
            partial.replace(target)
        except OSError:  # another process was first
            shutil.rmtree(partial)
    return target
