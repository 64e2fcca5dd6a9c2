"""Settings of `hydra.sweeper`: the study, its arms, sampler, pruner, budget and finalists."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from sweeper.config.section import Fraction, Positive, SettingsSection, parse_duration
from sweeper.core.value import EquivalenceMargin


def parse_margin(value: Any) -> Any:
    """Return a margin from a number in the metric's unit or a share such as "5%"."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return EquivalenceMargin(share=float(value.strip()[:-1]) / 100)
        except ValueError:
            raise ValueError(f"{value!r} is no share. Write 5%, or a number such as 0.01") from None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return EquivalenceMargin(absolute=float(value))
    return value


SamplerName = Literal["tpe", "lora", "gp", "random", "grid"]


class SamplerSettings(SettingsSection):
    """Optuna's sampler. n_startup_trials=null is derived from the number of trials."""

    name: SamplerName | Literal["optuna"]
    seed: Annotated[int, Field(ge=0)]
    n_startup_trials: Positive | None
    class_name: str | None
    kwargs: dict[str, Any]

    @model_validator(mode="after")
    def _class_name_with_optuna(self) -> SamplerSettings:
        _class_name_belongs_to_optuna(self.name, self.class_name, "sampler", "QMCSampler")
        return self


class PrunerSettings(SettingsSection):
    """Optuna's pruner behind the schedule-aware guard. `optuna` is any other pruner, without the
    guard.
    """

    name: Literal["none", "median", "percentile", "gap", "successive_halving", "optuna"]
    # from a quarter of the schedule on: before, cosine decay makes low learning rates look bad
    rungs: list[Annotated[int, Field(ge=250, lt=1000)]]
    n_startup_trials: Annotated[int, Field(ge=0)]
    percentile: Annotated[float, Field(gt=0, lt=100)] | None
    reduction_factor: Annotated[int, Field(ge=2)] | None
    class_name: str | None
    kwargs: dict[str, Any]
    audit_fraction: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _what_the_pruner_needs(self) -> PrunerSettings:
        _class_name_belongs_to_optuna(self.name, self.class_name, "pruner", "HyperbandPruner")
        guarded = self.name in ("median", "percentile", "gap", "successive_halving")
        if guarded != bool(self.rungs) or self.rungs != sorted(set(self.rungs)):
            raise ValueError(
                f"rungs={self.rungs}: pruner={self.name} needs "
                + (
                    "increasing per-mille of the schedule"
                    if guarded
                    else "no rungs: pruner.rungs=[]"
                )
            )
        if (self.percentile is None) == (self.name == "percentile"):
            raise ValueError(f"percentile={self.percentile} belongs to pruner=percentile alone")
        self._halving_is_geometric()
        return self

    def _halving_is_geometric(self) -> None:
        factor = self.reduction_factor
        if (factor is None) == (self.name == "successive_halving"):
            raise ValueError(
                f"reduction_factor={factor} belongs to pruner=successive_halving alone"
            )
        if factor is None:
            return
        wanted = [self.rungs[0] * factor**index for index in range(len(self.rungs))]
        if self.rungs != wanted:
            raise ValueError(
                f"rungs={self.rungs}: with reduction_factor={factor} successive halving decides at "
                f"{self.rungs[0]} × {factor}^n per-mille: rungs={wanted}"
            )


def _class_name_belongs_to_optuna(
    name: str, class_name: str | None, group: str, example: str
) -> None:
    if (name == "optuna") != (class_name is not None):
        raise ValueError(
            f"class_name={class_name} with {group}={name}: a class of optuna.{group}s is named "
            f"with {group}=optuna {group}.class_name={example}, and with no other {group}"
        )


class PlateauRule(SettingsSection):
    """Stop when the last `trials` trials have not improved the best by more than min_improvement."""

    trials: Positive
    min_improvement: Annotated[float, Field(ge=0)]


class BudgetSettings(SettingsSection):
    """Limits of a study besides n_trials. null is no limit."""

    wall_clock: Annotated[float, BeforeValidator(parse_duration)] | None
    until: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")] | None
    device_hours: Annotated[float, Field(gt=0)] | None
    plateau: PlateauRule | None


class FinalistSettings(SettingsSection):
    """Selection of the configurations that are trained over several seeds before the verdict."""

    top: Annotated[int, Field(ge=0)]
    seeds: Positive
    """Seeds of each finalist over which the best mean is chosen. The first is the trial's own."""
    fresh_seeds: Annotated[int, Field(ge=0)]
    """Further seeds of the winner, which took no part in the choice and are judged on the test split."""
    test: bool
    """True if the winners are judged on the test split."""


class BaselineSettings(SettingsSection):
    """An earlier full fine-tune that replaces the trainings of an arm."""

    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None


class RetentionSettings(SettingsSection):
    """Weights to keep when a study ends, in addition to those that its report refers to."""

    adapters: Annotated[int, Field(ge=0)] | None
    """Number of best adapters to keep. null keeps every adapter and all full weights."""


class FairnessRules(SettingsSection):
    """Conditions of a fair comparison of arms. Otherwise the verdict is marked provisional."""

    equal: Literal["trials", "tokens", "device_seconds"]
    tolerance: Fraction
    min_finished: Positive


class VerdictRules(SettingsSection):
    """Rules of the verdict that are fixed before the first trial."""

    equivalence_margin: Annotated[EquivalenceMargin, BeforeValidator(parse_margin)] | None
    """The largest difference between arms that counts as none. null: equivalence is not tested."""


class RecipeSettings(SettingsSection):
    """A known-good point with a name and its origin. What the search gained is measured against it."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,60}$")]
    source: Annotated[str, Field(min_length=1)]
    """Address of the table, paper or file that the point was read from."""
    commit: str | None
    """Commit of the source. None if the source has no commits."""
    licence: str | None
    conditions: Annotated[str, Field(min_length=1)]
    """How the source trained: data, batch, steps, seeds."""
    point: Annotated[dict[str, Any], Field(min_length=1)]


class ArmSettings(SettingsSection):
    """One arm besides `lora`: overrides on top of the experiment, a space, and a number of trials."""

    overrides: list[str] = Field(default_factory=list)
    n_trials: Positive
    sampler: SamplerName | None = None
    params: dict[str, Any]
    priors: list[dict[str, Any]] = Field(default_factory=list)
    refine: bool = False
    """True if points beside the best one of the arm's grid are tried as well."""

    @model_validator(mode="after")
    def _only_a_grid_is_refined(self) -> ArmSettings:
        if self.refine and self.sampler != "grid":
            raise ValueError(
                f"refine is true and sampler is {self.sampler or 'null'}: only a grid is refined, "
                "other samplers choose between its points by themselves. Set sampler: grid or "
                "refine: false"
            )
        return self


# names of folders as well, and an arm's study in Optuna is named STUDY/ARM
StudyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
ArmName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=100)]


def require_arm_name(text: str) -> None:
    """Refuse a name that no arm can have, because it is the name of a folder.

    Raises:
        ValueError: says what is wrong with it.
    """
    TypeAdapter(ArmName).validate_python(text)


def is_study_name(text: str) -> bool:
    """Return True if a study can have this name. A path is no name."""
    try:
        TypeAdapter(StudyName).validate_python(text)
    except ValidationError:
        return False
    return True


class StudySettings(SettingsSection):
    """The `hydra.sweeper` node, as Hydra's Optuna users write it."""

    study_name: StudyName
    n_trials: Positive
    n_jobs: Positive | Literal["auto"]
    """Devices in use at the same time. auto: chosen at the study's first run, and stored with it."""
    reproducible: bool
    """True if the order in which results arrive decides nothing."""
    protocol: Literal["own", "paper"]
    """paper: no priors, no stops, and equal device seconds for all arms."""
    storage: str | None
    costs: list[str]
    sampler: SamplerSettings
    pruner: PrunerSettings
    budget: BudgetSettings
    params: dict[str, Any]
    shared_params: dict[str, Any]
    """Keys that every arm searches in the same domain, in addition to its own."""
    priors: list[dict[str, Any]]
    """Points, or recipes as RecipeSettings describes them."""
    warm_start: list[StudyName]
    fork_of: StudyName | None
    arms: dict[ArmName, ArmSettings]
    finalists: FinalistSettings
    retention: RetentionSettings
    baseline: BaselineSettings
    fairness: FairnessRules
    verdict: VerdictRules

    @model_validator(mode="after")
    def _lora_is_the_search_itself(self) -> StudySettings:
        if "lora" in self.arms:
            raise ValueError("arms.lora is hydra.sweeper.params itself. Give the arm another name")
        return self

    @model_validator(mode="after")
    def _adopted_run_has_no_costs(self) -> StudySettings:
        if self.costs and self.baseline.run_id is not None:
            raise ValueError(
                f"costs={self.costs}: what an adopted run cost is not measured here, so it has no place "
                "on a front. Set hydra.sweeper.costs=[] or baseline.run_id=null"
            )
        return self

    @model_validator(mode="after")
    def _no_fork_of_itself(self) -> StudySettings:
        if self.fork_of == self.study_name:
            raise ValueError(
                f"fork_of={self.fork_of} is the study itself. Give the fork a study_name of its own"
            )
        return self

    @model_validator(mode="after")
    def _plateau_of_one_value(self) -> StudySettings:
        if self.costs and self.budget.plateau is not None:
            raise ValueError(
                f"budget.plateau judges one value, and costs={self.costs} add others. "
                "Set budget.plateau=null"
            )
        return self
