"""Limit what a stranger's configuration file may set: no code, no Hydra settings, no places outside.

Works on composed configurations. `compared` is what the same command line gives if every file that is
not trusted is taken for empty, so a value that differs was set by such a file, whatever its package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from sweeper.config.section import flatten

OUTPUT_DIR, RUN_DIR, MODE = "output_dir", "hydra.run.dir", "hydra.mode"
STORAGE, TRACKING = "hydra.sweeper.storage", "tracking.uri"
MODULES, CLUSTER = "evaluation.metric_modules", "workers.address"
PLACES = (OUTPUT_DIR, RUN_DIR, STORAGE, TRACKING, MODULES, CLUSTER, MODE)
"""Settings that name a place that is written to, a server that is sent to, or code that is imported."""

FREE_OF_HYDRA = ("hydra.sweeper", "hydra.runtime", "hydra.overrides")
"""Parts of `hydra` that the study's own validation, or Hydra itself, decides on."""
OWN_OF_HYDRA = frozenset(
    {RUN_DIR, MODE, "hydra.searchpath"}
    | {f"hydra.job.{key}" for key in ("name", "override_dirname", "config_name", "id", "num")}
)
"""Further keys of `hydra` that a command line may set, or that Hydra derives from it."""
_SET_BY_USERS = f"hydra.sweeper, {RUN_DIR} and hydra.searchpath"
_STORES = (
    "a file may name only null, a reference ${oc.env:NAME}, or sqlite below the working folder"
)
_REFERENCE = re.compile(r"\$\{oc\.env:\w+(,null)?\}")
_LOCAL_DATABASE = re.compile(r"sqlite:///(?P<path>[^/?][^?]*)")


def hydra_problems(found: Mapping[str, Any], default: Mapping[str, Any]) -> list[str]:
    """Return one problem for each key of `hydra` that no configuration may set.

    Args:
        found: the composed `hydra` node, unresolved.
        default: the node of the packaged configuration alone.
    """
    mine, theirs = (flatten({"hydra": node}) for node in (found, default))
    changed = [key for key in mine if not _is_own(key) and mine[key] != theirs.get(key)]
    # the first of each part, because a choice of logging sets a dozen
    first = {key.split(".")[1]: key for key in reversed(changed)}
    return [
        # without the value, which may be a variable of the user's that env_copy names
        f"{key}: of hydra a configuration may set {_SET_BY_USERS} only. Remove it"
        for key in first.values()
    ]


def place_problems(found: Mapping[str, Any], compared: Mapping[str, Any] | None) -> list[str]:
    """Return one problem for each place or module that a file sets without being trusted.

    Args:
        found: the composed configuration, unresolved.
        compared: what trusted files and the command line give. None if they give nothing.
    """
    return [
        f"{key}={value!r}: {_rule(key)}. Give it on the command line, or name the file that sets it "
        "as trusted: SWEEPER_TRUST=FILE"
        for key in PLACES
        if (value := setting(found, key)) != setting(compared or {}, key)
        and not _is_harmless(key, value)
    ]


def differing_places(found: Mapping[str, Any], study: Mapping[str, Any]) -> list[str]:
    """Return one problem for each place or module that differs from the study's own."""
    return [
        f"{key}={value!r}: {_rule(key)}, and belongs to the study as a whole. Remove it here"
        for key in PLACES
        if (value := setting(found, key)) != setting(study, key)
    ]


def decides_place(key: str) -> bool:
    """Return True if an override of this key can set a place or a module."""
    return any(
        f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.") for name in PLACES
    )


def _is_own(key: str) -> bool:
    below = any(f"{key}.".startswith(f"{part}.") for part in FREE_OF_HYDRA)
    return below or key in OWN_OF_HYDRA


def _rule(key: str) -> str:
    return {
        MODULES: "a file must not name code to import",
        CLUSTER: "a file must not name a cluster to connect to",
        MODE: "a study is chosen with -m",
        **dict.fromkeys((TRACKING, STORAGE), _STORES),
    }.get(key, "a file may name only a folder below the working folder")


def _is_harmless(key: str, value: object) -> bool:
    """Return True for a place that any file may name: nothing, or a path below the working folder."""
    if key in (STORAGE, TRACKING):
        text = str(value)
        database = _LOCAL_DATABASE.fullmatch(text)
        local = database is not None and _is_below(database["path"])
        return value is None or _REFERENCE.fullmatch(text) is not None or local
    if key in (OUTPUT_DIR, RUN_DIR):
        return isinstance(value, str) and _is_below(value)
    return value in (None, [], ())


def _is_below(text: str) -> bool:
    """Return True for a relative path without a way up, an interpolation or an encoded character."""
    path = PurePath(text)
    plain = not any(mark in text for mark in ("${", "%", "\0", "~", "\\"))
    return plain and not path.is_absolute() and ".." not in path.parts


def setting(node: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key, or None without one."""
    found: Any = node
    for part in key.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(part)
    return found
