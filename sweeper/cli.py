"""The verbs: reading and steering. Training is Hydra overrides (see __main__)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

VERBS = ("report", "best", "generate", "trial", "doctor", "prefetch", "build-base")

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def verbs() -> None:
    """Read studies and re-run trials; to train, see `python -m sweeper --help`."""


@app.command()
def report(
    names: Annotated[list[str], typer.Argument(help="One study_name or several.")],
    output_dir: Annotated[Path, typer.Option(help="Where studies are kept.")] = Path("outputs"),
    form: Annotated[
        str, typer.Option("--format", help="terminal, html, md, json, csv or svg.")
    ] = "terminal",
    output: Annotated[Path | None, typer.Option(help="Write to this file.")] = None,
) -> None:
    """Show studies: leaderboards, comparison, verdict; as one HTML page with every figure."""
    from sweeper.errors import ConfigError
    from sweeper.folders import write_atomic
    from sweeper.reporting.formats import FORMATS, WRITERS, default_path
    from sweeper.reporting.results import load_results
    from sweeper.reporting.view import make_console, print_results

    if form not in FORMATS:
        raise ConfigError([f"--format {form}: no such format; choose {', '.join(FORMATS)}"])
    if form == "svg" and len(names) > 1:
        raise ConfigError(["--format svg: a picture shows one study; name one"])
    results = [load_results(name, output_dir) for name in names]
    if form == "terminal":
        if output is not None:
            raise ConfigError([f"--output {output}: a terminal has no file; add --format"])
        for found in results:
            print_results(found, make_console())
        return
    text = WRITERS[form](results, output_dir)
    path = output or (default_path(results, output_dir) if form == "html" else None)
    if path is None:
        typer.echo(text, nl=False)
    else:
        write_atomic(path, text)
        typer.echo(path)


@app.command()
def best(
    name: Annotated[str, typer.Argument(help="The study_name.")],
    output_dir: Annotated[Path, typer.Option(help="Where studies are kept.")] = Path("outputs"),
    arm: Annotated[str | None, typer.Option(help="Of which arm; the first one's.")] = None,
    number: Annotated[int | None, typer.Option("--trial", help="Not the best, but this.")] = None,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print it as an experiment.")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="Print its folder alone.")] = False,
    merge: Annotated[Path | None, typer.Option(help="Merge it with its base into this.")] = None,
) -> None:
    """Use a study's winner: how to load, ask, serve, merge, publish and train it again."""
    from sweeper.errors import ConfigError
    from sweeper.folders import StudyFolder
    from sweeper.reporting.results import load_results
    from sweeper.reporting.winner import experiment_yaml, find_winner, usage

    if as_yaml + adapter + (merge is not None) > 1:
        raise ConfigError(["--yaml, --adapter and --merge: give one of them"])
    results = load_results(name, output_dir)
    winner = find_winner(results, StudyFolder(output_dir / name), arm, number)
    if as_yaml:
        typer.echo(experiment_yaml(winner), nl=False)
    elif adapter:
        typer.echo(winner.artifact)
    elif merge is not None:
        _quiet()
        from sweeper.training.export import merge_trial

        merge_trial(winner.settings, winner.folder, merge)
        typer.echo(merge)
    else:
        typer.echo(usage(winner))


@app.command()
def generate(
    adapters: Annotated[list[Path], typer.Argument(help="Trials' folders or their adapter/.")],
    prompt: Annotated[list[str], typer.Option(help="What to ask; may be given several times.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 128,
) -> None:
    """Ask the untuned base and adapters the same prompts, side by side on one loaded base."""
    _quiet()
    from sweeper.answers import side_by_side

    for asked in side_by_side(adapters, prompt, max_new_tokens):
        typer.echo(f"\n# {asked.prompt}")
        for name, answer in asked.answers.items():
            typer.echo(f"\n## {name}\n{answer.strip()}")


@app.command()
def trial(
    folder: Annotated[Path, typer.Argument(help="A trial's folder, with its config.yaml.")],
    into: Annotated[Path, typer.Option(help="Where the new trial goes.")],
) -> None:
    """Train a trial again by hand, from the config.yaml of an earlier one."""
    from sweeper.compose import compose, read_yaml
    from sweeper.errors import StudyError
    from sweeper.folders import TrialFolder
    from sweeper.settings import Settings, validate
    from sweeper.single import run_single

    source = TrialFolder(folder).config
    if not source.exists():
        raise StudyError(
            f"{source}: no such file; give a folder like outputs/STUDY/lora/trial_0007"
        )
    settings = validate(Settings, {**compose([]).config, **read_yaml(source)})
    run_single(settings, TrialFolder(into), f"trial {folder} --into {into}")


@app.command()
def prefetch(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="As for training: +experiment=X data.train=org/name")
    ] = None,
) -> None:
    """Fill the hub cache with all that these overrides need, for workers without a network."""
    from sweeper.compose import with_user_conf
    from sweeper.data.prefetch import prefetch as fetch
    from sweeper.search.plan import single, studies

    given = with_user_conf(overrides or [], Path.cwd())
    if any(text.startswith("+experiment=") for text in given):
        settings = [arm.settings for plan in studies(given) for arm in plan.arms]
    else:
        settings = [single(given)]
    for fetched in fetch(settings):
        typer.echo(fetched)


@app.command()
def doctor(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="What would be trained, as overrides.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Check devices, packages, disk, tokens, MLflow and the database; exit code 1 if one fails."""
    from sweeper.doctor import examine, print_findings, sound, to_json
    from sweeper.reporting.view import make_console

    findings = examine(overrides or [])
    if as_json:
        typer.echo(to_json(findings))
    else:
        print_findings(findings, make_console())
    raise typer.Exit(0 if sound(findings) else 1)


@app.command(name="build-base")
def build_base(
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 2_600_000,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
) -> None:
    """Pre-train the embedded base model again from the standard library's text (minutes)."""
    from sweeper.embedded.pretrain import build_base as build

    build(out, tokens=tokens, seed=seed)


def _quiet() -> None:
    """Before a model is loaded here: the answer shall not stand between libraries' warnings and bars."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # names a kernel that is not needed
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
