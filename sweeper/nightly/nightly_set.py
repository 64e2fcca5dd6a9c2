"""A nightly set: which experiments run at night, in which order, how long, and what becomes of them.

Defaults live in conf/nightly/default.yaml; other sets build on it with `defaults: [default, _self_]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import time, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sweeper.config import compose
from sweeper.config.settings import Positive, SettingsSection, StudyName, parse_duration, validate
from sweeper.config.space import word
from sweeper.core.errors import ConfigError
from sweeper.core.paths import NightsFolder
from sweeper.nightly.night_dates import LONGEST_WINDOW, NightTimes
from sweeper.search.study_plan import StudyPlan, studies

SET_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}"
Policy = Literal["continue", "fresh", "skip_unchanged"]
Duration = Annotated[Annotated[float, Field(gt=0)], BeforeValidator(parse_duration)]


class TimeLimits(SettingsSection):
    """Time to spend; null is no limit of its own."""

    wall_clock: Duration | None = None
    device_hours: Annotated[float, Field(gt=0)] | None = None


class SetEntry(SettingsSection):
    """One experiment of a set, as one night runs it."""

    experiment: str
    name: StudyName | None = None
    """Tells apart two entries of one experiment; null = the experiment's name."""
    overrides: list[str] = Field(default_factory=list)
    policy: Policy
    n_trials: Positive | None = None
    """Of a study's first night; null = as the experiment says."""
    extend_by: Positive | None = None
    """Trials that each further night of a continued study adds."""
    budget: TimeLimits = TimeLimits()
    gate: str | None = None
    """Source of the split that champions are decided on; in no other split. null = none is decided."""

    @model_validator(mode="after")
    def _extended_if_continued(self) -> SetEntry:
        if (self.policy == "continue") != (self.extend_by is not None):
            raise ValueError(
                f"policy={self.policy} with extend_by={self.extend_by}: a continued study needs to "
                "know by how many trials a night extends it (extend_by: 6); other policies take none"
            )
        return self

    @property
    def label(self) -> str:
        """The entry's name, and its model's in the registry."""
        return self.name or self.experiment


class ChampionRules(SettingsSection):
    """When the best model of a night becomes the champion."""

    margin: Annotated[float, Field(ge=0)] | None
    """Nats per token by which the whole interval must lie below the champion; null = twice the
    spread between seeds where it is known."""
    max_size_mib: Annotated[float, Field(gt=0)] | None
    max_forgetting: Annotated[float, Field(ge=0)] | None
    """Nats that the loss on general text may rise above the untuned base."""


class RetentionPolicy(SettingsSection):
    """What stays on disk after a night."""

    keep_adapters: Annotated[int, Field(ge=0)] | None
    """Best adapters of each of the set's studies; champions stay anyway. null = nothing is deleted."""
    mlflow_deleted_after: Duration | None
    """How long runs that were deleted in MLflow can still be restored; null = for ever."""
    dry_run: bool


class NightlySet(SettingsSection):
    """One file of conf/nightly/."""

    experiments: Annotated[list[SetEntry], Field(min_length=1)]
    budget: TimeLimits
    time_zone: str
    begins: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]
    window: Duration
    overlap: Literal["skip", "queue", "replace"]
    regression: Annotated[float, Field(ge=0)]
    """By how much of the objective's metric tonight's best may be worse than the last comparable one."""
    champion: ChampionRules
    retention: RetentionPolicy
    notify: list[str | None]
    """Apprise URLs, each by reference."""
    output_dir: str = Field(min_length=1)

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError):
            raise ValueError(
                f"{value!r} is no time zone; give a name such as UTC or Europe/Berlin"
            ) from None
        return value

    @field_validator("window")
    @classmethod
    def _nights_apart(cls, value: float) -> float:
        if timedelta(seconds=value) > LONGEST_WINDOW:
            hours = LONGEST_WINDOW / timedelta(hours=1)
            raise ValueError(
                f"{value / 3600:g}h would reach into the next night; at most {hours:g}h"
            )
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> NightlySet:
        labels = [entry.label for entry in self.experiments]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"experiments: {', '.join(twice)} occurs twice; give each a name")
        return self

    @property
    def rhythm(self) -> NightTimes:
        """When its nights are."""
        begins, window = time.fromisoformat(self.begins), timedelta(seconds=self.window)
        return NightTimes(ZoneInfo(self.time_zone), begins, window)

    @property
    def folder(self) -> NightsFolder:
        """Where its nights are kept."""
        return NightsFolder.under(Path(self.output_dir))

    def overrides_of(self, entry: SetEntry) -> list[str]:
        """What is given to every study of an entry, whichever night it is."""
        added = [f"+experiment={entry.experiment}", f"output_dir={word(self.output_dir)}"]
        return compose.complete_overrides([*added, *entry.overrides], Path.cwd())


@dataclass(frozen=True)
class LoadedSet:
    """A valid set, and the study that each of its entries asks for before any night has its say."""

    name: str
    settings: NightlySet
    plans: Mapping[str, StudyPlan]

    def plan(self, entry: SetEntry, study_name: str | None = None) -> StudyPlan:
        """An entry's study, under another name."""
        plan = self.plans[entry.label]
        if study_name is None:
            return plan
        study = plan.study.model_copy(update={"study_name": study_name})
        return replace(plan, study=study)


def load_set(name: str, overrides: Sequence[str] = ()) -> LoadedSet:
    """A set by its name, from the user's conf/nightly/ or the packaged one, with overrides.

    Args:
        name: of the file, without .yaml.
        overrides: Hydra's, with the group in front: `nightly.budget.wall_clock=2h`.

    Raises:
        ConfigError: everything that is wrong with the set or with any of its experiments.
    """
    if not re.fullmatch(SET_NAME, name):
        raise ConfigError([f"{name!r} is no name of a set; sets are files conf/nightly/NAME.yaml"])
    given = compose.complete_overrides(list(overrides), Path.cwd())
    values, written = compose.compose_group("nightly", name, given)
    problems = _literal_urls(written)
    try:
        found = validate(NightlySet, values, f"nightly/{name}")
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    plans: dict[str, StudyPlan] = {}
    for entry in found.experiments:
        try:
            plans[entry.label] = plan_of(found, entry)
        except ConfigError as error:
            problems += [f"nightly/{name}, {entry.label}: {words}" for words in error.problems]
            continue
        problems += _unmeasurable_limit(found, entry, plans[entry.label])
    if problems:
        raise ConfigError(problems)
    return LoadedSet(name, found, plans)


def _unmeasurable_limit(nightly: NightlySet, entry: SetEntry, plan: StudyPlan) -> list[str]:
    """A limit that no night could check would keep every champion from moving."""
    limit = nightly.champion.max_forgetting
    named = plan.settings.evaluation.general_text.source is not None
    if entry.gate is None or limit is None or named:
        return []
    return [
        f"{entry.label}: champion.max_forgetting={limit:g} needs general text to measure it on; name "
        "one in its overrides (evaluation.general_text.source=FILE), or set "
        "nightly.champion.max_forgetting=null"
    ]


def plan_of(nightly: NightlySet, entry: SetEntry, overrides: Sequence[str] = ()) -> StudyPlan:
    """The study that an entry asks for.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    plans = studies([*nightly.overrides_of(entry), *overrides])
    if len(plans) != 1:
        raise ConfigError([f"experiment={entry.experiment}: name one experiment an entry"])
    return plans[0]


def _literal_urls(written: Mapping[str, Any]) -> list[str]:
    """Addresses carry tokens: they are named, never written."""
    given = written.get("notify")
    urls = given if isinstance(given, list) else []
    return [
        f"notify[{index}]: is written out, and such URLs hold secrets; put it into an environment "
        "variable and write ${oc.env:NAME}"
        for index, url in enumerate(urls)
        if url is not None and not str(url).startswith("${oc.env:")
    ]
