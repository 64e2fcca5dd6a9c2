"""Nights end to end, with a trainer that only pretends and a clock that is given."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from sweeper.config import compose
from sweeper.core.errors import ConfigError
from sweeper.core.paths import NightFolder, NightsFolder
from sweeper.nightly import night_run as nightly_run
from sweeper.nightly.night_claims import NightLog
from sweeper.nightly.night_record import NightRecord, read_record
from sweeper.nightly.night_run import EXIT_CODES, run_night
from sweeper.nightly.nightly_set import load_set
from sweeper.reporting.held_out_results import LEFT_ALONE
from sweeper.reporting.results import load_results

FIRST = datetime(2026, 5, 1, 22, 30, tzinfo=UTC)
FAKE = ["workers=fake", "workers.engine=inline", "workers.fake.step_seconds=0.0", "tracking=none"]
FIXED = ["adapter.r=8", "adapter.alpha_over_r=2", "adapter.target_modules=attention"]
ONE_KEY = ["~hydra.sweeper.arms.full", "training.warmup_ratio=0.0", *FIXED]
SMALL = [*ONE_KEY, "data.train=my.jsonl"]


def _rows(count: int) -> str:
    rows = (
        {"instruction": f"Add {i}.", "input": "", "output": f"Added {i} to the sum."}
        for i in range(count)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


Write = Callable[..., None]


@pytest.fixture
def write_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A folder of a user's own, with data and a function that writes the set `mine`."""
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text(_rows(40))

    def write(*entries: dict[str, object], **more: object) -> None:
        experiments = [
            {"experiment": "lr_rank_sweep", "overrides": [*FAKE, *SMALL], "n_trials": 3, **entry}
            for entry in entries
        ]
        folder = tmp_path / "conf" / "nightly"
        folder.mkdir(parents=True, exist_ok=True)
        text = {"defaults": ["default", "_self_"], "experiments": experiments, **more}
        (folder / "mine.yaml").write_text(yaml.safe_dump(text))
        compose._composed_or_refused.cache_clear()  # a firing is a process of its own

    return write


def _night(number: int) -> Callable[[], datetime]:
    return lambda: FIRST + timedelta(days=number)


def _folder(number: int = 0) -> NightFolder:
    day = (FIRST + timedelta(days=number)).date().isoformat()
    return NightsFolder.under(Path("outputs")).night("mine", day)


def _record(number: int = 0) -> NightRecord:
    record = read_record(_folder(number))
    assert record is not None
    return record


def test_three_nights_start_continue_and_start_anew_after_a_data_change(write_set: Write) -> None:
    """Night 2 adds two trials to night 1's study; on other data night 3 begins one, winners first."""
    write_set({"policy": "continue", "extend_by": 2})
    assert run_night("mine", clock=_night(0)) == "no change"
    assert run_night("mine", clock=_night(1)) == "no change"
    Path("my.jsonl").write_text(_rows(44))
    assert run_night("mine", clock=_night(2)) == "no change"
    first, second, third = (_record(number).entries["lr_rank_sweep"] for number in range(3))
    assert first.decided
    assert second.decided
    assert third.decided
    assert (first.decided.choice, first.causes) == ("new", {"finished": 3})
    assert (second.decided.choice, second.decided.n_trials) == ("continue", 5)
    assert second.decided.study_name == first.decided.study_name
    assert sum(second.causes.values()) == 2
    assert third.decided.reason == "changed: lora: data digest"
    assert third.decided.study_name == "mine_lr_rank_sweep_2026-05-03"
    assert third.decided.warm_start == (first.decided.study_name,)
    assert second.best
    results = json.loads(Path(f"outputs/{third.decided.study_name}/results.json").read_text())
    assert results["untested"] == LEFT_ALONE
    assert results["arms"]["lora"]["final"]["test_losses"] == {}
    trials = {trial["number"]: trial["params"] for trial in results["arms"]["lora"]["trials"]}
    assert trials[0] == second.best.point


def test_a_changed_template_starts_a_new_study(write_set: Write) -> None:
    """A file that data.template names is part of the night's identity; an older night lacks the part."""
    Path("own.jinja").write_text("{{ messages }}")
    write_set(
        {
            "policy": "continue",
            "extend_by": 1,
            "n_trials": 1,
            "overrides": [*FAKE, *SMALL, "data.template=own.jinja"],
        }
    )
    run_night("mine", clock=_night(0))
    _forget_templates(_folder(0).record)
    run_night("mine", clock=_night(1))
    Path("own.jinja").write_text("{{ messages[0] }}")
    run_night("mine", clock=_night(2))
    entries = [_record(number).entries["lr_rank_sweep"] for number in range(3)]
    assert [entry.status for entry in entries] == ["done"] * 3
    decided = [entry.decided for entry in entries]
    assert [each.choice for each in decided if each] == ["new", "continue", "new"]
    assert decided[2]
    assert decided[2].reason == "changed: lora: template file"


def _forget_templates(record: Path) -> None:
    """Take out of a night what an earlier version did not store."""
    night = json.loads(record.read_text())
    (entry,) = night["entries"].values()
    assert entry["decided"]["identity"].pop("lora: template file")
    assert entry["best"].pop("inputs")
    record.write_text(json.dumps(night))


def test_a_night_pays_for_each_point_once(write_set: Write) -> None:
    """A space of two points asked for three trials: the time is that of the two trained."""
    two = [*FAKE, *SMALL, "sampler=random", "training.learning_rate=choice(1e-3, 2e-3)"]
    write_set({"policy": "fresh", "overrides": two})
    run_night("mine", clock=_night(0))
    entry = _record().entries["lr_rank_sweep"]
    assert entry.decided
    assert (entry.causes["finished"], entry.causes["duplicate"] > 0) == (2, True)
    results = load_results(entry.decided.study_name, Path("outputs"))
    trained = [trial for trial in results.arms[0].trials if trial.complete]
    assert entry.seconds == pytest.approx(sum(t.metric("cost/seconds") or 0.0 for t in trained))


def test_a_limit_that_nobody_can_measure_is_a_problem_of_the_set(write_set: Write) -> None:
    """max_forgetting and a gate, but no general text: said at once, with both ways out."""
    unnamed = [*FAKE, *SMALL, "evaluation.general_text.source=null"]
    write_set({"policy": "fresh", "gate": "gate.jsonl", "overrides": unnamed})
    with pytest.raises(ConfigError, match=r"max_forgetting=1 needs general text"):
        load_set("mine")
    assert load_set("mine", ["nightly.champion.max_forgetting=null"]).plans


def test_what_a_night_deletes_stands_in_its_digest(write_set: Write) -> None:
    """The worst adapters of the set's studies go when all is done; a dry run only tells."""
    write_set({"policy": "fresh"}, retention={"keep_adapters": 0, "dry_run": True})
    run_night("mine", clock=_night(0))
    entry = _record(0).entries["lr_rank_sweep"]
    assert entry.decided is not None
    assert entry.best is not None
    name, loser = entry.decided.study_name, (entry.best.number + 1) % 3
    adapter = Path(f"outputs/{name}/lora/trial_{loser:04d}/adapter")
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"0" * 2**20)
    run_night("mine", clock=_night(1))
    assert f"{name}: 1.0 MiB would be freed" in _folder(1).digest.read_text()
    assert adapter.exists()
    write_set({"policy": "fresh"}, retention={"keep_adapters": 0, "dry_run": False})
    run_night("mine", clock=_night(2))
    assert f"{name}: 1.0 MiB freed (1 × adapter of a loser)" in _folder(2).digest.read_text()
    assert not adapter.exists()


def test_unchanged_night_is_skipped_and_says_so(write_set: Write) -> None:
    """Nothing changed: nothing trains, and the digest names the study that stands."""
    write_set({"policy": "skip_unchanged"})
    run_night("mine", clock=_night(0))
    run_night("mine", clock=_night(1))
    entry = _record(1).entries["lr_rank_sweep"]
    assert (entry.status, entry.causes) == ("skipped", {})
    assert (
        "nothing changed since study mine_lr_rank_sweep_2026-05-01" in _folder(1).digest.read_text()
    )


def test_fresh_is_a_new_study_every_night(write_set: Write) -> None:
    """The same question again, in a study of its own that starts from the last winner."""
    write_set({"policy": "fresh"})
    run_night("mine", clock=_night(0))
    run_night("mine", clock=_night(1))
    decided = _record(1).entries["lr_rank_sweep"].decided
    assert decided
    assert decided.study_name == "mine_lr_rank_sweep_2026-05-02"
    assert decided.warm_start == ("mine_lr_rank_sweep_2026-05-01",)


def test_a_night_runs_once(write_set: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """The second firing of a night trains nothing, and says why."""
    write_set({"policy": "fresh"})
    run_night("mine", clock=_night(0))
    assert run_night("mine", clock=lambda: FIRST + timedelta(hours=3)) is None
    assert "the night of 2026-05-01 has been run already" in capsys.readouterr().out
    assert _record().starts == 1


def test_between_nights_it_says_when_the_next_begins(
    write_set: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fired at noon, nothing runs, and the next night is named in local time."""
    write_set({"policy": "fresh"}, time_zone="Europe/Berlin")
    assert run_night("mine", clock=lambda: datetime(2026, 5, 1, 12, tzinfo=UTC)) is None
    assert "The next begins 2026-05-01 22:00 CEST" in capsys.readouterr().out


@pytest.mark.slow
def test_one_failing_experiment_does_not_end_the_night(write_set: Write) -> None:
    """The second entry has no data: it is recorded and told, the third runs, the exit code is 1."""
    broken = [*FAKE, *ONE_KEY, "data.train=gone.jsonl"]
    write_set(
        {"policy": "fresh", "name": "first"},
        {"policy": "fresh", "name": "broken", "overrides": broken},
        {"policy": "fresh", "name": "last"},
    )
    result = run_night("mine", clock=_night(0))
    assert result is not None
    assert EXIT_CODES[result] == 1
    assert [entry.status for entry in _record().entries.values()] == ["done", "failed", "done"]
    assert "- broken: " in _folder().digest.read_text()
    assert "gone.jsonl" in _folder().digest.read_text()


def test_failed_trials_are_told_by_cause(write_set: Write) -> None:
    """One trial out of memory and one that diverged stand in the digest."""
    plan = "++workers.fake.plan={0:oom,1:diverge}"
    write_set({"policy": "fresh", "overrides": [*FAKE, *SMALL, plan]})
    run_night("mine", clock=_night(0))
    text = _folder().digest.read_text()
    assert "1 trial ended as diverged" in text
    assert "1 trial ended as oom" in text


def test_no_experiment_starts_after_the_budget(write_set: Write) -> None:
    """A night whose time was used up by an earlier start trains nothing more and says so."""
    write_set({"policy": "fresh"}, budget={"wall_clock": "1h"})
    nights = NightLog(NightsFolder.under(Path("outputs")))
    with nights.claim("mine", FIRST.date(), FIRST):
        pass  # a start that crashed
    run_night("mine", clock=lambda: FIRST + timedelta(hours=2))
    entry = _record().entries["lr_rank_sweep"]
    assert (entry.status, entry.message) == ("cut_short", "the night's time is used up")
    assert _record().starts == 2


@pytest.mark.slow
def test_device_hours_of_the_night_are_shared(write_set: Write) -> None:
    """The second entry gets nothing once the first used up the night's device-hours."""
    slow = [*FAKE, *SMALL, "workers.fake.step_seconds=0.01"]
    write_set(
        {"policy": "fresh", "name": "first", "overrides": slow, "n_trials": 50},
        {"policy": "fresh", "name": "second", "overrides": slow, "n_trials": 50},
        budget={"device_hours": 1.0 / 3600},
    )
    run_night("mine", clock=_night(0))
    first, second = _record().entries.values()
    assert {first.status, second.status} == {"cut_short"}
    trial = first.seconds / sum(first.causes.values())
    assert first.seconds + second.seconds < 1.0 + trial


def test_finalists_of_earlier_nights_use_up_nothing_of_tonight(write_set: Write) -> None:
    """Last night's finalists took ten device-hours; tonight's one still trains all its trials."""
    finalists = ["hydra.sweeper.finalists.top=1", "hydra.sweeper.finalists.fresh_seeds=1"]
    entry = {"policy": "continue", "extend_by": 2, "overrides": [*FAKE, *SMALL, *finalists]}
    write_set(entry)
    run_night("mine", clock=_night(0))
    (path,) = Path("outputs/mine_lr_rank_sweep_2026-05-01/lora/finalists").glob("*/outcome.json")
    outcome = json.loads(path.read_text())
    outcome["metrics"]["cost/seconds"] = 36000.0
    path.write_text(json.dumps(outcome))
    write_set(entry, budget={"device_hours": 1.0})
    run_night("mine", clock=_night(1))
    second = _record(1).entries["lr_rank_sweep"]
    assert second.decided
    assert second.decided.seconds_before > 36000
    assert (second.status, sum(second.causes.values())) == ("done", 2)


@pytest.mark.slow
def test_worse_than_last_night_is_a_regression(write_set: Write) -> None:
    """A fresh study on the same data that ends 0.1 nats above the last one is called so."""
    write_set({"policy": "fresh"})
    run_night("mine", clock=_night(0))
    worse = [*FAKE, *SMALL, "training.learning_rate=1e-5", "hydra.sweeper.warm_start=[]"]
    write_set({"policy": "fresh", "overrides": worse})
    assert run_night("mine", clock=_night(1)) == "regression"
    assert "worse than on the previous night" in _folder(1).digest.read_text()


def test_digest_and_page_say_the_same(write_set: Write) -> None:
    """Markdown and HTML hold the best loss, the cost and the way to the report."""
    write_set({"policy": "fresh"})
    run_night("mine", clock=_night(0))
    best = _record().entries["lr_rank_sweep"].best
    assert best is not None
    for text in (_folder().digest.read_text(), _folder().page.read_text()):
        assert f"{best.value:.4f}" in text
        assert "Device-hours" in text
        assert "python -m sweeper report mine_lr_rank_sweep_2026-05-01" in text
    assert "<table>" in _folder().page.read_text()


def test_full_disk_leaves_the_digest_on_stderr(
    write_set: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no file of the night can be written, the page is printed instead."""

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    write_set({"policy": "fresh"})
    monkeypatch.setattr(nightly_run, "write_atomic", full)
    monkeypatch.setattr(nightly_run, "write_record", full)
    run_night("mine", clock=_night(0))
    printed = capsys.readouterr().err
    assert "# Nightly mine, 2026-05-01: no change" in printed
    assert "No space left on device" in printed


SCRIPT = """
import sys
from datetime import datetime
from sweeper.nightly.night_run import run_night
run_night("mine", clock=lambda: datetime.fromisoformat(sys.argv[1]))
"""


def _process(at: datetime) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, at.isoformat()], text=True, stdout=subprocess.PIPE
    )


def _wait_for_trials(count: int) -> None:
    study = Path("outputs/mine_lr_rank_sweep_2026-05-01/lora")
    while len(list(study.glob("trial_*/outcome.json"))) < count:
        time.sleep(0.05)


SLOW = [*FAKE, *SMALL, "workers.fake.step_seconds=0.02"]


@pytest.mark.slow
def test_a_killed_night_is_completed_by_the_next_firing(write_set: Write) -> None:
    """kill -9 after two trials: the next firing makes the other four, in the same study, once."""
    write_set({"policy": "fresh", "n_trials": 6, "overrides": SLOW})
    victim = _process(FIRST)
    _wait_for_trials(2)
    victim.kill()
    victim.communicate()
    assert run_night("mine", clock=lambda: FIRST + timedelta(minutes=10)) == "no change"
    entry = _record().entries["lr_rank_sweep"]
    assert sum(entry.causes.values()) == 6, "tonight's trials, from both starts"
    assert (entry.status, _record().starts) == ("done", 2)
    results = json.loads(Path("outputs/mine_lr_rank_sweep_2026-05-01/results.json").read_text())
    assert len(results["arms"]["lora"]["trials"]) == 6
    assert "started 2 times" in _folder().digest.read_text()


@pytest.mark.slow
def test_of_two_firings_one_runs(write_set: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """While a process runs the night, a second one says so and has nothing to run."""
    write_set({"policy": "fresh", "n_trials": 4, "overrides": SLOW}, overlap="queue")
    first = _process(FIRST)
    _wait_for_trials(1)
    assert run_night("mine", clock=_night(0)) is None
    assert "another process is running it" in capsys.readouterr().out
    first.communicate()
    assert first.returncode == 0
    assert _record().starts == 1


@pytest.mark.slow
@pytest.mark.parametrize(("overlap", "ran"), [("skip", False), ("queue", True), ("replace", True)])
def test_last_night_that_still_runs(write_set: Write, overlap: str, ran: bool) -> None:
    """skip leaves tonight out, queue runs it afterwards, replace stops the old night first."""
    write_set({"policy": "fresh", "n_trials": 8, "overrides": SLOW}, overlap=overlap)
    old = _process(FIRST)
    _wait_for_trials(1)
    result = run_night("mine", clock=_night(1))
    old.communicate()
    assert (result is not None) == ran
    trials = len(list(Path("outputs/mine_lr_rank_sweep_2026-05-01/lora").glob("*/outcome.json")))
    finished = NightLog(NightsFolder.under(Path("outputs"))).result("mine", date(2026, 5, 1))
    if overlap == "replace":
        assert (trials < 8, finished) == (True, None)
        assert old.returncode == -signal.SIGINT or old.returncode != 0
    else:
        assert (trials, finished) == (8, "no change")


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (compose.conf_dir() / "nightly").glob("*.yaml"))
)
def test_packaged_sets_are_valid(name: str) -> None:
    """Every set that travels with the package loads, with all its experiments."""
    loaded = load_set(name)
    assert set(loaded.plans) == {entry.label for entry in loaded.settings.experiments}


def test_wrong_sets_are_told_at_once(write_set: Write) -> None:
    """Time zone, window, policy and an experiment's override: every problem is named."""
    write_set(
        {"policy": "continue"},
        time_zone="Mars",
        window="23h",
        notify=["tgram://hunter2/chat"],
    )
    with pytest.raises(ConfigError) as error:
        load_set("mine")
    text = str(error.value)
    for words in ("'Mars' is no time zone", "at most 22h", "extend_by", "${oc.env:NAME}"):
        assert words in text
    assert "hunter2" not in text


def test_wrong_experiment_is_told_before_the_night(write_set: Write) -> None:
    """A mistyped key of an experiment stops the set before anything is claimed."""
    write_set({"policy": "fresh", "overrides": ["adapter.rr=3"]})
    with pytest.raises(ConfigError, match=r"adapter\.rr"):
        run_night("mine", clock=_night(0))
    assert not NightsFolder.under(Path("outputs")).database.exists()
