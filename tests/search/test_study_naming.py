"""Names of studies: one's own model and data get a study of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeper.commands.run_study import run_study
from sweeper.config.compose import complete_overrides, parse_command_line
from sweeper.core.errors import StudyMismatch
from sweeper.reporting.results import StudyResults
from sweeper.search.study_naming import MAX_LENGTH, StudyNaming, _bounded, data_word, model_word
from sweeper.search.study_plan import StudyPlan, studies
from sweeper.workers.fake_runner import FakeRunner
from tests.conftest import Program

EXPERIMENT = "+experiment=lr_rank_sweep"
FAKE = (
    *("workers=fake", "workers.engine=inline", "workers.fake.step_seconds=0.0", "tracking=none"),
    *("~hydra.sweeper.arms.full", "finalists=none", "pruner=none"),
)
FEW = "hydra.sweeper.n_trials=2"
OWN = ("data.train=my.jsonl", "model.base_model='stand_in:qwen3'")
OWN_NAME = "lr_rank_sweep_qwen3_my"
VALID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which every command of a test is typed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _plan(*typed: str) -> StudyPlan:
    line = parse_command_line([*typed, "-m"])
    (plan,) = studies(complete_overrides(line.overrides, Path.cwd()))
    return plan


def _run(*typed: str) -> StudyResults:
    return run_study(_plan(*typed, *FAKE))


def _trials(name: str) -> int:
    document = json.loads(Path("outputs", name, "results.json").read_text(encoding="utf-8"))
    return len(document["arms"]["lora"]["trials"])


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ((EXPERIMENT,), "lr_rank_sweep"),
        (("experiment=lr_rank_sweep", "n_trials=30"), "lr_rank_sweep"),
        ((EXPERIMENT, "data.train=embedded"), "lr_rank_sweep"),
        ((EXPERIMENT, "data.train=/some/where/my.jsonl"), "lr_rank_sweep_my"),
        ((EXPERIMENT, "data.train=data/My File.v2.csv.gz"), "lr_rank_sweep_my-file.v2"),
        ((EXPERIMENT, "data.train=[a.jsonl,b.jsonl]"), "lr_rank_sweep_a-and-1"),
        ((EXPERIMENT, "++data.train={path: org/rows, split: train}"), "lr_rank_sweep_rows"),
        ((EXPERIMENT, "data.train=folder/"), "lr_rank_sweep_folder"),
        (
            (EXPERIMENT, "model.base_model=Qwen/Qwen3-0.6B-Base", "data.train=my.jsonl"),
            "lr_rank_sweep_qwen3-0.6b-base_my",
        ),
        ((EXPERIMENT, "model.base_model=choice(embedded,gpt2)", FEW, "data.train=my.jsonl"), None),
        ((EXPERIMENT, "data.train=my.jsonl", "study_name=named"), "named"),
        ((EXPERIMENT, "data.train=my.jsonl", "hydra.sweeper.study_name=named"), "named"),
        (("experiment=llama3_ranks",), "llama3_ranks"),
        (("experiment=llama3_ranks", "stand_in=tiny"), "llama3_ranks"),
        (("data.train=my.jsonl", "adapter.r=4,8"), "default_my"),
    ],
)
def test_name_follows_experiment_model_and_data(typed: tuple[str, ...], name: str | None) -> None:
    """The experiment's own model and data add nothing, and a name that was given stays."""
    if name is None:  # base models that are searched are no part of the name
        typed, name = (*typed, "objective.metric=eval/bits_per_byte"), "lr_rank_sweep_my"
    assert _plan(*typed, "workers=fake").study.study_name == name


def test_each_of_several_experiments_has_its_own_name() -> None:
    """Experiments with commas between them and one's own file: a name each."""
    names = [
        plan.study.study_name
        for plan in studies(
            ["+experiment=lr_rank_sweep,dora_or_lora", "data.train=my.jsonl", "workers=fake"]
        )
    ]
    assert names == ["lr_rank_sweep_my", "dora_or_lora_my"]


@given(st.text(min_size=1), st.lists(st.text(min_size=1), min_size=1, max_size=3))
def test_every_model_and_file_gives_a_valid_name(base: str, paths: list[str]) -> None:
    """Other scripts, spaces and long paths: a study_name that Optuna and folders take."""
    name = _bounded("_".join(["lr_rank_sweep", model_word(base), data_word(paths)]))
    assert VALID.fullmatch(name)
    assert len(name) <= MAX_LENGTH


def test_long_names_differ() -> None:
    """Two files whose names begin with the same hundred letters are two studies."""
    one, other = (_bounded("lr_" + "a" * 120 + end) for end in "xy")
    assert one != other


def test_files_in_another_script_differ() -> None:
    """Letters that no study_name may hold do not make two files one."""
    assert data_word(["данные.jsonl"]) != data_word(["тексты.jsonl"])


def test_name_holds_no_folder() -> None:
    """The same file in two homes: one name, so a command travels between machines."""
    assert data_word(["/home/a/my.jsonl"]) == data_word([r"C:\\data\\my.jsonl"]) == "my"


def test_first_commands_of_the_readme_leave_both_answers_standing() -> None:
    """The embedded study, then one's own model and data: two folders, neither one touched."""
    _run(EXPERIMENT, FEW)
    before = Path("outputs/lr_rank_sweep/results.json").read_bytes()
    _run(EXPERIMENT, *OWN, FEW)
    assert Path("outputs/lr_rank_sweep/results.json").read_bytes() == before
    assert (_trials("lr_rank_sweep"), _trials(OWN_NAME)) == (2, 2)
    _run(EXPERIMENT, FEW)
    assert (_trials("lr_rank_sweep"), _trials(OWN_NAME)) == (2, 2)


def test_recorded_command_reaches_the_same_study(capsys: pytest.CaptureFixture[str]) -> None:
    """The name is printed, and every printed command carries it, whatever lies in outputs/ later."""
    results = _run(EXPERIMENT, *OWN, FEW)
    printed = capsys.readouterr().out
    assert f"study_name={OWN_NAME}: named after experiment, model and data" in printed
    for word in ("Extend", "Start new"):
        (line,) = (line for line in printed.splitlines() if line.startswith(word))
        assert f"hydra.sweeper.study_name={OWN_NAME}" in line
    assert f"report {OWN_NAME}" in printed
    assert f"hydra.sweeper.study_name={OWN_NAME}" in results.command


def test_larger_total_extends_the_study_of_this_name() -> None:
    """n_trials is no part of the name."""
    _run(EXPERIMENT, *OWN, FEW)
    _run(EXPERIMENT, *OWN, "n_trials=3")
    assert _trials(OWN_NAME) == 3


@pytest.mark.parametrize("path", ["my.jsonl", "./my.jsonl"])
def test_old_name_that_holds_the_question_is_continued(home: Path, path: str) -> None:
    """A study of one's own data that was started under the experiment's name goes on there."""
    (home / "my.jsonl").touch()
    _run(EXPERIMENT, "data.train=my.jsonl", FEW, "study_name=lr_rank_sweep")
    plan = _plan(EXPERIMENT, f"data.train={path}", "n_trials=3", *FAKE)
    assert plan.study.study_name == "lr_rank_sweep"
    assert "its trials have this model and this data" in plan.name_note
    assert "hydra.sweeper.study_name=lr_rank_sweep" in plan.command


def test_changed_setting_under_a_continued_name_is_refused() -> None:
    """The old name holds this model and data: another setting is no silent new study."""
    _run(EXPERIMENT, *OWN, FEW, "study_name=lr_rank_sweep")
    with pytest.raises(StudyMismatch, match=r"training\.max_steps"):
        _run(EXPERIMENT, *OWN, FEW, "training.max_steps=9")
    assert [path.name for path in Path("outputs").iterdir()] == ["lr_rank_sweep"]


def test_edited_file_is_refused_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name follows the file's name, not its rows: other rows are another question."""
    _run(EXPERIMENT, *OWN, FEW)
    probe = FakeRunner.probe

    def edited(self: FakeRunner, *words: Any) -> Any:
        return probe(self, *words).model_copy(update={"data_digest": "other rows"})

    monkeypatch.setattr(FakeRunner, "probe", edited)
    with pytest.raises(StudyMismatch, match="data digest"):
        _run(EXPERIMENT, *OWN, "n_trials=3")
    assert [path.name for path in Path("outputs").iterdir()] == [OWN_NAME]


def test_experiment_without_data_is_named_by_the_data_it_is_given(home: Path) -> None:
    """A user's experiment may leave data.train open."""
    folder = home / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndata:\n  train: ???\nhydra:\n  sweeper:\n    study_name: mine\n"
    )
    plan = _plan("experiment=mine", "data.train=my.jsonl", "adapter.r=4,8", "workers=fake")
    assert plan.study.study_name == "mine_my"


def test_note_is_empty_for_names_that_need_none() -> None:
    """The experiment's own name adds nothing to the recorded command."""
    assert StudyNaming("lr_rank_sweep").overrides == ()


@pytest.mark.slow
def test_verbs_without_a_name_take_the_newest_study(
    in_process: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    """report, best, reproduce and `study show` say which study they take, on stderr."""
    missing = in_process("report")
    assert (missing.returncode, "there are no studies under outputs/ yet" in missing.stderr) == (
        1,
        True,
    )
    _run(EXPERIMENT, *OWN, FEW)
    _run(EXPERIMENT, FEW)
    for verb in (("report", "--format", "json"), ("study", "show"), ("best", "--yaml")):
        found = in_process(*verb)
        assert found.returncode == 0, found.stderr
        assert found.stderr.startswith("study lr_rank_sweep, the newest under outputs/")
    (document,) = json.loads(in_process("report", "--format", "json").stdout)
    assert document["study_name"] == "lr_rank_sweep"
    again = in_process("reproduce", "workers=inline", "tracking=none")
    assert again.stderr.startswith("study lr_rank_sweep, the newest under outputs/")
