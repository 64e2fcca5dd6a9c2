"""The schedulers' files: read as what they are, and what they start is a valid command line."""

from __future__ import annotations

import configparser
import itertools
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml

from sweeper.cli.verbs import app
from sweeper.config.compose import conf_dir
from sweeper.nightly.night_record import Result
from sweeper.nightly.night_run import EXIT_CODES

ROOT = Path(__file__).resolve().parents[2]
SETS = {path.stem for path in (conf_dir() / "nightly").glob("*.yaml")}
CRONTAB = ROOT / "deploy" / "nightly.crontab"


def _unit(kind: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((ROOT / "deploy" / "systemd" / f"sweeper-nightly.{kind}").read_text())
    return unit


def _cron_job() -> dict[str, Any]:
    path = ROOT / "deploy" / "kubernetes" / "cronjob.yaml"
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


def _cron_line() -> tuple[str, str]:
    (line,) = [x for x in CRONTAB.read_text().splitlines() if x and not x.startswith("#")]
    fields = line.split(maxsplit=5)
    return " ".join(fields[:5]), fields[5]


def _pod() -> dict[str, Any]:
    pod: dict[str, Any] = _cron_job()["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return pod


def _commands() -> list[list[str]]:
    """What each scheduler starts, after `python -m sweeper`."""
    lines = [_unit("service")["Service"]["ExecStart"], _cron_line()[1]]
    docs = (ROOT / "docs" / "nightly.md").read_text()
    lines += re.findall(r"python -m sweeper (?:nightly|champion|clean)[^`\n#]*", docs)
    after = [shlex.split(line.partition("-m sweeper ")[2].partition(">>")[0]) for line in lines]
    return [*after, _pod()["containers"][0]["args"]]


@pytest.mark.parametrize("command", _commands(), ids=" ".join)
def test_commands_are_valid(command: list[str]) -> None:
    """The verb exists and takes these arguments; a set that is named is there."""
    verb, words = typer.main.get_command(app), list(command)
    while hasattr(verb, "commands"):
        verb = verb.commands[words.pop(0)]
    verb.make_context(str(verb.name), list(words))
    if command[:2] == ["nightly", "status"]:
        named = list(itertools.takewhile(lambda word: not word.startswith("-"), words[1:]))
        assert set(named) <= set(SETS)
    elif command[0] == "nightly":
        assert words[0] in SETS


def test_systemd_runs_a_missed_night_and_knows_the_exit_codes() -> None:
    """Persistent, one shot without a time limit, and a new champion or a regression is no failure."""
    timer, service = _unit("timer"), _unit("service")["Service"]
    assert timer["Timer"]["Persistent"] == "true"
    assert timer["Timer"]["Unit"] == "sweeper-nightly.service"
    assert timer["Install"]["WantedBy"] == "timers.target"
    assert (service["Type"], service["TimeoutStartSec"]) == ("oneshot", "infinity")
    fine = {EXIT_CODES["new champion"], EXIT_CODES["regression"]}
    assert {int(code) for code in service["SuccessExitStatus"].split()} == fine


def test_every_scheduler_fires_hourly() -> None:
    """The set decides which hour is the night's, so that no scheduler needs to know its time zone."""
    assert _unit("timer")["Timer"]["OnCalendar"] == "*-*-* *:07:00"
    assert _cron_line()[0] == _cron_job()["spec"]["schedule"] == "7 * * * *"


def test_cron_job_never_overlaps_and_keeps_its_memory() -> None:
    """One pod at a time, retried after an eviction, with outputs/ on a volume."""
    spec = _cron_job()["spec"]
    assert (_cron_job()["apiVersion"], _cron_job()["kind"]) == ("batch/v1", "CronJob")
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["jobTemplate"]["spec"]["backoffLimit"] >= 1
    assert _pod()["restartPolicy"] == "Never"
    (container,) = _pod()["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    claims = {volume["name"] for volume in _pod()["volumes"]}
    assert "/home/sweeper/outputs" in mounts
    assert set(mounts.values()) == claims
    assert not any(
        "value" in each for each in container["env"] if each["name"] != "MLFLOW_TRACKING_URI"
    )


def test_compose_profile_runs_the_same_crontab() -> None:
    """The nightly service starts only when asked for, and its image runs the crontab."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert services["nightly"]["profiles"] == ["nightly"]
    assert services["nightly"]["build"]["target"] == "nightly"
    assert services["nightly"]["volumes"] == services["sweep"]["volumes"]
    stage = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert stage.startswith("sweeper AS nightly")
    assert 'ENTRYPOINT ["supercronic", "-passthrough-logs", "nightly.crontab"]' in stage
    assert f"COPY deploy/{CRONTAB.name}" in stage


def test_exit_codes_stand_in_the_page() -> None:
    """docs/nightly.md lists every exit code with its meaning."""
    text = (ROOT / "docs" / "nightly.md").read_text()
    assert set(EXIT_CODES) == set(get_args(Result))
    for result, code in EXIT_CODES.items():
        assert re.search(rf"^\| {code} \| .*{result}", text, re.MULTILINE), result
