"""The command line: verbs go to typer, everything else to Hydra.

Kept light: spawned workers import this module, and --help must answer at once.
"""

from __future__ import annotations

import itertools
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from sweeper.core.errors import ConfigError, SweeperError
from sweeper.core.redaction import holds_password, redact

MAX_OVERRIDE = 10_000
MAX_OVERRIDES = 1_000
MAX_NESTED = 50
"""Brackets inside each other in one override; Hydra's parser calls itself for each."""


def main() -> None:
    """Entry point of `sweeper` and `python -m sweeper`."""
    argv = sys.argv[1:]
    from sweeper.cli.verbs import VERBS

    try:
        if argv and argv[0] in VERBS:
            from sweeper.cli.verbs import app

            app(prog_name="sweeper")
        else:
            _hydra(argv)
    except SweeperError as error:
        print(redact(str(error)), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        sys.exit(getattr(stop, "exit_code", 128 + signal.SIGINT))


def run_studies(overrides: Sequence[str]) -> None:
    """Run the studies of a command line one after the other (called by the Hydra plugin)."""
    from sweeper.commands.run_study import run_study
    from sweeper.search.study_plan import studies

    _or_exit(lambda: [run_study(plan) for plan in studies(overrides)])


def _hydra(argv: Sequence[str]) -> None:
    """Check the whole command line, then let Hydra run it."""
    from sweeper.cli.verbs import VERBS
    from sweeper.config import compose
    from sweeper.search.study_plan import single, studies

    refuse_overrides([text for text in argv if not text.startswith("-")])
    line = compose.parse_command_line(argv)
    if line.overrides and line.overrides[0].isidentifier():
        raise ConfigError([f"{line.overrides[0]}: no such verb; verbs: {', '.join(VERBS)}"])
    compose.refuse_unknown_flags(line.flags)
    overrides = compose.with_user_conf(line.overrides, Path.cwd())
    if line.trains:
        plans = studies(overrides) if line.multirun else [single(overrides)]
        if any(plan.dry_run for plan in plans):  # before Hydra makes a folder
            from sweeper.commands.dry_run import show

            return show(plans)
    elif not {"-c", "--cfg"}.isdisjoint(line.flags):
        overrides = compose.with_auto_groups(overrides)  # what is shown is what would run
    sys.argv = [sys.argv[0], *line.flags, *overrides]
    _hydra_application()


def refuse_overrides(overrides: Sequence[str]) -> None:
    """What no override may be, before any parser sees it.

    Raises:
        ConfigError: it holds a password (a command line is seen by every user of the machine, and is
            stored with the results), or it is longer or deeper than anybody writes.
    """
    keys = [text.partition("=")[0][:80] for text in overrides if holds_password(text)]
    problems = [
        f"{key}: holds a password, which the process list shows to everybody; put the URL into "
        f"an environment variable and write '{key}=${{oc.env:NAME}}'"
        for key in keys
    ]
    long = [text for text in overrides if len(text) > MAX_OVERRIDE]
    problems += [f"{text[:40]}…: is longer than {MAX_OVERRIDE} characters" for text in long]
    deep = [text for text in overrides if _nested(text) > MAX_NESTED]
    problems += [f"{text[:40]}…: nested deeper than {MAX_NESTED} levels" for text in deep]
    if len(overrides) > MAX_OVERRIDES:
        problems.append(f"{len(overrides):,} overrides; at most {MAX_OVERRIDES:,}")
    if problems:
        raise ConfigError(problems)


def _nested(text: str) -> int:
    """How many brackets are open at once."""
    steps = (1 if letter in "[{(" else -1 if letter in "]})" else 0 for letter in text)
    return max(itertools.accumulate(steps, initial=0))


def _hydra_application() -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from sweeper.config import compose

    def application(config: DictConfig) -> None:
        from sweeper.commands.run_trial import run_single
        from sweeper.core.paths import TrialFolder
        from sweeper.search.study_plan import single

        hydra_config = HydraConfig.get()
        overrides = [*hydra_config.overrides.hydra, *hydra_config.overrides.task]
        folder = TrialFolder(Path(hydra_config.runtime.output_dir))
        _or_exit(lambda: run_single(single(overrides), folder, shlex.join(overrides)))

    decorate = hydra.main(str(compose.conf_dir()), "config", version_base="1.3")
    decorate(application)()


def _or_exit(run: object) -> None:
    """Hydra prints a stack trace for exceptions, but lets SystemExit pass."""
    assert callable(run)
    try:
        run()
    except SweeperError as error:
        print(redact(str(error)), file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
