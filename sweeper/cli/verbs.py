"""The verbs of the command line, which read and steer studies. __main__ handles training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from sweeper.cli import study_verbs
from sweeper.cli.exit_codes import run_to_code
from sweeper.cli.study_verbs import OUTPUTS, OutputDir
from sweeper.core.steady_output import echo

if TYPE_CHECKING:
    from sweeper.tracking.registry import ModelRegistry, ModelVersion

VERBS = (
    *("report", "study", "best", "generate", "trial", "reproduce", "doctor", "data", "prefetch"),
    *("sync", "nightly", "champion", "clean"),
)


class VerbGroup(TyperGroup):
    """The verbs, whose errors come to their messages before typer meets them.

    Typer takes every broken pipe for a reader of the output that has left, and ends with exit code 1
    and no message. A worker that dies while it is started breaks a pipe as well. It also gives every
    stop the exit code of Ctrl-C.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        if code := run_to_code(partial(super().invoke, ctx)):
            raise typer.Exit(code)


# Each verb imports what it needs when it runs, so that --help needs no torch.
app = typer.Typer(cls=VerbGroup, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def verbs() -> None:
    """Read studies and train trials again. To train, see `python -m sweeper --help`."""


@app.command()
def report(
    names: Annotated[
        list[str] | None, typer.Argument(help="One or more study_names. Default: the newest study.")
    ] = None,
    output_dir: OutputDir = OUTPUTS,
    form: Annotated[
        str, typer.Option("--format", help="terminal, html, md, json, csv, svg or latex.")
    ] = "terminal",
    output: Annotated[Path | None, typer.Option(help="File to write to.")] = None,
) -> None:
    """Show leaderboards, comparison and verdict of studies, or write an HTML page with every figure."""
    from sweeper.commands.newest_study import named_or_newest
    from sweeper.core.errors import ConfigError
    from sweeper.core.paths import write_atomic
    from sweeper.reporting.console import make_console
    from sweeper.reporting.live_view import print_results
    from sweeper.reporting.report_formats import FORMATS, WRITERS, default_path
    from sweeper.reporting.results import load_results

    if form not in FORMATS:
        raise ConfigError([f"--format {form}: no such format. Choose {', '.join(FORMATS)}"])
    names = names or [named_or_newest(None, output_dir, "results.json")]
    if form == "svg" and len(names) > 1:
        raise ConfigError(["--format svg: a picture shows one study. Name only one"])
    results = [load_results(name, output_dir) for name in names]
    if form == "terminal":
        if output is not None:
            raise ConfigError([f"--output {output}: terminal output has no file. Add --format"])
        for found in results:
            print_results(found, make_console())
        return
    text = WRITERS[form](results, output_dir)
    path = output or (default_path(results, output_dir) if form == "html" else None)
    if path is None:
        echo(text, end="")
    else:
        write_atomic(path, text)
        echo(path)


@app.command()
def best(
    name: Annotated[
        str | None, typer.Argument(help="The study_name. Default: the newest study.")
    ] = None,
    output_dir: OutputDir = OUTPUTS,
    arm: Annotated[
        str | None, typer.Option(help="Name of the arm. Default: the first one.")
    ] = None,
    number: Annotated[
        int | None, typer.Option("--trial", help="This trial instead of the best.")
    ] = None,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="Print it as an experiment's YAML.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Print only the folder of its adapter.")
    ] = False,
    merge: Annotated[Path | None, typer.Option(help="Folder for the merged model.")] = None,
    ollama: Annotated[
        Path | None, typer.Option(help="Folder for the merged model and a Modelfile of Ollama.")
    ] = None,
) -> None:
    """Show how to load, query, serve, merge, publish and retrain a study's winner."""
    from sweeper.commands.newest_study import named_or_newest
    from sweeper.core.errors import ConfigError
    from sweeper.core.paths import StudyFolder
    from sweeper.reporting.results import load_results
    from sweeper.reporting.winner import experiment_yaml, find_winner, usage

    if as_yaml + adapter + (merge is not None) + (ollama is not None) > 1:
        raise ConfigError(
            ["--yaml, --adapter, --merge and --ollama exclude each other. Give one of them"]
        )
    name = named_or_newest(name, output_dir, "results.json")
    results = load_results(name, output_dir)
    winner = find_winner(results, StudyFolder(output_dir / name), arm, number)
    if as_yaml:
        echo(experiment_yaml(winner), end="")
    elif adapter:
        echo(winner.artifact)
    elif merge is not None:
        _quiet()
        from sweeper.training.export import merge_trial

        merge_trial(winner.settings, winner.folder, merge)
        echo(merge)
    elif ollama is not None:
        _quiet()
        from sweeper.commands.ollama_export import export_ollama

        echo(export_ollama(winner, ollama))
    else:
        echo(usage(winner))


@app.command()
def generate(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of trials, or their adapter/.")],
    prompt: Annotated[list[str], typer.Option(help="Prompt. May be given several times.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 128,
) -> None:
    """Answer prompts with the untuned base and with adapters, side by side, on one loaded base."""
    _quiet()
    from sweeper.commands.generate import side_by_side

    for answered in side_by_side(adapters, prompt, max_new_tokens):
        echo(f"\n# {answered.prompt}")
        for name, answer in answered.answers.items():
            echo(f"\n## {name}\n{answer.strip()}")


@app.command()
def trial(
    folder: Annotated[Path, typer.Argument(help="Folder of a trial, with its config.yaml.")],
    into: Annotated[Path, typer.Option(help="Folder of the new trial.")],
) -> None:
    """Train a trial again from its config.yaml. `sweeper reproduce` also compares it with its record."""
    from sweeper.commands.run_trial import run_single
    from sweeper.config.compose import compose, read_yaml
    from sweeper.config.settings import RunSettings, stored_settings, validate
    from sweeper.config.trusted_files import require_trusted_modules
    from sweeper.core.errors import StudyError
    from sweeper.core.paths import TrialFolder

    source = TrialFolder(folder).config
    if not source.exists():
        raise StudyError(
            f"{source}: no such file. Give a folder like outputs/STUDY/lora/trial_0007"
        )
    stored = read_yaml(source)
    trial = stored_settings(stored).model_dump(mode="json")
    # today's machinery, then what the file says about it, then the trial as this version reads it
    settings = validate(RunSettings, {**compose([]).config, **stored, **trial})
    require_trusted_modules(settings.evaluation, source)
    run_single(settings, TrialFolder(into), f"trial {folder} --into {into}")


@app.command()
def reproduce(
    run: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a trial, MLflow run id, STUDY/ARM/NUMBER, or STUDY (its winner). "
            "Default: the newest study."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Only of workers and tracking: workers=inline")
    ] = None,
    into: Annotated[Path | None, typer.Option(help="Folder of the new trial.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Allowed difference, in the metric's unit.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
    output_dir: OutputDir = OUTPUTS,
) -> None:
    """Train a recorded trial again and compare it with its record (docs/reproduce.md).

    Exit codes: 0 reproduced, 1 not possible, 2 wrong argument, 10 another value or a failed training,
    11 other data or another base, not trained.
    """
    from sweeper.commands import reproduce as again
    from sweeper.commands.newest_study import named_or_newest
    from sweeper.config.settings import TrackingSettings, validate
    from sweeper.core.paths import TrialFolder
    from sweeper.core.quiet import silence_libraries
    from sweeper.reporting.console import make_console
    from sweeper.tracking.tracker_factory import make_store

    # An override, without a study before it
    if run is not None and "=" in run and not Path(run).exists():
        overrides, run = [run, *(overrides or [])], None
    machine = again.machinery(overrides or [])
    store = make_store(validate(TrackingSettings, machine["tracking"], "tracking"))
    run = named_or_newest(run, output_dir, "results.json")
    record = again.find_record(run, output_dir, store)
    silence_libraries()
    folder = TrialFolder(into or again.new_folder(output_dir, record))
    console = make_console(stderr=as_json)
    found = again.reproduce(record, machine, folder, console, tolerance)
    echo(again.to_json(found) if as_json else again.describe(found))
    raise typer.Exit(again.EXIT_CODES[found.verdict])


@app.command()
def prefetch(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="The overrides of the training: +experiment=X data.train=org/name"),
    ] = None,
) -> None:
    """Download what these overrides need into the hub cache, for workers without a network."""
    from sweeper.config.compose import complete_overrides
    from sweeper.data.prefetch import prefetch as fetch
    from sweeper.search.study_plan import single, studies

    given = complete_overrides(overrides or [], Path.cwd())
    if any(text.startswith("+experiment=") for text in given):
        settings = [arm.settings for plan in studies(given) for arm in plan.arms]
    else:
        settings = [single(given)]
    for fetched in fetch(settings):
        echo(fetched)


@app.command()
def data(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="The overrides of the training: +experiment=X data.train=my.jsonl"),
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows of each split that are shown.")] = 2,
) -> None:
    """Show what of the data is read, dropped, changed and trained, without loading a model."""
    from sweeper.commands.data_report import report_data
    from sweeper.config.compose import complete_overrides
    from sweeper.core.quiet import silence_libraries
    from sweeper.reporting.console import make_console
    from sweeper.search.study_plan import single, studies

    given = complete_overrides(overrides or [], Path.cwd())
    if any(text.startswith("+experiment=") for text in given):
        settings = [arm.settings for plan in studies(given) for arm in plan.arms]
    else:
        settings = [single(given)]
    silence_libraries()
    report_data(settings, make_console(), rows)


@app.command()
def doctor(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="The overrides of the planned training.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Check devices, packages, disk, tokens, MLflow and the database. Exit with 1 if a check fails."""
    from sweeper.commands.doctor import examine, print_findings, sound, to_json
    from sweeper.reporting.console import make_console

    findings = examine(overrides or [])
    if as_json:
        echo(to_json(findings))
    else:
        print_findings(findings, make_console())
    raise typer.Exit(0 if sound(findings) else 1)


@app.command()
def sync(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME…] [tracking.uri=…]", help="Studies. Default: all in --output-dir."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only print what MLflow lacks.")] = False,
    output_dir: OutputDir = OUTPUTS,
) -> None:
    """Record in MLflow what an outage or a kill left out (docs/servers.md).

    Exit codes: 0 MLflow has everything, 1 something is left or a study is running, 2 a wrong setting.
    """
    from sweeper.commands.sync import sync as record
    from sweeper.search.study_plan import single

    names = [argument for argument in arguments or [] if "=" not in argument]
    tracking = single([argument for argument in arguments or [] if "=" in argument]).tracking
    whole = True
    for synced in record(names, output_dir, tracking, dry_run=dry_run):
        echo(synced)
        whole = whole and synced.whole
    raise typer.Exit(0 if whole or dry_run else 1)


@app.command()
def nightly(
    name: Annotated[str, typer.Argument(help="Name of a set: conf/nightly/NAME.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of the set: nightly.budget.wall_clock=2h")
    ] = None,
    max_age: Annotated[
        str | None, typer.Option(help="With status: a set is late after so long, such as 26h.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With status: print JSON.")] = False,
    output_dir: OutputDir = OUTPUTS,
) -> None:
    """Run a set of experiments once per night, however often this is started (docs/nightly.md).

    Exit codes: 0 no change or nothing to run, 1 failure, 2 wrong configuration, 10 new champion,
    11 regression. `nightly status [SET…]` shows each set's latest night instead, with exit code 1 if
    one is late.
    """
    if name == "status":
        return _nightly_status(overrides or [], max_age, as_json, output_dir)
    from sweeper.nightly.night_run import EXIT_CODES, run_night

    result = run_night(name, overrides or [])
    raise typer.Exit(0 if result is None else EXIT_CODES[result])


def _nightly_status(names: list[str], max_age: str | None, as_json: bool, output_dir: Path) -> None:
    import json
    from datetime import UTC, datetime, timedelta

    from sweeper.config.settings import parse_duration
    from sweeper.core.errors import ConfigError
    from sweeper.core.paths import NightsFolder
    from sweeper.nightly.night_watch import set_statuses

    try:
        seconds = parse_duration(max_age)
    except ValueError as error:
        raise ConfigError([f"--max-age: {error}"]) from None
    limit = timedelta(seconds=seconds) if isinstance(seconds, int | float) else None
    found = set_statuses(NightsFolder.under(output_dir), names, limit, datetime.now(UTC))
    if as_json:
        echo(json.dumps([each.model_dump(mode="json") for each in found], indent=2))
    for each in found if not as_json else ():
        echo(each)
    if not found:
        echo(f"no night has ever run under {output_dir}/", stderr=True)
    raise typer.Exit(1 if not found or any(each.late for each in found) else 0)


@app.command()
def clean(
    name: Annotated[str | None, typer.Argument(help="The study_name. Not with --bases.")] = None,
    keep_adapters: Annotated[int, typer.Option(min=0, help="Number of best adapters to keep.")] = 3,
    dry_run: Annotated[bool, typer.Option(help="Only print what would be deleted.")] = False,
    output_dir: OutputDir = OUTPUTS,
    bases: Annotated[
        bool, typer.Option("--bases", help="Empty the cache of quantized bases instead.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="tracking=… of the registry whose champions stay.")
    ] = None,
) -> None:
    """Delete the weights of a study's losers. The winners' weights, metrics and reports stay."""
    from sweeper.commands.retention import removals, remove
    from sweeper.core.errors import ConfigError

    if (name is None) != bases:
        raise ConfigError(["Name the study to clean, or give only --bases"])
    if name is None:
        return _clean_bases(dry_run)
    # Asked first: if the registry is away, nothing is deleted.
    held = [found.folder for found in _registry_champions(overrides or [])]
    found = removals(name, output_dir, keep_adapters, held)
    for removal in found:
        echo(f"{removal.mib:10.1f} MiB  {removal.path}  ({removal.why})")
    if not dry_run:
        remove(name, output_dir, found)
    done = "would be freed" if dry_run else "freed"
    echo(f"{sum(removal.mib for removal in found):10.1f} MiB {done}")


def _clean_bases(dry_run: bool) -> None:
    from sweeper.modeling.quantized_cache import cache_folder, forget

    found = forget(cache_folder(), dry_run=dry_run)
    for path, mib in found.items():
        echo(f"{mib:10.1f} MiB  {path}")
    echo(f"{sum(found.values()):10.1f} MiB {'would be freed' if dry_run else 'freed'}")


app.add_typer(study_verbs.app, name="study")

champions = typer.Typer(no_args_is_help=True, help="Show or change the champion, the model in use.")
app.add_typer(champions, name="champion")


def _not_empty(name: str) -> str:
    if not name.strip():
        raise typer.BadParameter("the name is empty")
    return name


Model = Annotated[
    str,
    typer.Argument(
        callback=_not_empty, help="Name of the registered model, an entry of a nightly set."
    ),
]
Where = Annotated[
    list[str] | None, typer.Argument(help="Override of the MLflow server: tracking.uri=…")
]


@champions.command()
def show(model: Model, overrides: Where = None) -> None:
    """Show the champion with its version, its trial and the evidence for it."""
    registry = _registry(overrides or [])
    version = registry.champion(model)
    if version is None:
        registry.require_model(model)
        echo(f"{model}: no champion yet")
        return
    echo(f"{model}: version {version.number}, trial {version.trial} of {version.study}")
    for key, value in sorted(version.tags.items()):
        echo(f"  {key}: {value}")


@champions.command()
def promote(
    model: Model,
    study: Annotated[str, typer.Argument(help="The study_name.")],
    trial: Annotated[str, typer.Argument(help="Arm and number, such as lora/0007.")],
    overrides: Where = None,
) -> None:
    """Make a trial's adapter the champion by hand."""
    tags = {"sweeper.promoted_by": "hand"}
    version = _registry(overrides or []).promote(model, study, trial, tags)
    echo(f"{model}: version {version.number} is the champion")


@champions.command()
def certify(
    model: Model,
    overrides: Where = None,
    output_dir: OutputDir = OUTPUTS,
) -> None:
    """Judge the champion on the test split, which no night reads. Each evaluation is recorded."""
    _quiet()
    from sweeper.nightly.certify import certify as look
    from sweeper.nightly.certify import evaluation_by_study

    registry = _registry(overrides or [])
    certificate = look(model, registry)
    echo(certificate.words)
    champion = registry.champion(model)
    also = None if champion is None else evaluation_by_study(champion, output_dir)
    if also is not None:
        echo(also)


@champions.command()
def rollback(model: Model, overrides: Where = None) -> None:
    """Make the previous champion the champion again."""
    version = _registry(overrides or []).rollback(model)
    echo(f"{model}: version {version.number} is the champion again")


def _quiet() -> None:
    """Silence the warnings and progress bars of libraries before a model is loaded."""
    from sweeper.core.quiet import silence_libraries

    silence_libraries()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _registry(overrides: list[str]) -> ModelRegistry:
    from sweeper.core.errors import ConfigError
    from sweeper.search.study_plan import single
    from sweeper.tracking.tracker_factory import make_registry

    registry = make_registry(single(overrides).tracking)
    if registry is None:
        raise ConfigError(
            ["tracking=none: there is no registry without MLflow. Use tracking=mlflow"]
        )
    return registry


def _registry_champions(overrides: list[str]) -> list[ModelVersion]:
    """Return the champions of all models, or [] without MLflow. Their weights are never deleted."""
    from sweeper.search.study_plan import single
    from sweeper.tracking.tracker_factory import make_registry

    registry = make_registry(single(overrides).tracking)
    return [] if registry is None else registry.champions()
