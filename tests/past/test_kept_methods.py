"""A study keeps the sampler and the pruner that it began with when their defaults change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sweeper.commands.run_study import run_study
from sweeper.config import compose
from sweeper.core.paths import StudyFolder
from sweeper.search import stored_defaults
from sweeper.search.stored_defaults import with_stored_defaults
from sweeper.search.study import METHODS, find_study, open_storage
from sweeper.search.study_plan import StudyPlan, studies
from tests.past.past import FINISHED

FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline", "tracking=none"),
    *("finalists=none", "workers.fake.step_seconds=0", "workers.fake.steps=2"),
    "hydra.sweeper.n_trials=2",
)


def _resumed(plan: StudyPlan, folder: Path) -> tuple[StudyPlan, list[str]]:
    """The plan as its stored study has it, and what is said about that."""
    storage = open_storage(None, StudyFolder(folder))
    found = {arm.name: find_study(plan, arm, storage) for arm in plan.arms}
    return with_stored_defaults(plan, {a: s for a, s in found.items() if s}, storage)


def _methods(plan: StudyPlan) -> dict[str, str]:
    arms = {arm.name: arm.sampler.name for arm in plan.arms}
    return {**arms, "pruner": plan.study.pruner.name}


def test_what_a_study_began_with_is_stored_before_its_first_trial(tmp_path: Path) -> None:
    """Also where the command named neither, and it is not replaced by a later start."""
    words = [*FAKE, f"output_dir={tmp_path}"]
    (plan,) = studies([*words, "sampler=random", "pruner=none"])
    run_study(plan)
    folder = tmp_path / "lr_rank_sweep"
    (longer,) = studies([*words, "hydra.sweeper.n_trials=3"])
    kept, notes = _resumed(longer, folder)
    assert _methods(kept) == {"lora": "random", "full": "grid", "pruner": "none"}
    assert "arm lora keeps sampler=random, with which it was started" in notes
    assert "the study keeps pruner=none, with which it was started" in notes
    (named,) = studies([*words, "sampler=gp", "pruner=percentile"])
    assert _methods(_resumed(named, folder)[0])["lora"] == "gp"
    assert _methods(_resumed(named, folder)[0])["pruner"] == "percentile"
    study = find_study(longer, longer.arms[0], open_storage(None, StudyFolder(folder)))
    assert study is not None
    assert study.user_attrs[METHODS]["sampler"]["name"] == "random"


def test_seed_and_audits_are_todays(tmp_path: Path) -> None:
    """They may differ between two starts of a study, as they always could."""
    words = [*FAKE, f"output_dir={tmp_path}"]
    (plan,) = studies([*words, "sampler=random", "pruner=percentile"])
    run_study(plan)
    (later,) = studies(
        [*words, "hydra.sweeper.sampler.seed=7", "hydra.sweeper.pruner.audit_fraction=0.5"]
    )
    kept, _ = _resumed(later, tmp_path / "lr_rank_sweep")
    assert (kept.arms[0].sampler.name, kept.arms[0].sampler.seed) == ("random", 7)
    assert (kept.study.pruner.name, kept.study.pruner.audit_fraction) == ("percentile", 0.5)


@pytest.mark.parametrize(("group", "other"), [("sampler", "gp"), ("pruner", "percentile")])
def test_a_study_of_the_past_keeps_what_was_then_the_default(
    group: str, other: str, past: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions that did not store it had TPE and the median, whatever today's default is."""
    (plan,) = studies(FINISHED)
    today = compose.compose(()).choices[group]
    before = stored_defaults.EARLIER_METHODS[group]
    assert _methods(_resumed(plan, Path("outputs/finished"))[0])["lora"] == "tpe"
    if today == before:  # pretend that the default has changed
        monkeypatch.setitem(compose.compose(()).choices, group, other)
        (named,) = studies([*FINISHED, f"{group}={other}"])
        plan = replace(plan, arms=named.arms, study=named.study)
        unnamed = [
            replace(arm, overrides=tuple(t for t in arm.overrides if not t.startswith(group)))
            for arm in plan.arms
        ]
        plan = replace(plan, arms=tuple(unnamed))
    kept = _methods(_resumed(plan, Path("outputs/finished"))[0])
    assert kept["lora" if group == "sampler" else group] == before
