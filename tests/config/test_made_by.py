"""A missing file that a command makes is answered with the command, whatever asks for the file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sweeper.config.compose import compose, conf_dir
from sweeper.core.errors import ConfigError
from sweeper.search.study_plan import single, studies
from tests.config.test_conf import EXPERIMENTS
from tests.conftest import Program

ROOT = conf_dir().parent
MADE = {
    name: commands
    for name in EXPERIMENTS
    if (commands := compose([f"+experiment={name}"]).config["made_by"])
}
"""Commands that make the files of the packaged experiments, by path."""
OWN = (
    "# @package _global_\n"
    "made_by: {made: make own-rows, made/models: make own-model}\n"
    "model: {base_model: made/models/tiny}\n"
    "data: {train: made/train.jsonl, validation: made/rows}\n"
    "evaluation: {general_text: {source: made/general.txt}}\n"
)


def test_some_experiment_has_files_that_a_command_makes() -> None:
    """The tests below are about something."""
    assert MADE["smollm2"] == {"real_model": "make real-model"}


@pytest.mark.parametrize("name", sorted(MADE))
def test_the_commands_of_packaged_experiments_exist(name: str) -> None:
    """Each is a target of the Makefile, and stands in the header of the experiment."""
    header = (conf_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert MADE[name]
    for command in MADE[name].values():
        assert command.removeprefix("make ") in targets
        assert f"#   {command}\n" in header


@pytest.mark.parametrize("name", sorted(MADE))
@pytest.mark.parametrize(
    "typed", ["-m", "dry_run=true -m", "", "data", "doctor", "prefetch"], ids=lambda text: text
)
def test_every_command_names_what_makes_its_files(
    name: str, typed: str, in_process: Program
) -> None:
    """A study, its dry run, a trial, and each verb that takes the experiment."""
    words = typed.split()
    verb = words[:1] if words and words[0].isalpha() else []
    result = in_process(*verb, f"+experiment={name}", *words[len(verb) :])
    assert result.returncode == 2
    said = result.stdout + result.stderr
    (command,) = MADE[name].values()
    for key in ("model.base_model", "data.train", "data.validation", "data.test"):
        pattern = (
            rf"{key}=(real_model/\S+): no such file or folder\. Make it first with `{command}`"
        )
        assert re.search(pattern, said), key


def test_an_experiment_of_ones_own_names_its_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deepest path counts, names like those of the hub too, and what exists is not made."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "own.yaml").write_text(OWN)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(tmp_path)
    path = f"hydra.searchpath=[file://{tmp_path}/conf]"
    with pytest.raises(ConfigError) as raised:
        studies(["+experiment=own", path])
    assert list(raised.value.problems) == [
        "data.validation=made/rows: no such file or folder. Make it first with `make own-rows`",
        "evaluation.general_text.source=made/general.txt: no such file or folder. Make it first with "
        "`make own-rows`",
        "model.base_model=made/models/tiny: no such file or folder. Make it first with `make own-model`",
    ]
    with pytest.raises(ConfigError) as raised:
        single(["data.train=gone.jsonl"])
    assert "Make it" not in str(raised.value)


@pytest.mark.parametrize("command", ["a\nb", "\x1b[31mmake", ""])
def test_a_command_is_one_line_of_plain_text(command: str) -> None:
    """A stranger's experiment cannot write to the terminal with it."""
    with pytest.raises(ConfigError, match="made_by"):
        single([f"made_by={{x: {command!r}}}"])
