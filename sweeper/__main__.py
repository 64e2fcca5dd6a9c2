"""The command line: verbs go to typer, everything else to Hydra.

Kept light: spawned workers import this module, and --help must answer at once.
"""

from __future__ import annotations

import difflib
import itertools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sweeper.cli.exit_codes import run_to_code
from sweeper.core.errors import ConfigError
from sweeper.core.redaction import holds_password
from sweeper.core.steady_output import steady_output

if TYPE_CHECKING:
    from sweeper.config.compose import CommandLine
    from sweeper.config.settings import RunSettings
    from sweeper.search.study_plan import StudyPlan

# beyond what anyone types: a megabyte is refused at once, before Hydra's parser reads it
MAX_OVERRIDE = 10_000
MAX_OVERRIDES = 1_000
MAX_NESTED = 50
"""Brackets inside each other in one override. Hydra's parser calls itself for each."""


def main() -> None:
    """Entry point of `sweeper` and `python -m sweeper`."""
    with steady_output():
        code = run_to_code(lambda: _run(sys.argv[1:]))
    if code:
        sys.exit(code)


def _run(argv: Sequence[str]) -> None:
    from sweeper.cli.verbs import VERBS

    if argv and argv[0] in VERBS:
        from sweeper.cli.verbs import app

        app(prog_name="sweeper")
    else:
        _hydra(argv)


def run_studies(overrides: Sequence[str]) -> None:
    """Run the studies of a command line one after the other (called by the Hydra plugin)."""
    from sweeper.commands.run_study import run_study
    from sweeper.search.study_plan import studies

    _or_exit(lambda: [run_study(plan) for plan in studies(overrides)])


def _hydra(argv: Sequence[str]) -> None:
    """Check the whole command line, then let Hydra run it."""
    from sweeper.config import compose

    refuse_overrides([text for text in argv if not text.startswith("-")])
    line = compose.parse_command_line(argv)
    kept, words = _sorted_words(line.overrides, compose.experiment_names(Path.cwd()))
    overrides = compose.complete_overrides(kept, Path.cwd())
    wrong_flags = compose.flag_problems(line.flags)
    problems = [*wrong_flags, *words]
    plans: Sequence[StudyPlan | RunSettings] = []
    try:
        # beside a wrong flag the overrides are checked as if they were to be trained
        plans, overrides = _checked(line.without_wrong_flags() if wrong_flags else line, overrides)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    if any(plan.dry_run for plan in plans):  # before Hydra makes a folder
        from sweeper.commands.dry_run import show

        return show(plans)
    # Hydra reads its command line from there
    sys.argv = [sys.argv[0], *line.flags, *overrides]
    _hydra_application()


def _checked(
    line: CommandLine, overrides: list[str]
) -> tuple[Sequence[StudyPlan | RunSettings], list[str]]:
    """Return what a command line would run, and the overrides that Hydra is to be given.

    Raises:
        ConfigError: everything that is wrong with the overrides.
    """
    from sweeper.config import compose
    from sweeper.search.study_plan import studies

    if line.multirun and line.trains:
        return studies(overrides), overrides
    if line.trains:
        return [_single(overrides)], overrides
    if {"-c", "--cfg"}.isdisjoint(line.flags):
        return [], overrides
    fixed, _ = compose.split_sweeps(overrides) if line.multirun else (overrides, {})
    _, problems = compose.compose_leniently(fixed)
    if problems:
        raise ConfigError(problems)
    return [], compose.with_auto_groups(overrides)  # what is shown is what would run


def _single(overrides: Sequence[str]) -> RunSettings:
    """Return the settings of a single trial, for which a study's settings would do nothing."""
    from sweeper.config.override_hints import needs_study
    from sweeper.search.study_plan import single

    problems = [problem for problem in map(needs_study, overrides) if problem is not None]
    try:
        settings = single(overrides)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return settings


def _sorted_words(words: Sequence[str], experiments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments that are overrides, and what is wrong with the others."""
    from sweeper.cli.verbs import VERBS
    from sweeper.config.override_hints import is_override, refused_words

    overrides = [text for text in words if is_override(text)]
    others = [text for text in words if not is_override(text)]
    first = words[0] if words else ""
    if first.isidentifier() and first not in experiments:
        close = difflib.get_close_matches(first, VERBS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        # the words behind a misspelt verb are its arguments, so nothing is said about them
        return overrides, [f"{first}: no such verb; {meant}verbs: {', '.join(VERBS)}"]
    return overrides, refused_words(others, experiments)


def refuse_overrides(overrides: Sequence[str]) -> None:
    """Check overrides before any parser sees them.

    Raises:
        ConfigError: an override holds a password (every user of the machine sees a command line, and
            the results store it), or is longer or more deeply nested than the limits.
    """
    keys = [text.partition("=")[0][:80] for text in overrides if holds_password(text)]
    problems = [
        f"{key}: holds a password, which the process list shows to every user. Put the URL into "
        f"an environment variable and write '{key}=${{oc.env:NAME}}'"
        for key in keys
    ]
    long = [text for text in overrides if len(text) > MAX_OVERRIDE]
    problems += [f"{text[:40]}…: is longer than {MAX_OVERRIDE:,} characters" for text in long]
    deep = [text for text in overrides if _nested(text) > MAX_NESTED]
    problems += [f"{text[:40]}…: nested deeper than {MAX_NESTED} levels" for text in deep]
    if len(overrides) > MAX_OVERRIDES:
        problems.append(f"{len(overrides):,} overrides. At most {MAX_OVERRIDES:,}")
    if problems:
        raise ConfigError(problems)


def _nested(text: str) -> int:
    """Return the largest number of brackets that are open at once."""
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

    decorate = hydra.main(str(compose.conf_dir()), "config", **compose.HYDRA_BASE)
    decorate(application)()


def _or_exit(run: Callable[[], object]) -> None:
    """Run a command inside Hydra, which prints a stack trace for exceptions and lets SystemExit pass."""
    if code := run_to_code(run):
        raise SystemExit(code)


if __name__ == "__main__":
    main()
