"""Every YAML file under conf/ composes, validates and says how it is used."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest

from sweeper.__main__ import _single
from sweeper.cli.verbs import VERBS
from sweeper.config.compose import compose, conf_dir, parse_command_line
from sweeper.search.study_plan import single, studies

CONF = conf_dir()
FILES = sorted(CONF.rglob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
GROUPS = sorted(
    (path.parent.relative_to(CONF).as_posix(), path.stem)
    for path in FILES
    if path.parent not in (CONF, CONF / "experiment", CONF / "nightly")
)


OWN_FILES = {
    "gpt2_book": ["data.train=book.txt"],
    "qwen2_5_instruct": ["data.train=train.jsonl", "data.validation=val.jsonl"],
}
"""The experiments on files that their users bring."""


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with the files, and a database, that commands and experiments name."""
    monkeypatch.setenv("SWEEPER_STORAGE", f"sqlite:///{tmp_path / 'study.db'}")
    for name in ("my.jsonl", "train.jsonl", "val.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "val.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "folder").mkdir()
    for name in ("book.txt", "wiki.txt"):
        (tmp_path / name).write_text("A book.\n")
    rows = tmp_path / "real_model" / "docstrings"  # what `make real-model` makes
    rows.mkdir(parents=True)
    (tmp_path / "real_model" / "SmolLM2-135M-Instruct").mkdir()
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "general.txt"):
        (rows / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_files")
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_is_a_valid_study(experiment: str) -> None:
    """An experiment composes into a plan whose spaces pass the settings' own rules."""
    (plan,) = studies([f"+experiment={experiment}", *OWN_FILES.get(experiment, [])])
    assert plan.experiment == experiment
    # Only this experiment names no data itself, so its study is named after the user's file too.
    named = "qwen2_5_instruct_train" if experiment == "qwen2_5_instruct" else experiment
    assert plan.study.study_name == named
    assert plan.arms[0].name == "lora"


NEEDS = {
    ("adapter", "none"): ["quantization=none"],
    ("objective", "rougeL"): ["evaluation.generation.num_examples=1"],
}
"""What a choice cannot do without."""


@pytest.mark.parametrize(("group", "choice"), GROUPS)
def test_group_choice_is_valid(group: str, choice: str) -> None:
    """Every choice of every group gives a valid trial beside the defaults."""
    extra = NEEDS.get((group, choice), [])
    added = "+" if group == "stand_in" else ""  # it is no default: an experiment is stood in for
    single([f"{added}{group}={choice}", *extra])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONF).as_posix())
def test_yaml_begins_with_what_it_is_and_its_command(path: Path) -> None:
    """The header comment of a YAML holds a sentence and the exact command that uses the file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = list(lines[: next(i for i, x in enumerate(lines) if not x.startswith("#"))])
    assert any(line.startswith("#   python -m sweeper") for line in header), header
    assert any(line.startswith("# ") and "python -m" not in line for line in header), header


def test_full_arm_searches_rates_around_a_tenth_of_loras() -> None:
    """The baseline's rates are centred a decade below LoRA's: a grid of half decades, or a range."""
    for space in ("tiny", "real"):
        lora, full = studies(["+experiment=lr_rank_sweep", f"space={space}"])[0].arms
        rates = full.space["training.learning_rate"].probes()
        first, last = min(rates), max(rates)
        low, high, _ = lora.space["training.learning_rate"].probes()
        assert 0.5 < (first * last) ** 0.5 / ((low * high) ** 0.5 / 10) < 2
    rates = studies(["+experiment=lr_rank_sweep"])[0].arms[1].space["training.learning_rate"].values
    assert len(rates) >= 5
    assert all(2.5 < b / a < 3.6 for a, b in itertools.pairwise(rates))


def test_auto_groups_follow_the_base_model() -> None:
    """auto composes as tiny; for another base the command line asks for real instead."""
    from sweeper.config.compose import with_auto_groups

    assert compose([]).choices["space"] == "auto"
    assert with_auto_groups([]) == []
    assert with_auto_groups(["model.base_model=gpt2"]) == [
        *("model.base_model=gpt2", "data=real", "evaluation=real", "finalists=real", "space=real"),
        "training=real",
    ]
    chosen = ["model.base_model=gpt2", "evaluation=tiny", "finalists=tiny"]
    chosen += ["space=tiny", "training=tiny", "data=tiny"]
    assert with_auto_groups(chosen) == chosen


def _commands(text: str) -> list[str]:
    """Every `python -m sweeper …` line of a text, continuation lines joined, comments cut."""
    joined = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"^[#\s]*python -m sweeper(.*)$", joined, flags=re.MULTILINE)
    return [re.split(r"\s{2,}(?!')|\s#\s", command)[0].strip() for command in found]


COMMANDS = sorted(
    {
        command
        for path in (*FILES, *CONF.parent.glob("*.md"), *CONF.parent.glob("docs/*.md"))
        for command in _commands(path.read_text(encoding="utf-8"))
        if "…" not in command
    }
)


@pytest.mark.usefixtures("own_files")
@pytest.mark.parametrize("command", COMMANDS)
def test_command_in_a_text_or_yaml_is_valid(command: str) -> None:
    """What README, docs and the headers of conf/ tell people to type passes every check."""
    line = parse_command_line(shlex.split(command))
    if line.overrides and line.overrides[0] in VERBS:
        return
    if line.trains:
        studies(line.overrides) if line.multirun else _single(line.overrides)
