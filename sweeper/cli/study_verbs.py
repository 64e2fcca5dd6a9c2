"""`sweeper study …`: show studies and steer them while they run (docs/steering.md).

Exit codes of the verbs that steer: 0 applied, 2 refused or wrong, 3 kept until a driver answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sweeper.core.steady_output import echo

if TYPE_CHECKING:
    from sweeper.driver.command_files import StudyCommand

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Show studies and steer them while they run. Exit codes: 0 applied, "
    "2 refused or wrong, 3 kept because no driver has answered.",
)
Name = Annotated[str, typer.Argument(help="The study_name.")]
NameOrNewest = Annotated[
    str | None, typer.Argument(help="The study_name. Default: the newest study.")
]
OutputDir = Annotated[
    Path, typer.Option("--output-dir", file_okay=False, help="Where studies are kept.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Patience = Annotated[
    float, typer.Option("--timeout", min=0, help="Seconds to wait for the driver's answer.")
]
OneArm = Annotated[
    str | None, typer.Option("--arm", help="Name of the arm. Default: the first one.")
]
Number = Annotated[int, typer.Argument(min=0, help="The earlier trial's number.")]
Values = Annotated[list[str], typer.Argument(help="KEY=VALUE of searched keys.")]

# the default of output_dir in conf/config.yaml
OUTPUTS = Path("outputs")
TIMEOUT_S = 10.0
"""Default of --timeout in seconds. A judgement: a driver obeys within a turn of a second or two."""


@app.command(name="list")
def list_studies(output_dir: OutputDir = OUTPUTS, as_json: Json = False) -> None:
    """Show all studies: state, trials, best value, remaining budget."""
    from sweeper.commands.steer import silent, standings, unreadable
    from sweeper.reporting.console import make_console
    from sweeper.reporting.status_tables import status_sheet

    found = standings(output_dir)
    if as_json:
        _print_json([each.model_dump(mode="json") for each in found])
    elif found:
        make_console().print(status_sheet(found, f"Studies under {output_dir}/").draw())
    else:
        echo(f"there are no studies under {output_dir}/")
    for problem in unreadable(output_dir):
        echo(problem, stderr=True)
    if (names := silent(output_dir)) and not as_json:
        echo(f"of another version, see sweeper report: {', '.join(names)}")


@app.command()
def show(name: NameOrNewest = None, output_dir: OutputDir = OUTPUTS, as_json: Json = False) -> None:
    """Show one study: arms, running trials with their progress, best, queue, remaining budget."""
    from sweeper.commands.newest_study import named_or_newest
    from sweeper.commands.steer import standing, study_folder
    from sweeper.reporting.console import make_console
    from sweeper.reporting.status_tables import print_status

    name = named_or_newest(name, output_dir, "standing.json")
    found = standing(study_folder(name, output_dir))
    if as_json:
        _print_json(found.model_dump(mode="json"))
    else:
        print_status(found, make_console())


@app.command()
def pause(
    name: NameOrNewest = None,
    timeout: Patience = TIMEOUT_S,
    output_dir: OutputDir = OUTPUTS,
    as_json: Json = False,
) -> None:
    """Stop the running trials with a checkpoint and free their devices. The driver keeps running."""
    from sweeper.driver.command_files import PauseStudy

    _steer(name, PauseStudy(), timeout, output_dir, as_json)


@app.command()
def resume(
    name: NameOrNewest = None,
    timeout: Patience = TIMEOUT_S,
    output_dir: OutputDir = OUTPUTS,
    as_json: Json = False,
) -> None:
    """Continue after a pause, or cancel a stop that still waits for trials."""
    from sweeper.driver.command_files import ResumeStudy

    _steer(name, ResumeStudy(), timeout, output_dir, as_json)


@app.command()
def stop(
    name: NameOrNewest = None,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for running trials.")] = False,
    trial: Annotated[int | None, typer.Option(min=0, help="End this one trial for good.")] = None,
    arm: OneArm = None,
    timeout: Patience = TIMEOUT_S,
    output_dir: OutputDir = OUTPUTS,
    as_json: Json = False,
) -> None:
    """Start no new trial and end after the running ones, or end a single trial."""
    from sweeper.core.errors import CommandRefused
    from sweeper.driver.command_files import StopStudy, StopTrial

    if trial is None and arm is not None:
        raise CommandRefused(f"--arm {arm}: only with --trial. A study is stopped as a whole")
    if trial is not None and now:
        raise CommandRefused("--now: a single trial is always stopped at once. Leave it out")
    command = StopStudy(now=now) if trial is None else StopTrial(trial=trial, arm=arm)
    _steer(name, command, timeout, output_dir, as_json)


@app.command()
def extend(
    # at most MAX_TRIALS of sweeper.driver.command_files
    trials: Annotated[int, typer.Option(min=1, max=100_000, help="How many more.")],
    name: NameOrNewest = None,
    arm: OneArm = None,
    timeout: Patience = TIMEOUT_S,
    output_dir: OutputDir = OUTPUTS,
    as_json: Json = False,
) -> None:
    """Add trials to an arm's n_trials."""
    from sweeper.driver.command_files import ExtendArm

    _steer(name, ExtendArm(trials=trials, arm=arm), timeout, output_dir, as_json)


@app.command()
def enqueue(
    name: Name,
    values: Values,
    arm: OneArm = None,
    timeout: Patience = TIMEOUT_S,
    output_dir: OutputDir = OUTPUTS,
    as_json: Json = False,
) -> None:
    """Try a point next. The sampler draws the keys that are left out."""
    from sweeper.commands.steer import values_of
    from sweeper.driver.command_files import EnqueuePoint

    command = EnqueuePoint(values=values_of(values), arm=arm)
    _steer(name, command, timeout, output_dir, as_json)


@app.command()
def clone(
    name: Name,
    trial: Number,
    values: Values,
    arm: OneArm = None,
    timeout: Patience = TIMEOUT_S,
    output_dir: OutputDir = OUTPUTS,
    as_json: Json = False,
) -> None:
    """Try the point of an earlier trial next, with some values changed."""
    from sweeper.commands.steer import values_of
    from sweeper.driver.command_files import CloneTrial

    command = CloneTrial(trial=trial, values=values_of(values), arm=arm)
    _steer(name, command, timeout, output_dir, as_json)


def _steer(
    name: str | None, command: StudyCommand, timeout_s: float, output_dir: Path, as_json: bool
) -> None:
    from sweeper.commands.newest_study import named_or_newest
    from sweeper.commands.steer import REFUSED, steer, study_folder

    name = named_or_newest(name, output_dir, "standing.json")
    reply = steer(study_folder(name, output_dir), command, timeout_s)
    if as_json:
        _print_json(reply.document(name, command))
    else:
        echo(f"{name}: {reply.text}", stderr=reply.exit_code == REFUSED)
    raise typer.Exit(reply.exit_code)


def _print_json(value: object) -> None:
    echo(json.dumps(value, indent=2, ensure_ascii=False))
