"""Samplers by name, and what is refused before anything is trained."""

from __future__ import annotations

from typing import get_args

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import Trial

from sweeper.config.grammar import parse_domain
from sweeper.config.settings import SamplerSettings
from sweeper.config.space import Branch, Branches, Choice, Interval, Space
from sweeper.config.study_settings import SamplerName
from sweeper.core.errors import ConfigError
from sweeper.search.samplers import make_sampler
from sweeper.search.study import ask, reattach_orphans, suggest
from sweeper.search.study_plan import studies

BASE = SamplerSettings(name="tpe", seed=0, n_startup_trials=4, class_name=None, kwargs={})
SPACE: Space = {
    "x": Interval(1e-4, 1.0, log=True),
    "n": Interval(1, 8, integer=True),
    "s": Interval(0.0, 0.9, step=0.1),
    "c": Choice((None, "a", 2, True)),
    "v": Branches({"one": Branch({}, {"y": Interval(0.0, 1.0)}), "two": Branch({"y": 2.0}, {})}),
}


FLAT: Space = {"x": Interval(1e-4, 1.0, log=True), "y": Interval(0.0, 1.0)}


def _named(name: str, **changes: object) -> SamplerSettings:
    return SamplerSettings.model_validate({**BASE.model_dump(), "name": name, **changes})


@pytest.mark.parametrize(
    "settings",
    [
        *map(_named, get_args(SamplerName)),
        _named("optuna", class_name="QMCSampler"),
        _named("optuna", class_name="NSGAIISampler", kwargs={"population_size": 4}),
    ],
    ids=lambda settings: settings.class_name or settings.name,
)
def test_every_sampler_draws_inside_a_space_with_branches(settings: SamplerSettings) -> None:
    """Bounds, steps, choices with null, and only the drawn branch's keys, past the random start."""
    sampler = make_sampler(settings, SPACE, 12)
    # Optuna would take its own default for None, and every draw below would be right.
    assert isinstance(sampler, BaseSampler), "add its case to make_sampler"
    study = optuna.create_study(sampler=sampler)
    for number in range(10):
        trial = study.ask()
        point = suggest(trial, SPACE)
        assert all(point[key] in SPACE[key] for key in ("x", "n", "s", "c"))
        assert point["v"] in ("one", "two")
        assert (point["y"] == 2.0) == (point["v"] == "two")
        study.tell(trial, float(number))


@given(
    low=st.integers(1, 1000),
    width=st.integers(1, 1000),
    scale=st.sampled_from([None, 1, 1000]),
    form=st.sampled_from(["{}", "log", "step"]),
)
def test_optuna_draws_from_the_very_domain_that_was_typed(
    low: int, width: int, scale: int | None, form: str
) -> None:
    """Bounds, log, whole numbers and steps reach Optuna as they were typed, and draws obey them."""
    a, b, stop = (low + up if scale is None else (low + up) / scale for up in (0, width, width + 1))
    plain = f"int(interval({a}, {b}))" if scale is None else f"interval({a}, {b})"
    unit = 1 if scale is None else 1 / scale
    words = {"{}": plain, "log": f"tag(log, {plain})", "step": f"range({a}, {stop}, {unit})"}
    domain = parse_domain("x", words[form])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=low))
    trial = study.ask()
    value = suggest(trial, {"x": domain})["x"]
    asked = trial.distributions["x"]
    kind = IntDistribution if scale is None else FloatDistribution
    assert isinstance(asked, kind)
    assert (asked.low, asked.log) == (a, form == "log")
    assert asked.high == pytest.approx(b)
    assert asked.step == (unit if form == "step" else (1 if scale is None else None))
    assert isinstance(value, int if scale is None else float)
    assert a <= value <= b * (1 + 1e-12)
    if form == "step":
        assert (value - a) / unit == pytest.approx(round((value - a) / unit), abs=1e-6)


@pytest.mark.parametrize(
    "name", ["random", "tpe", "lora", pytest.param("gp", marks=pytest.mark.slow)]
)
def test_a_killed_driver_changes_no_draw(name: SamplerName) -> None:
    """Whether it died before a trial's first value, between two values, or between two trials."""

    def opened(storage: BaseStorage) -> optuna.Study:
        study = optuna.create_study(storage=storage, study_name="x", load_if_exists=True)
        study.sampler = make_sampler(_named(name, n_startup_trials=2), FLAT, 12)
        return study

    def told(study: optuna.Study, trial: Trial) -> object:
        point = suggest(trial, FLAT)
        study.tell(trial.number, float(point["x"]) + float(point["y"]))
        return point

    whole = opened(optuna.storages.InMemoryStorage())
    undisturbed = [told(whole, ask(whole)) for _ in range(5)]
    storage = optuna.storages.InMemoryStorage()
    disturbed = []
    for place in range(5):
        trial = ask(opened(storage))
        if place > 1:  # the first two drivers die before any value
            trial.suggest_float("x", 1e-4, 1.0, log=True)
        study = opened(storage)
        (orphan,) = reattach_orphans(study)
        disturbed.append(told(study, orphan))
    assert disturbed == undisturbed
    assert len({str(point) for point in disturbed}) == 5


@pytest.mark.parametrize("name", ["tpe", pytest.param("gp", marks=pytest.mark.slow)])
def test_a_sampler_remembers_nothing_that_a_new_one_would_not_find(name: SamplerName) -> None:
    """Also where a trial was tried in a wider space, and an early place draws after a later one."""

    def drawn(keep: bool) -> list[object]:
        def make() -> BaseSampler:
            return make_sampler(_named(name, n_startup_trials=2), FLAT, 12)

        study = optuna.create_study(sampler=make())
        study.add_trial(
            optuna.trial.create_trial(
                params={"x": 0.5, "y": 3.0},
                distributions={
                    "x": FloatDistribution(1e-4, 1.0, log=True),
                    "y": FloatDistribution(0.0, 4.0),
                },
                value=1.0,
            )
        )
        points: list[object] = []
        for _ in range(3):
            study.sampler = study.sampler if keep else make()
            pair = [ask(study, 3), ask(study, 3)]
            for trial in reversed(pair):
                study.sampler = study.sampler if keep else make()
                point = suggest(trial, FLAT)
                points.append(point)
            for trial, point in zip(pair, points[-1:-3:-1], strict=True):
                assert isinstance(point, dict)
                study.tell(trial.number, float(point["x"]) + float(point["y"]))
        return points

    assert drawn(keep=True) == drawn(keep=False)


def test_the_same_seed_draws_the_same_in_a_new_study() -> None:
    """Two studies of one command start alike."""

    def first() -> object:
        study = optuna.create_study(sampler=make_sampler(BASE, SPACE, 12))
        return suggest(study.ask(), SPACE)

    assert first() == first()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler=optuna"], "is named with sampler=optuna"),
        (
            ["sampler=optuna", "hydra.sweeper.sampler.class_name=QMC"],
            "no such class. Valid: .*QMCSampler",
        ),
        (["sampler=optuna", "hydra.sweeper.sampler.class_name=GridSampler"], "sampler=grid"),
        (["sampler=tpe", "hydra.sweeper.sampler.class_name=QMCSampler"], "with no other sampler"),
        (
            [
                "sampler=optuna",
                "hydra.sweeper.sampler.class_name=TPESampler",
                "++hydra.sweeper.sampler.kwargs={gama: 1}",
            ],
            "unexpected keyword argument 'gama'",
        ),
        (["pruner=optuna", "hydra.sweeper.pruner.class_name=Nop"], "no such class. Valid: .*Hyper"),
        (
            ["sampler=grid", "hydra.sweeper.priors=[{training.learning_rate: 1e-3}]"],
            "priors change nothing",
        ),
        (["sampler=grid", "space=real"], "needs choice"),
        (["sampler=grid"], "needs choice"),
    ],
)
def test_wrong_samplers_and_pruners_are_refused_with_the_way_out(
    overrides: list[str], message: str
) -> None:
    """Found by the plan: no worker is started, no model loaded."""
    with pytest.raises(ConfigError, match=message):
        studies(["+experiment=lr_rank_sweep", *overrides])


def test_a_group_is_searched_like_a_value() -> None:
    """quantization=nf4,none: each choice composes its own group."""
    (plan,) = studies(["+experiment=lr_rank_sweep", "quantization=nf4,none"])
    lora = plan.arms[0]
    assert lora.space["quantization"] == Choice(("nf4", "none"))
    point = {"training.learning_rate": 1e-3, "quantization": "none"}
    assert not lora.settings_at(point).quantization.load_in_4bit
    assert lora.settings_at({**point, "quantization": "nf4"}).quantization.load_in_4bit


def test_base_models_are_searched_only_by_a_comparable_objective() -> None:
    """Losses per token of different tokenizers do not compare; the refusal says what would."""
    with pytest.raises(
        ConfigError, match=r"model.base_model: .*objective\.metric=eval/bits_per_byte"
    ):
        studies(["+experiment=lr_rank_sweep", "model.base_model=embedded,gpt2"])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("{adapter.use_dora: {true: {adapter.rr: 'choice(1,2)'}, false: {}}}", "adapter.rr"),
        ("{adapter.use_dora: {maybe: {}, false: {}}}", "use_dora='maybe'|use_dora=maybe"),
        ("{adapter.use_dora: {true: {adapter.r: 'choice(0,2)'}, false: {}}}", r"adapter\.r=0"),
        (
            "{adapter.r: 4, adapter.use_dora: {true: {adapter.r: 8}, false: {}}}",
            "adapter.r is decided twice",
        ),
        ("{variant: {a: {seed: 1}, b: {seed: 2}}}", "seed: is never searched"),
    ],
)
def test_branches_are_checked_like_everything_else(params: str, message: str) -> None:
    """A wrong key, value or rule inside a branch is found before anything is trained."""
    with pytest.raises(ConfigError, match=message):
        studies(["workers=fake", f"++hydra.sweeper.params={params}"])


def test_a_key_that_is_fixed_and_searched_is_refused() -> None:
    """adapter.r=4 beside adapter.r=2,8: neither is kept without a word."""
    with pytest.raises(ConfigError, match=r"adapter\.r=4 and adapter\.r=2,8: .* given twice"):
        studies(["+experiment=lr_rank_sweep", "adapter.r=4", "adapter.r=2,8"])
