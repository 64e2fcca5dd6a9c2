"""Who may write a study, where drivers share a database but no folder."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from sweeper.core.errors import StudyLocked
from sweeper.search.ownership import NullOwnership, make_ownership
from sweeper.search.storage import PatientStorage


def test_one_holds_a_study_and_another_one_another(tmp_path: Path) -> None:
    """The lock is a study's, not the database's; released, it can be taken."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    first, second, other = (make_ownership(url, name) for name in ("mine", "mine", "other"))
    first.hold()
    first.hold()
    other.hold()
    with pytest.raises(StudyLocked, match=r"hydra\.sweeper\.study_name=NAME"):
        second.hold()
    first.release()
    second.hold()
    second.release()
    second.release()


def test_a_storage_is_owned_while_its_study_runs(tmp_path: Path) -> None:
    """Whoever comes second is refused at once; asking and telling look at the lock again."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    first, second = PatientStorage(url), PatientStorage(url)
    with first.owned("study"):
        study = optuna.create_study(storage=first)
        study.tell(study.ask(), 1.0)
        with pytest.raises(StudyLocked), second.owned("study"):
            raise AssertionError("two drivers")
        first._ownership.release()  # as a restart of the server does, and another driver is faster
        with second.owned("study"), pytest.raises(StudyLocked):
            study.ask()
    with second.owned("study"):
        pass


def test_what_nobody_can_share_is_not_locked() -> None:
    """A database in memory, and one whose locks we do not know."""
    for url in ("sqlite:///:memory:", "sqlite://", "mysql+pymysql://me@db/optuna"):
        assert isinstance(make_ownership(url, "study"), NullOwnership)
