"""The words of Hydra, PEFT and Optuna users work, or are answered with what to type."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path

import pytest

import sweeper.__main__ as entry
from sweeper.cli.verbs import VERBS
from sweeper.config.compose import compose, conf_dir, group_choices, parse_command_line
from sweeper.config.override_hints import (
    ALIASES,
    CHOICE_ALIASES,
    FOREIGN_FUNCTIONS,
    KEY_OF_GROUP,
    STUDY_GROUPS,
    in_full,
    quoted,
    shortened,
    unreadable,
)
from sweeper.config.settings import flatten
from sweeper.core.errors import ConfigError
from sweeper.search.study_plan import single, studies

SWEEP = "-m"
ODD_NAMES = (
    *("a#b", "a[1]", "a=b", "a b", "a,b", "a'b", "(a)", "a:b", "a{b}", "a$b", "a;b", "a&b", "ä"),
    *('a"b', "a!b", "a\\b", "#'\"", "a*", "a|b"),
)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that is the working directory, with data files of ordinary and odd names."""
    for name in ("my", "val", *ODD_NAMES):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_an_empty_word_is_shown() -> None:
    """A shell leaves one where a variable is empty. Verbs such as data and doctor answer it."""
    assert unreadable("") == "'': is not of the form KEY=VALUE"


def _answer(command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The problems with a command line, or the empty text where Hydra would run it."""
    monkeypatch.setattr(sys, "argv", ["sweeper", *shlex.split(command)])
    monkeypatch.setattr(entry, "_hydra_application", lambda: None)
    try:
        entry._hydra(sys.argv[1:])
    except ConfigError as error:
        return str(error)
    return ""


WORKS = {
    f"experiment=lr_rank_sweep {SWEEP}": f"+experiment=lr_rank_sweep {SWEEP}",
    f"n_trials=3 {SWEEP}": f"hydra.sweeper.n_trials=3 {SWEEP}",
    f"n_jobs=2 {SWEEP}": f"hydra.sweeper.n_jobs=2 {SWEEP}",
    f"study_name=x {SWEEP}": f"hydra.sweeper.study_name=x {SWEEP}",
    f"budget.plateau={{trials: 10, min_improvement: 0.1}} {SWEEP}": (
        f"hydra.sweeper.budget.plateau={{trials: 10, min_improvement: 0.1}} {SWEEP}"
    ),
    f"data.columns={{prompt: q}} {SWEEP}": f"++data.columns={{prompt: q}} {SWEEP}",
    f"stand_in=tiny experiment=llama3_ranks {SWEEP}": (
        f"+stand_in=tiny +experiment=llama3_ranks {SWEEP}"
    ),
}


def _studies(command: str) -> list[object]:
    words = re.findall(r"\S+=\{[^}]*\}|\S+", command)
    return list(studies(parse_command_line(words).overrides))


@pytest.mark.parametrize("short", WORKS)
def test_a_short_form_is_recorded_as_its_long_form(short: str) -> None:
    """The plan of a short form, its command included, equals the plan of the long form."""
    assert _studies(short) == _studies(WORKS[short])


def test_short_keys_work_in_every_reader_of_overrides() -> None:
    """prefetch, doctor and nightly sets complete their overrides by the same function as training."""
    from sweeper.config.compose import complete_overrides

    full = complete_overrides(["n_trials=3", "experiment=e", "data.columns={a: b}"], Path.cwd())
    assert full == ["hydra.sweeper.n_trials=3", "+experiment=e", "++data.columns={a: b}"]
    assert complete_overrides(full, Path.cwd()) == full


def test_home_is_expanded_wherever_a_path_begins(files: Path) -> None:
    """~/x is the user's file alone, in a list and in a mapping; a ~ inside a name stays."""
    assert single([in_full("data.train=~/my.jsonl")]).data.train == str(files / "my.jsonl")
    both = single([in_full("data.train=[~/my.jsonl, {path: ~/val.jsonl}]")]).data.train
    assert isinstance(both, list)
    assert both[0] == str(files / "my.jsonl")
    assert both[1].path == str(files / "val.jsonl")  # type: ignore[union-attr]
    assert single([in_full("output_dir=~/out")]).output_dir == str(files / "out")
    assert in_full("data.train='x~/y'") == "data.train='x~/y'"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_path_with_odd_characters_works_or_its_hint_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the message says to type for a file of an odd name trains on that very file."""
    typed = f"data.train={name}.jsonl"
    answer = _answer(shlex.quote(typed), monkeypatch)
    if answer:
        hint = quoted("data.train", f"{name}.jsonl")
        assert hint in answer
        (typed,) = shlex.split(hint)
    (override,) = parse_command_line([typed]).overrides
    assert single([override]).data.train == f"{name}.jsonl"
    assert _answer(shlex.quote(typed), monkeypatch) == ""


SAMPLERS = f"available: {', '.join(group_choices('sampler'))}"
HINTS = {
    "experiment=nope -m": ["no such choice", "lr_rank_sweep"],
    "lr_rank_sweep -m": ["+experiment=lr_rank_sweep"],
    "reprot lr_rank_sweep": ["did you mean report?"],
    "n_trials=3": ["n_trials is a setting of a study", "Add -m"],
    "hydra.sweeper.n_jobs=2": ["n_jobs is a setting of a study", "Add -m"],
    "study_name=x seed=abc": ["study_name is a setting of a study", "seed='abc'"],
    "sampler=gp": ["sampler is a setting of a study", "Add -m"],
    "+experiment=lr_rank_sweep hydra.sweeper.arms={} -m": ["nothing changes", "arms.full"],
    "pruner.audit_fraction=0.1": ["pruner.audit_fraction is a setting of a study"],
    f"hydra/sweeper/sampler=tpe {SWEEP}": ["Write sampler=tpe"],
    f"hydra/sweeper/sampler=cmaes {SWEEP}": ["sampler.class_name=CmaEsSampler"],
    f"hydra/sweeper=basic {SWEEP}": ["Remove it"],
    f"+hydra/sweeper=optuna {SWEEP}": ["Remove it"],
    f"hydra/launcher=joblib {SWEEP}": ["n_jobs=4", "workers=ray"],
    f"hydra.launcher.n_jobs=2 {SWEEP}": ["n_jobs=4"],
    f"hydra.sweeper.direction=maximize {SWEEP}": ["objective.direction=maximize"],
    f"'hydra.sweeper.params.adapter.r=choice(2,4)' {SWEEP}": ["'adapter.r=choice(2,4)' -m"],
    f"+hydra.sweeper.n_trials=3 {SWEEP}": ["Write it without the +"],
    f"+sampler=lora {SWEEP}": ["Write it without the +: sampler=lora"],
    f"+sampler=tpe {SWEEP}": ["Write it without the +: sampler=tpe"],
    f"+pruner=none {SWEEP}": ["Write it without the +: pruner=none"],
    "+quantization=none": ["Write it without the +: quantization=none"],
    f"sampler=xyz {SWEEP}": [SAMPLERS],
    f"sampler=5 {SWEEP}": [SAMPLERS],
    "workers=4": ["did you mean n_jobs=4?"],
    "quantization=nf5": ["did you mean quantization=nf4?"],
    "quantization=4bit": ["write quantization=nf4"],
    "adapter=qlora": ["write adapter=lora quantization=nf4"],
    "model=Qwen/Qwen3-0.6B-Base": ["did you mean model.base_model=Qwen/Qwen3-0.6B-Base?"],
    "data=my.jsonl": ["did you mean data.train=my.jsonl?"],
    "nightly=default": ["Write +nightly=default"],
    "lr=1e-3": ["did you mean training.learning_rate?"],
    "learning_rate=1e-3": ["did you mean training.learning_rate?"],
    "training.lr=1e-3": ["did you mean training.learning_rate?"],
    "training.learning_rte=1e-3": ["did you mean training.learning_rate?"],
    "adapter.rank=8": ["did you mean adapter.r?"],
    "epochs=3": ["did you mean training.num_train_epochs?"],
    f"n_trails=3 {SWEEP}": ["did you mean n_trials?"],
    f"'lr=interval(1e-4,1e-2)' {SWEEP}": ["did you mean training.learning_rate?"],
    "'data.colums={a: b}'": ["Did you mean data.columns?"],
    "data.columns={a: b}": ["a bracket is not closed", "single quotes around the whole"],
    "'data.train=[a#b.jsonl]'": ["double quotes around items"],
    "data.train=my.jsonl,val.jsonl": ["'data.train=[my.jsonl,val.jsonl]'", "Add -m"],
    "data.train=my file.jsonl": ["quote a value that contains spaces"],
    "''": ["'': is not of the form KEY=VALUE"],
    "adapter.r = 8": ["adapter.r = 8: is not of the form KEY=VALUE"],
    f"'training.learning_rate=loguniform(1e-4,1e-2)' {SWEEP}": ["tag(log, interval(LOW, HIGH))"],
    f"'training.learning_rate=interval(1e-4' {SWEEP}": ["commas and brackets of interval(…)"],
    "-cn mine lr=3": ["./conf/experiment/mine.yaml", "+experiment=mine", "training.learning_rate"],
    "--config-name=mine": ["+experiment=mine"],
    "--n-trials=3": ["n_trials=3"],
    "--multirun=3": ["takes no value"],
    "--cfg job lr=3": ["did you mean training.learning_rate?"],
}


@pytest.mark.parametrize("command", HINTS)
def test_a_near_miss_is_answered_with_what_to_type(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer holds the hint, and it comes in less than two CPU seconds without torch."""
    before = time.process_time()
    answer = _answer(command, monkeypatch)
    assert time.process_time() - before < 2
    for hint in HINTS[command]:
        assert hint in answer


def test_near_misses_are_reported_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag, a bare word, a moved key, an alias and a wrong value are five problems of one error."""
    command = "--n-trials=3 +experiment=lr_rank_sweep adapter.r 8 hydra/launcher=joblib lr=1 -m"
    answer = _answer(f"{command} seed=abc", monkeypatch)
    assert "5 problems" in answer
    for part in ("--n-trials=3:", "adapter.r 8:", "hydra/launcher=joblib:", "lr=1:", "seed='abc'"):
        assert part in answer


def test_aliases_lead_to_settings_that_exist() -> None:
    """Every word that an alias stands for is a setting, and no alias hides a setting."""
    defaults = compose([])
    known = {
        shortened(key)
        for key in flatten({**defaults.config, "hydra": {"sweeper": defaults.sweeper}})
    }
    assert set(ALIASES.values()) | set(KEY_OF_GROUP.values()) <= known
    assert not set(ALIASES) & known


@pytest.mark.parametrize("alias", CHOICE_ALIASES)
def test_aliases_of_choices_compose(alias: tuple[str, str]) -> None:
    """What stands in the place of another program's choice is a valid study, or a valid trial."""
    group, choice = alias
    assert choice not in group_choices(group), (
        f"conf/{group}/{choice}.yaml exists, so {choice} is no other program's word any more. Remove "
        f"{alias} from CHOICE_ALIASES in sweeper/config/override_hints.py"
    )
    overrides = parse_command_line(CHOICE_ALIASES[alias].split()).overrides
    assert studies(overrides) if group in STUDY_GROUPS else single(overrides)


@pytest.mark.parametrize("words", sorted(set(FOREIGN_FUNCTIONS.values())))
def test_words_for_foreign_functions_are_search_spaces(words: str) -> None:
    """The search-space words of a hint are read when numbers stand in the place of its names."""
    numbers = {
        "LOW": "1e-4",
        "HIGH": "1e-2",
        "START": "0.1",
        "STOP": "0.5",
        "STEP": "0.1",
        "A": "0.1",
    }
    key = "training.learning_rate"
    if words.startswith("int("):
        key, numbers = "adapter.r", {"LOW": "2", "HIGH": "8"}
    for name, number in {**numbers, "B": "0.2"}.items():
        words = re.sub(rf"\b{name}\b", number, words)
    (plan,) = studies(["+experiment=lr_rank_sweep", f"{key}={words}"])
    assert key in plan.arms[0].space


def test_the_packaged_groups_are_those_of_the_hints() -> None:
    """A group that a hint names is a folder of conf/, and a verb is never an experiment's name."""
    groups = {group for group, _ in CHOICE_ALIASES} | set(KEY_OF_GROUP)
    assert all((conf_dir() / group).is_dir() for group in groups)
    assert not set(VERBS) & set(group_choices("experiment"))
