"""What the answer of a study depends on, part by part, found out without loading a model.

Two nights with the same parts would get the same answer. `code` parts decide only whether a night is
worth running; all others decide whether a study may be continued.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from sweeper.builtin.embedded import BASE_DIR
from sweeper.config.settings import EMBEDDED, ModelSettings
from sweeper.core.errors import ModelError
from sweeper.data.splits import load_splits
from sweeper.search.study import settings_as_json
from sweeper.search.study_plan import StudyPlan
from sweeper.tracking.provenance import provenance

CODE = "code "
"""Prefix of the parts that name versions of programs."""
HUB_SECONDS = 20.0


def identity(plan: StudyPlan) -> dict[str, str]:
    """The parts of a study's identity.

    Raises:
        DataError: the data cannot be read.
        ModelError: nobody knows which version of the base model this is.
    """
    parts: dict[str, str] = {"costs": ", ".join(plan.study.costs)}
    digests: dict[str, str] = {}
    for arm in plan.arms:
        data = arm.settings.data
        key = data.model_dump_json()
        digests[key] = digests.get(key) or load_splits(data).digest
        parts[f"{arm.name}: data digest"] = digests[key]
        parts[f"{arm.name}: adopted run"] = arm.run_id or "none"
        parts[f"{arm.name}: base model"] = _base_version(arm.settings.model)
        parts |= {f"{arm.name}: space {key}": str(domain) for key, domain in arm.space.items()}
        parts |= {f"{arm.name}: {key}": text for key, text in settings_as_json(arm).items()}
    return parts | _code(plan)


def question_of(parts: dict[str, str]) -> dict[str, str]:
    """The parts that a continued study must share: all but the versions of programs."""
    return {name: value for name, value in parts.items() if not name.startswith(CODE)}


def _code(plan: StudyPlan) -> dict[str, str]:
    facts = provenance(plan.command)
    names = [name for name in facts if name.startswith(("package.", "git."))]
    return {f"{CODE}{name}": facts[name] for name in ("sweeper", "python", *names)}


def _base_version(model: ModelSettings) -> str:
    """The weights by name and state: a hub's commit, or the sizes and times of a folder's files."""
    folder = BASE_DIR if model.base_model == EMBEDDED else Path(model.base_model)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        states = [(path.name, path.stat()) for path in files]
        return "; ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in states)
    if ":" in model.base_model:
        return model.base_model  # a stand-in, made by this program's own code
    return f"{model.base_model}@{_commit(model)}"


def _commit(model: ModelSettings) -> str:
    try:
        info = HfApi().model_info(model.base_model, revision=model.revision, timeout=HUB_SECONDS)
        if info.sha is not None:
            return info.sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        pass  # without a network the cache knows what would be trained
    cached = try_to_load_from_cache(model.base_model, "config.json", revision=model.revision)
    if not isinstance(cached, str):
        raise ModelError(
            f"model.base_model={model.base_model!r}: neither the hub nor its cache says which "
            "version this is; check the name and the network, or run: sweeper prefetch"
        )
    return Path(cached).parent.name
