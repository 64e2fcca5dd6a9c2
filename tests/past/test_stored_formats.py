"""What cannot be made again carries its format, and a newer one is refused rather than misread."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import optuna
import pytest

from sweeper.commands.run_study import run_study
from sweeper.core.errors import StudyError
from sweeper.core.outcome import ArmBaseline
from sweeper.core.paths import NightFolder, NightsFolder, StudyFolder, write_json
from sweeper.nightly.night_record import read_record
from sweeper.nightly.night_run import run_night
from sweeper.search import study as stored_study
from sweeper.search.study import open_storage, open_study
from sweeper.search.study_plan import studies
from tests.past.judge import judge
from tests.past.past import FAKE, FINISHED, FIRST_NIGHT, MODEL, SET

FOLDER = StudyFolder(Path("outputs/finished"))
NEW = (*FAKE, "hydra.sweeper.study_name=new", "tracking=none", "hydra.sweeper.n_trials=1")
ONE_ARM = ("~hydra.sweeper.arms.full", "finalists=none", "workers.fake.step_seconds=0.0")


def _loaded(name: str, folder: StudyFolder = FOLDER) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage(None, folder))


def test_a_new_study_says_its_format(past: Path) -> None:
    """The number is stored with the question; an old study stays as it was."""
    (plan,) = studies([*NEW, *ONE_ARM])
    old = _loaded("finished/lora")
    facts = ArmBaseline.model_validate(old.user_attrs["facts"])
    storage = open_storage(None, StudyFolder(Path("outputs/new")))
    new = open_study(plan, plan.arms[0], facts, storage, "uuid")
    assert new.user_attrs["format"] == stored_study.FORMAT
    assert "format" not in old.user_attrs


@pytest.mark.parametrize(
    "overrides",
    [
        FINISHED,
        (*NEW, *ONE_ARM, "hydra.sweeper.fork_of=finished"),
    ],
    ids=["resumed", "forked"],
)
def test_a_study_of_a_newer_version_is_refused(past: Path, overrides: tuple[str, ...]) -> None:
    """Both formats are named, and what keeps its answer; nothing is written to the study."""
    newer = stored_study.FORMAT + 1
    _loaded("finished/lora").set_user_attr("format", newer)
    before = FOLDER.database.read_bytes()
    (plan,) = studies(overrides)
    with pytest.raises(StudyError) as refusal:
        run_study(plan)
    assert f"study 'finished' is of format {newer}, this version reads up to format" in str(
        refusal.value
    )
    assert "continue it with the version that stored it" in str(refusal.value)
    assert FOLDER.database.read_bytes() == before


def _night(number: int = 0) -> NightFolder:
    day = (FIRST_NIGHT + timedelta(days=number)).date().isoformat()
    return NightsFolder.under(Path("outputs")).night(SET, day)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": 99}', "it is of format 99, this version reads up to format 1"),
        ('{"unheard_of": 1}', "set_name: Field required"),
        ("{", "the file: Invalid JSON"),
        ("[]", "the file: Input should be an object"),
        ("", "the file: Invalid JSON"),
        ("\ud800", "the file: "),
    ],
)
def test_an_unreadable_night_is_refused_in_one_sentence(past: Path, text: str, reason: str) -> None:
    """The reason, and the command that shows the studies which it names."""
    _night().record.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(StudyError) as refusal:
        read_record(_night())
    assert f"night.json is not read ({reason}" in str(refusal.value)
    assert str(refusal.value).endswith("Its studies stay: python -m sweeper study list")
    assert "\n" not in str(refusal.value)


def test_a_night_after_an_unreadable_one_says_so(past: Path) -> None:
    """A new study begins, and the digest says why no earlier one is continued."""
    record = read_record(_night())
    assert record is not None
    newer = {**record.model_dump(mode="json"), "format": record.format + 1, "unheard_of": 1}
    write_json(_night().record, newer)
    run_night(SET, clock=lambda: FIRST_NIGHT + timedelta(days=1), judge=judge)
    second = read_record(_night(1))
    assert second is not None
    decided = second.entries[MODEL].decided
    assert decided is not None
    assert (decided.choice, decided.reason) == ("new", "first night")
    assert "2026-05-01/night.json is not read (it is of format 2" in _night(1).digest.read_text()
