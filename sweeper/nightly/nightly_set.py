"""A nightly set: its experiments in order, their time limits, and the rules for champions and disk.

Defaults live in conf/nightly/default.yaml. Other sets build on it with `defaults: [default, _self_]`.
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

# `sweeper nightly status` is a command of its own
SET_NAME = r"(?!status$)[A-Za-z0-9][A-Za-z0-9_-]{0,49}"
Policy = Literal["continue", "fresh", "skip_unchanged"]
Duration = Annotated[Annotated[float, Field(gt=0)], BeforeValidator(parse_duration)]


class TimeLimits(SettingsSection):
    """Time limits of a night or of one entry. null is no limit."""

    wall_clock: Duration | None = None
    device_hours: Annotated[float, Field(gt=0)] | None = None


class SetEntry(SettingsSection):
    """One experiment of a set."""

    experiment: str
    name: StudyName | None = None
    """Name of the entry, needed if an experiment has two entries. null = the experiment's name."""
    overrides: list[str] = Field(default_factory=list)
    policy: Policy
    n_trials: Positive | None = None
    """Trials of a study's first night. null = the experiment's own number."""
    extend_by: Positive | None = None
    """Trials that each further night of a continued study adds."""
    budget: TimeLimits = TimeLimits()
    gate: str | None = None
    """Source of the gate split, which decides on champions and shares no row with other splits."""

    @model_validator(mode="after")
    def _extended_if_continued(self) -> SetEntry:
        if (self.policy == "continue") != (self.extend_by is not None):
            raise ValueError(
                f"policy={self.policy} with extend_by={self.extend_by}: policy=continue needs the "
                "number of trials that each night adds (extend_by: 6). Other policies do not take it."
            )
        return self

    @property
    def label(self) -> str:
        """Name of the entry and of its model in the registry."""
        return self.name or self.experiment


class ChampionRules(SettingsSection):
    """Conditions under which a night's best model becomes the champion."""

    margin: Annotated[float, Field(ge=0)] | None
    """Nats per token by which a challenger must be better than the champion. null = one standard
    deviation between the seeds of its finalists."""
    max_size_mib: Annotated[float, Field(gt=0)] | None
    """Largest size of the adapter in MiB. null = no limit."""
    max_forgetting: Annotated[float, Field(ge=0)] | None
    """Nats by which the loss on general text may exceed the untuned base's. null = no limit."""


class RetentionPolicy(SettingsSection):
    """The rules for the disk after a night."""

    keep_adapters: Annotated[int, Field(ge=0)] | None
    """Number of best adapters kept per study, in addition to champions. null = nothing is deleted."""
    mlflow_deleted_after: Duration | None
    """Seconds for which runs that were deleted in MLflow can be restored. null = for ever."""
    dry_run: bool
    """True lists the deletions in the digest without deleting."""


class NightlySet(SettingsSection):
    """The settings in one file of conf/nightly/."""

    experiments: Annotated[list[SetEntry], Field(min_length=1)]
    budget: TimeLimits
    time_zone: str
    begins: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]
    window: Duration
    overlap: Literal["skip", "queue", "replace"]
    regression: Annotated[float, Field(ge=0)]
    """Amount by which tonight's best value may be worse than the last comparable night's."""
    champion: ChampionRules
    retention: RetentionPolicy
    notify: list[str | None]
    """Apprise URLs, each as a reference such as ${oc.env:NAME}."""
    output_dir: str = Field(min_length=1)

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError):
            raise ValueError(
                f"{value!r} is no time zone. Use a name such as UTC or Europe/Berlin"
            ) from None
        return value

    @field_validator("window")
    @classmethod
    def _nights_apart(cls, value: float) -> float:
        # Two nights at once would compete for the same devices and studies.
        if timedelta(seconds=value) > LONGEST_WINDOW:
            hours = LONGEST_WINDOW / timedelta(hours=1)
            raise ValueError(
                f"{value / 3600:g}h would reach into the next night. Use at most {hours:g}h"
            )
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> NightlySet:
        labels = [entry.label for entry in self.experiments]
        # Names are keys of night.json and of the model registry.
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(
                f"experiments: more than one entry is called {', '.join(twice)}. Give each a name"
            )
        return self

    @property
    def rhythm(self) -> NightTimes:
        """Beginning and window of the set's nights."""
        begins, window = time.fromisoformat(self.begins), timedelta(seconds=self.window)
        return NightTimes(ZoneInfo(self.time_zone), begins, window)

    @property
    def folder(self) -> NightsFolder:
        """Folder of the records of nights."""
        return NightsFolder.under(Path(self.output_dir))

    def overrides_of(self, entry: SetEntry) -> list[str]:
        """Return the Hydra overrides of every study of an entry, on any night."""
        added = [f"+experiment={entry.experiment}", f"output_dir={word(self.output_dir)}"]
        return compose.complete_overrides([*added, *entry.overrides], Path.cwd())


@dataclass(frozen=True)
class LoadedSet:
    """A valid set with the plan of each entry's study, before a night's overrides are applied."""

    name: str
    settings: NightlySet
    plans: Mapping[str, StudyPlan]

    def plan(self, entry: SetEntry, study_name: str | None = None) -> StudyPlan:
        """Return the plan of an entry's study, under another name if one is given."""
        plan = self.plans[entry.label]
        if study_name is None:
            return plan
        study = plan.study.model_copy(update={"study_name": study_name})
        return replace(plan, study=study)


def load_set(name: str, overrides: Sequence[str] = ()) -> LoadedSet:
    """Load a set from the user's conf/nightly/ or from the packaged one, with overrides.

    Args:
        name: name of the file, without .yaml.
        overrides: Hydra overrides that begin with the group: `nightly.budget.wall_clock=2h`.

    Raises:
        ConfigError: all errors of the set and of its experiments.
    """
    if not re.fullmatch(SET_NAME, name):
        raise ConfigError(
            [
                f"{name!r} is no valid name of a set. Sets are files conf/nightly/NAME.yaml, and status "
                "is the verb that shows them."
            ]
        )
    # A user's conf/nightly/ in the current folder is searched as well.
    given = compose.complete_overrides(list(overrides), Path.cwd())
    # `written` holds unresolved values, in which a reference still looks like one.
    values, written = compose.compose_group("nightly", name, given)
    problems = _literal_urls(written)
    try:
        found = validate(NightlySet, values, f"nightly/{name}")
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    plans: dict[str, StudyPlan] = {}
    for entry in found.experiments:
        try:
            # All experiments are checked now, so that an error shows in the evening, not at 3 a.m.
            plans[entry.label] = plan_of(found, entry)
        except ConfigError as error:
            problems += [f"nightly/{name}, {entry.label}: {words}" for words in error.problems]
            # All errors are collected, so that one edit can mend them all.
            continue
        problems += _unmeasurable_limit(found, entry, plans[entry.label])
    if problems:
        raise ConfigError(problems)
    return LoadedSet(name, found, plans)


def _unmeasurable_limit(nightly: NightlySet, entry: SetEntry, plan: StudyPlan) -> list[str]:
    """Return an error if max_forgetting is set without general text to measure it on."""
    # A limit that no night can check would keep every champion from moving.
    limit = nightly.champion.max_forgetting
    named = plan.settings.evaluation.general_text.source is not None
    # Without a gate no champion moves, so no limit is needed.
    if entry.gate is None or limit is None or named:
        return []
    return [
        f"{entry.label}: champion.max_forgetting={limit:g} needs general text to measure it on. Name "
        "one in the entry's overrides (evaluation.general_text.source=FILE), or set "
        "nightly.champion.max_forgetting=null."
    ]


def plan_of(nightly: NightlySet, entry: SetEntry, overrides: Sequence[str] = ()) -> StudyPlan:
    """Return the plan of an entry's study.

    Raises:
        ConfigError: all errors of the experiment.
    """
    plans = studies([*nightly.overrides_of(entry), *overrides])
    if len(plans) != 1:
        raise ConfigError(
            [f"experiment={entry.experiment}: an entry must name exactly one experiment"]
        )
    return plans[0]


def _literal_urls(written: Mapping[str, Any]) -> list[str]:
    """Return an error for each notification URL that is not a reference."""
    # URLs hold tokens, which must not be stored in a file of conf/.
    given = written.get("notify")
    urls = given if isinstance(given, list) else []
    return [
        f"notify[{index}] is written out, but notification URLs hold secrets. Put it into an "
        "environment variable and write ${oc.env:NAME}."
        for index, url in enumerate(urls)
        if url is not None and not str(url).startswith("${oc.env:")
    ]
