"""A search that ends says what more trials would be expected to bring, once."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from sweeper.commands.run_study import run_study
from sweeper.driver import study_run
from sweeper.reporting.results import StudyResults, from_document, to_document
from sweeper.reporting.verdict import judge
from sweeper.search.search_outlook import OUTLOOK, store_outlook
from sweeper.search.study_plan import studies
from tests.driver.test_arm_search import FAKE, ONLY_LORA


def _run(folder: Path, *overrides: str) -> StudyResults:
    more = ("finalists=none", "pruner=none", ONLY_LORA)
    (plan,) = studies([*FAKE, *more, f"output_dir={folder}", *overrides])
    return run_study(plan)


def test_an_ended_search_guesses_once_and_again_when_it_is_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stored with the study, stands in the verdict and in results.json, and follows the record."""
    calls: list[str] = []

    def counted_store(study: optuna.Study, *rest: object) -> None:
        calls.append(study.study_name)
        store_outlook(study, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(study_run, "store_outlook", counted_store)
    first = _run(tmp_path, "hydra.sweeper.n_trials=8")
    (lora,) = first.arms
    assert lora.outlook is not None
    assert (lora.outlook.after, lora.outlook.trials) == (8, 8)
    assert calls == ["lr_rank_sweep/lora"]
    assert (
        "8 more trials would be expected to lower the eval loss of QLoRA by" in judge(first).words
    )
    assert from_document(to_document(first)).arms[0].outlook == lora.outlook
    extended = _run(tmp_path, "hydra.sweeper.n_trials=9").arms[0].outlook
    assert extended is not None
    assert extended.after == 9
    storage = f"sqlite:///{tmp_path / 'lr_rank_sweep' / 'study.db'}"
    stored = optuna.load_study(study_name="lr_rank_sweep/lora", storage=storage)
    assert stored.user_attrs[OUTLOOK] == extended.model_dump()
