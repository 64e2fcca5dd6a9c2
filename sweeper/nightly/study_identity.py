"""The identity of a study: everything that its result depends on, by part, found without a model.

Two nights with equal parts would get the same result. Parts with the prefix `code` only decide whether a
night is worth running. All others also decide whether a study may be continued.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from sweeper.builtin.embedded import BASE_DIR
from sweeper.config.settings import EMBEDDED, ModelSettings
from sweeper.core.errors import ModelError
from sweeper.core.references import referenced_tree
from sweeper.data.splits import load_splits
from sweeper.search.study import settings_as_json
from sweeper.search.study_plan import StudyPlan
from sweeper.tracking.provenance import provenance

TEMPLATE = ": template file"
"""Suffix of the part with the digest of a template that data.template names by its path."""
CODE = "code "
"""Prefix of the parts that hold versions of programs."""
HUB_SECONDS = 20.0
"""Seconds to wait for the hub's answer."""


def identity(plan: StudyPlan) -> dict[str, str]:
    """Return the parts of a study's identity by name.

    Raises:
        DataError: the data cannot be read.
        ModelError: the version of the base model cannot be determined.
    """
    parts: dict[str, str] = {"costs": ", ".join(plan.study.costs)}
    digests: dict[str, str] = {}
    for arm in plan.arms:
        data = arm.settings.data
        key = data.model_dump_json()
        # Arms usually share their data, and reading them takes long.
        digests[key] = digests.get(key) or load_splits(data).digest
        parts[f"{arm.name}: data digest"] = digests[key]
        parts |= _template_part(arm.name, Path(data.template).expanduser())
        parts[f"{arm.name}: adopted run"] = arm.run_id or "none"
        parts[f"{arm.name}: base model"] = _base_version(arm.settings.model)
        parts |= {f"{arm.name}: space {key}": str(domain) for key, domain in arm.space.items()}
        parts |= {f"{arm.name}: {key}": text for key, text in settings_as_json(arm).items()}
    found: dict[str, str] = referenced_tree(parts | _code(plan))
    return found


def _template_part(arm: str, path: Path) -> dict[str, str]:
    """Return the part of a template file, or nothing for a template that is known by its name."""
    # Without it the study of a changed template would refuse to be continued, every night.
    if not path.is_file():
        return {}
    return {f"{arm}{TEMPLATE}": hashlib.sha256(path.read_bytes()).hexdigest()}


def with_templates(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """Return a stored identity, with today's template files where an earlier version stored none."""
    return {**{name: now[name] for name in now if name.endswith(TEMPLATE)}, **before}


def question_of(parts: dict[str, str]) -> dict[str, str]:
    """Return the parts that a continued study must share, which are all but program versions."""
    return {name: value for name, value in parts.items() if not name.startswith(CODE)}


def _code(plan: StudyPlan) -> dict[str, str]:
    facts = provenance(plan.command)
    names = [name for name in facts if name.startswith(("package.", "git."))]
    return {f"{CODE}{name}": facts[name] for name in ("sweeper", "python", *names)}


def _base_version(model: ModelSettings) -> str:
    """Return the hub's commit of the base, or the sizes and times of a local folder's files."""
    # Hashing 16 GB of weights every night would be wasteful.
    folder = BASE_DIR if model.base_model == EMBEDDED else Path(model.base_model)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        states = [(path.name, path.stat()) for path in files]
        return "; ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in states)
    if ":" in model.base_model:
        return model.base_model  # a stand-in, built by this program's code
    return f"{model.base_model}@{_commit(model)}"


def _commit(model: ModelSettings) -> str:
    try:
        info = HfApi().model_info(model.base_model, revision=model.revision, timeout=HUB_SECONDS)
        if info.sha is not None:
            return info.sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        pass  # without a network, the cached version is the one that would be trained
    cached = try_to_load_from_cache(model.base_model, "config.json", revision=model.revision)
    if not isinstance(cached, str):
        raise ModelError(
            f"model.base_model={model.base_model!r}: neither the hub nor the local cache has "
            "it. Check the name and the network, or run: sweeper prefetch"
        )
    return Path(cached).parent.name
