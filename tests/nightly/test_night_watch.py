"""`nightly status`: what a monitor learns about nights, above all about one that never fired."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from sweeper.core.paths import NightsFolder, StudyFolder, write_atomic
from sweeper.nightly.night_claims import NightLog
from sweeper.nightly.night_record import EntryDecision, EntryRecord, NightRecord, write_record
from sweeper.nightly.night_watch import set_statuses
from tests.conftest import Program

NOW = datetime(2026, 5, 2, 6, 0, tzinfo=UTC)
STARTED = datetime(2026, 5, 1, 22, 0, tzinfo=UTC)
STANDING = """{"study_name": "s", "state": "STATE", "command": "-m", "since": "2026-05-01 22:00:00",
"process": 2, "host": "h", "objective": {"metric": "eval/loss", "direction": "minimize",
"pruning_metric": null}, "left": "", "running": [], "arms": [{"name": "lora", "wanted": 1, "done": 0,
"trials": {}, "best": null, "queue": []}]}"""


@pytest.fixture
def nights(tmp_path: Path) -> NightsFolder:
    """The folder of all nights, with one night of a set."""
    return NightsFolder.under(tmp_path / "outputs")


def _record(nights: NightsFolder) -> None:
    """A night that runs a study."""
    decided = EntryDecision(
        choice="new",
        reason="",
        study_name="s",
        identity={},
        n_trials=1,
        warm_start=(),
        ended_before={},
        seconds_before=0.0,
    )
    entry = EntryRecord(name="e", experiment="e", policy="fresh", decided=decided)
    record = NightRecord(set_name="mine", date=STARTED.date(), began=STARTED, starts=1)
    write_record(nights.night("mine", "2026-05-01"), record.with_entry(entry))


def test_a_set_is_late_when_no_night_has_started_in_time(nights: NightsFolder) -> None:
    """26 hours after the last start, and a set that never ran at all."""
    log = NightLog(nights)
    with log.claim("mine", STARTED.date(), STARTED) as claim:
        log.end(claim, "no change", STARTED)
    limit = timedelta(hours=26)
    (fine,) = set_statuses(nights, ["mine"], limit, NOW)
    assert (fine.late, fine.result, fine.running) == (False, "no change", False)
    late = set_statuses(nights, ["mine", "never"], limit, NOW + timedelta(hours=20))
    assert [status.late for status in late] == [True, True]
    assert "LATE, no night has ever run" in str(late[1])
    assert [status.late for status in set_statuses(nights, [], None, NOW)] == [False]


def test_a_killed_night_is_late_and_a_running_one_is_not(nights: NightsFolder) -> None:
    """An open row without a process is a night that nobody has continued."""
    with NightLog(nights).claim("mine", STARTED.date(), STARTED):
        (running,) = set_statuses(nights, [], None, NOW)
    (killed,) = set_statuses(nights, [], None, NOW)
    assert (running.running, running.late) == (True, False)
    assert (killed.running, killed.late) == (False, True)


@pytest.mark.parametrize(
    ("state", "age_s", "words"),
    [("paused", 0, "is paused"), ("running", 600, "silent for 10.0 min"), ("running", 1, None)],
)
def test_a_night_whose_study_waits_says_so(
    nights: NightsFolder, state: str, age_s: float, words: str | None
) -> None:
    """Paused by somebody, or without a word since its database went away."""
    import os
    import time

    _record(nights)
    standing = StudyFolder(nights.path.parent / "s").standing
    write_atomic(standing, STANDING.replace("STATE", state))
    os.utime(standing, (time.time() - age_s,) * 2)
    with NightLog(nights).claim("mine", date(2026, 5, 1), STARTED):
        (status,) = set_statuses(nights, [], None, NOW)
    assert words in (status.waiting or "") if words else status.waiting is None


def test_the_verb_has_exit_codes_and_json(nights: NightsFolder, in_process: Program) -> None:
    """0 in time, 1 late, 2 a wrong age; a set cannot be called status."""
    missing = in_process("nightly", "status", "mine", "--max-age", "26h")
    assert missing.returncode == 1, missing.stdout + missing.stderr
    log, now = NightLog(nights), datetime.now(UTC)
    with log.claim("mine", now.date(), now) as claim:
        log.end(claim, "no change", now)
    fine = in_process("nightly", "status", "--max-age", "26h", "--json")
    assert fine.returncode == 0, fine.stderr
    (document,) = json.loads(fine.stdout)
    assert (document["set_name"], document["late"]) == ("mine", False)
    assert in_process("nightly", "status", "--max-age", "26").returncode == 2


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100])
def test_a_damaged_record_of_nights_names_the_way_out(
    nights: NightsFolder, content: bytes, in_process: Program
) -> None:
    """Neither the monitor nor a night ends in a traceback."""
    nights.path.mkdir(parents=True)
    nights.database.write_bytes(content)
    done = in_process("nightly", "status")
    assert done.returncode == 1
    assert "nights.db" in done.stderr
    if content:
        with pytest.raises(Exception, match="record of nights cannot be opened") as caught:
            NightLog(nights)
        assert type(caught.value).__name__ == "StudyError"
