"""A configuration, whoever wrote it, cannot name code to run, files outside, or a shell."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sweeper.__main__ import refuse_overrides
from sweeper.config import foreign_settings
from sweeper.config.compose import (
    _composed_or_refused,
    compose,
    refuse_unknown_flags,
    to_yaml,
)
from sweeper.core.errors import ConfigError
from sweeper.search.study_plan import single, studies
from tests.conftest import make_settings, run_in_process, run_program

PLACES = [
    *("++hydra.callbacks.x", "++hydra.sweeper.params.x", "++hydra.sweeper.sampler", "++model"),
    *("++hydra.launcher", "++hydra.sweeper", "++workers.fake.plan", "++hydra.job_logging.x"),
]
TARGETS = [
    *("os.system", "subprocess.run", "builtins.eval", "pathlib.Path.write_text", "torch.load"),
    *("setuptools._distutils.spawn.spawn", "joblib.load", "asyncio.create_subprocess_shell"),
    *("pandas.read_pickle", "${oc.env:HOME}", "transformers.AutoModel.from_pretrained"),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", ["os.system", "${oc.env:HOME}"])
def test_a_target_is_refused_wherever_it_stands(place: str, target: str) -> None:
    """The key and the value are named; an interpolation is no way around."""
    with pytest.raises(ConfigError, match="must not name code to run") as caught:
        compose([f"{place}._target_={target}"])
    assert f"{place.lstrip('+')}._target_" in str(caught.value)


@pytest.mark.parametrize("target", TARGETS)
def test_only_the_allow_list_passes(target: str) -> None:
    """There is no list of bad names to get around: what is not known is refused."""
    with pytest.raises(ConfigError, match="must not name code to run"):
        studies(["+experiment=lr_rank_sweep", f"++hydra.callbacks.x._target_={target}"])


@pytest.mark.parametrize("entry", ["(): os.system", "class: antigravity.X"])
@pytest.mark.parametrize("node", ["job_logging", "hydra_logging"])
def test_logging_builds_only_its_own_handlers(entry: str, node: str, tmp_path: Path) -> None:
    """logging.config would call and import what it is told to."""
    (tmp_path / "hydra" / node).mkdir(parents=True)
    file = tmp_path / "hydra" / node / "foreign.yaml"
    file.write_text(f"version: 1\nhandlers: {{x: {{{entry}}}}}\n")
    with pytest.raises(ConfigError, match=rf"hydra\.{node}\.handlers\.x"):
        compose([f"hydra/{node}=foreign", f"hydra.searchpath=[file://{tmp_path}]"])


def test_a_user_conf_folder_gets_no_exception(tmp_path: Path) -> None:
    """A YAML in ./conf, given by somebody else: refused before anything of it runs."""
    experiment = tmp_path / "conf" / "experiment"
    experiment.mkdir(parents=True)
    (experiment / "foreign.yaml").write_text(
        "# @package _global_\n"
        "hydra:\n  callbacks:\n    x:\n"
        "      _target_: pathlib.Path.touch\n      _args_: [executed]\n"
    )
    for extra in ([], ["-m"]):
        result = subprocess.run(
            [sys.executable, "-m", "sweeper", "+experiment=foreign", "tracking=none", *extra],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2, result.stdout + result.stderr
        assert "hydra.callbacks.x._target_" in result.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["conf"]


FOREIGN = {
    "hydra.job.env_set.LD_PRELOAD": "hydra: {job: {env_set: {LD_PRELOAD: /x.so}}}",
    "hydra.job.env_set.PATH": "hydra: {job: {env_copy: [PATH]}}",
    "hydra.job.chdir": "hydra: {job: {chdir: true}}",
    "hydra.job_logging.handlers.x.class": "hydra: {job_logging: {handlers: {x: {class: "
    "logging.FileHandler, filename: victim, mode: w}}}}",
    "hydra.output_subdir": "hydra: {output_subdir: ../../x}",
    "hydra.sweep.dir": "hydra: {sweep: {dir: /x}}",
    "hydra.verbose": "hydra: {verbose: true}",
    "hydra.mode": "hydra: {mode: MULTIRUN}",
    "hydra.run.dir": "hydra: {run: {dir: /x}}",
    "output_dir": "output_dir: /x",
    "output_dir='../x'": "output_dir: ../x",
    "output_dir='a/../../x'": "output_dir: a/../../x",
    "output_dir='${oc.env:HOME}/x'": "output_dir: '${oc.env:HOME}/x'",
    "evaluation.metric_modules": "evaluation: {metric_modules: [os], metrics: {a: 'os:getcwd'}}",
    "tracking.uri='http://x'": "tracking: {uri: 'http://x'}",
    "tracking.uri='sqlite:////x.db'": "tracking: {uri: 'sqlite:////x.db'}",
    "tracking.uri='file:///x'": "tracking: {uri: 'file:///x'}",
    "hydra.sweeper.storage='sqlite:////x'": "hydra: {sweeper: {storage: 'sqlite:////x'}}",
    "hydra.sweeper.storage='sqlite:///../x'": "hydra: {sweeper: {storage: 'sqlite:///../x'}}",
    "hydra.sweeper.storage='postgresql://x/y'": "hydra: {sweeper: {storage: 'postgresql://x/y'}}",
    "workers.address": "workers: {engine: ray, address: 'x:1'}",
}
"""Lines of a foreign file, by what its refusal names."""
ARTIFACTS = "artifacts: {zip: false, merged: false}\nevaluation: {metric_modules: [os]}"
OF_AN_ARM = ("output_dir=/x", "'evaluation.metric_modules=[os]'", "+hydra.job.env_set.A=b")


def _foreign(folder: Path, text: str, group: str = "experiment") -> list[str]:
    """Write a file of somebody else, and return the overrides that choose it."""
    (folder / group).mkdir(parents=True, exist_ok=True)
    (folder / group / "foreign.yaml").write_text(f"# @package _global_\n{text}\n")
    return [f"+{group}=foreign", f"hydra.searchpath=[file://{folder}]", "workers=fake"]


ALL_AT_ONCE = """
hydra:
  job: {env_set: {LD_PRELOAD: /x.so}}
  job_logging: {handlers: {x: {class: logging.FileHandler, filename: victim, mode: w}}}
  run: {dir: /x}
  sweeper: {storage: sqlite:////x}
output_dir: ../x
evaluation: {metric_modules: [os], metrics: {a: 'os:getcwd'}}
tracking: {uri: http://x}
workers: {engine: ray, address: x:1}
"""


def test_a_foreign_file_is_refused_with_all_that_it_may_not_set(tmp_path: Path) -> None:
    """Code, Hydra's own settings, places and servers, in one message."""
    with pytest.raises(ConfigError) as caught:
        compose(_foreign(tmp_path, ALL_AT_ONCE))
    keys = {re.split("[:=]", problem)[0] for problem in caught.value.problems}
    logging = {"hydra.job_logging.handlers.x.class"}
    assert keys == {*foreign_settings.PLACES, "hydra.job.env_set.LD_PRELOAD", *logging} - {
        "hydra.mode"
    }


@pytest.mark.slow
@pytest.mark.parametrize("named", FOREIGN)
def test_a_foreign_file_sets_neither_hydra_nor_places_nor_code(named: str, tmp_path: Path) -> None:
    """Both modes compose, and what is composed is refused with the key and the way out."""
    with pytest.raises(ConfigError, match=re.escape(named)):
        compose(_foreign(tmp_path, FOREIGN[named]))


@pytest.mark.slow
def test_a_file_that_is_trusted_may_set_places_and_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own name or its folder's; Hydra's own settings stay closed."""
    given = _foreign(tmp_path, "output_dir: /x\nevaluation: {metric_modules: [os]}")
    with pytest.raises(ConfigError):
        compose(given)
    for trusted in (tmp_path / "experiment/foreign.yaml", tmp_path):
        _composed_or_refused.cache_clear()
        monkeypatch.setenv("SWEEPER_TRUST", f"/nowhere:{trusted}")
        assert compose(given).config["output_dir"] == "/x"
    given = _foreign(tmp_path, "hydra: {job: {env_set: {A: b}}}")
    with pytest.raises(ConfigError, match=r"hydra\.job\.env_set\.A"):
        compose([*given, "seed=1"])


def test_a_link_in_a_trusted_folder_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the file that is read."""
    _foreign(tmp_path / "theirs", "output_dir: /x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/experiment").symlink_to(tmp_path / "theirs/experiment")
    monkeypatch.setenv("SWEEPER_TRUST", str(tmp_path / "mine"))
    with pytest.raises(ConfigError, match="output_dir='/x'"):
        compose(["+experiment=foreign", f"hydra.searchpath=[file://{tmp_path / 'mine'}]"])


def test_the_command_line_and_harmless_places_pass(tmp_path: Path) -> None:
    """What the user types is the user's; a file may name a folder below, and a reference."""
    given = _foreign(tmp_path, FOREIGN["evaluation.metric_modules"])
    own = [
        "evaluation.metric_modules=[os]",
        "output_dir=/x",
        "hydra.run.dir=/y",
        "tracking.uri=http://x",
    ]
    assert compose([*given, *own]).config["output_dir"] == "/x"
    below = "hydra: {sweeper: {storage: 'sqlite:///mine/a.db'}}\noutput_dir: mine/b\n"
    assert compose(_foreign(tmp_path, below)).config["output_dir"] == "mine/b"
    _composed_or_refused.cache_clear()
    by_reference = "hydra: {sweeper: {storage: '${oc.env:SWEEPER_STORAGE,null}'}}"
    assert compose(_foreign(tmp_path, by_reference)).sweeper["storage"] is None


def test_what_only_a_foreign_file_has_can_be_removed(tmp_path: Path) -> None:
    """An arm of the user's own experiment, as one of a packaged one. A place stays refused."""
    arm = "overrides: [adapter=none], n_trials: 1, params: {training.learning_rate: 0.1}"
    own = f"hydra: {{sweeper: {{arms: {{other: {{{arm}}}}}}}}}"
    removed = "~hydra.sweeper.arms.other"
    (plan,) = studies([*_foreign(tmp_path, own), removed])
    assert [arm.name for arm in plan.arms] == ["lora"]
    with pytest.raises(ConfigError, match="output_dir='/x'"):
        studies([*_foreign(tmp_path / "placed", f"{own}\noutput_dir: /x"), removed])


@pytest.mark.slow
@pytest.mark.parametrize("override", OF_AN_ARM)
def test_an_arm_has_no_places_of_its_own(override: str, tmp_path: Path) -> None:
    """The overrides of an arm stand in a file, though Hydra takes them for a command line's."""
    arm = f"overrides: [{override}], n_trials: 1, params: {{training.learning_rate: 0.1}}"
    text = f"hydra: {{sweeper: {{arms: {{other: {{{arm}}}}}}}}}"
    with pytest.raises(ConfigError, match=re.escape(override.strip("'+").partition("=")[0])):
        studies(_foreign(tmp_path, text))


@pytest.mark.slow
def test_a_fixed_key_of_the_search_is_no_place(tmp_path: Path) -> None:
    """hydra.sweeper.params sets what it does not search."""
    with pytest.raises(ConfigError, match="output_dir='/x'"):
        studies(_foreign(tmp_path, "hydra: {sweeper: {params: {output_dir: /x}}}"))


@pytest.mark.slow
def test_a_searched_group_sets_no_place(tmp_path: Path) -> None:
    """A choice that only a trial composes is checked before the study begins."""
    _foreign(tmp_path, ARTIFACTS, group="artifacts")
    text = "hydra: {sweeper: {params: {artifacts: 'choice(default, foreign)'}}}"
    with pytest.raises(ConfigError, match=r"evaluation\.metric_modules=\['os'\]"):
        studies(_foreign(tmp_path, text))


def test_a_package_on_the_search_path_is_not_imported(tmp_path: Path) -> None:
    """Hydra would import it before anything is composed."""
    (tmp_path / "evil.py").write_text("open('executed', 'w')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        patch.chdir(tmp_path)
        with pytest.raises(ConfigError, match="only folders are searched"):
            compose(["hydra.searchpath=[pkg://evil]"])
    assert not (tmp_path / "executed").exists()


def test_a_stored_configuration_imports_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial's config.yaml may come from anybody: `trial` refuses it, with the way to trust it."""
    (tmp_path / "evil.py").write_text("open('executed', 'w')\ndef f(*a): return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = ["evaluation.metric_modules=[evil]", "+evaluation.metrics.a=evil:f"]
    settings = make_settings(*given, "evaluation.generation.num_examples=1", "workers=fake")
    (tmp_path / "config.yaml").write_text(to_yaml(settings.model_dump(mode="json")))
    result = run_in_process(["trial", ".", "--into", "again"], tmp_path)
    assert result.returncode == 2
    assert "SWEEPER_TRUST=config.yaml" in result.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["-m"]], ids=["trial", "study"])
def test_a_foreign_environment_reaches_no_process(extra: list[str], tmp_path: Path) -> None:
    """PYTHONPATH of a file: the program ends with 2 before it starts a worker, and writes nothing."""
    _foreign(tmp_path / "conf", "hydra: {job: {env_set: {PYTHONPATH: evil}}}")
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/sitecustomize.py").write_text("open('executed', 'w')")
    result = run_program(["+experiment=foreign", "workers=fake", "tracking=none", *extra], tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "hydra.job.env_set.PYTHONPATH" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conf", "evil"]


@pytest.mark.parametrize(
    "flags",
    [
        *(["-cd", "/tmp"], ["--config-dir=/tmp"], ["--config-d", "x"], ["-cp", "x"]),
        *(["--config-name", "x"], ["--experimental-rerun", "x.pickle"], ["--exp=x"]),
    ],
)
def test_flags_that_bring_in_unchecked_configuration_are_refused(flags: list[str]) -> None:
    """Also abbreviated, as argparse would take them."""
    with pytest.raises(ConfigError, match="no such flag"):
        refuse_unknown_flags(flags)


@pytest.mark.parametrize(
    "flags", [["-m"], ["--cfg", "job"], ["-c", "all", "--resolve"], ["--info", "config"], ["-h"]]
)
def test_flags_of_every_day_pass(flags: list[str]) -> None:
    """Help, showing the configuration, and studies."""
    from sweeper.config.compose import parse_command_line

    refuse_unknown_flags(parse_command_line(flags).flags)


@pytest.mark.parametrize(
    ("typed", "flags", "overrides"),
    [
        (["--info"], ["--info=all"], []),
        (["-i"], ["--info=all"], []),
        (["--info", "config"], ["--info=config"], []),
        (["seed=1", "-i", "defaults-tree"], ["--info=defaults-tree"], ["seed=1"]),
        (["--info", "seed=1"], ["--info=all"], ["seed=1"]),
        (["--info=plugins", "seed=1"], ["--info=plugins"], ["seed=1"]),
        (["-m", "--info", "-h"], ["-m", "--info=all", "-h"], []),
    ],
)
def test_the_optional_value_of_info_is_told_from_an_override(
    typed: list[str], flags: list[str], overrides: list[str]
) -> None:
    """Hydra gets flag and value in one word, and the overrides after them."""
    from sweeper.config.compose import parse_command_line

    line = parse_command_line(typed)
    assert (line.flags, line.overrides) == (tuple(flags), tuple(overrides))
    refuse_unknown_flags(line.flags)


@pytest.mark.parametrize("flag", ["--info=", "--info=confg"])
def test_an_unknown_value_of_info_is_refused_with_the_known_ones(flag: str) -> None:
    """The message lists what Hydra can show."""
    with pytest.raises(ConfigError, match="Choose one of all, config, defaults, "):
        refuse_unknown_flags([flag])


def test_the_values_of_info_are_those_of_hydra() -> None:
    """Hydra's own parser has the same choices and the same default."""
    from hydra._internal.utils import get_args_parser

    from sweeper.config.compose import INFO_VALUES

    (option,) = [each for each in get_args_parser()._actions if "--info" in each.option_strings]
    assert tuple(option.choices or ()) == INFO_VALUES
    assert option.const == INFO_VALUES[0]


@pytest.mark.parametrize(
    "override",
    [
        *("seed=$(touch executed)", "seed=`touch executed`", "seed=1;touch executed"),
        *("hydra.sweeper.study_name=../outside", "hydra.sweeper.study_name=/tmp/outside"),
        "hydra.sweeper.study_name='a\nb'",
    ],
    ids=range(6),
)
def test_overrides_reach_no_shell_and_no_other_folder(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused as values; nothing is executed and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        studies(["+experiment=lr_rank_sweep", override])
    assert list(tmp_path.iterdir()) == []


def test_a_megabyte_of_override_is_refused_at_once(tmp_path: Path) -> None:
    """Hydra's parser takes half a minute for one; the message shows its beginning only."""
    with pytest.raises(ConfigError, match="is longer than") as caught:
        refuse_overrides(["hydra.sweeper.study_name=" + "a" * 1_000_000])
    assert len(str(caught.value)) < 300


def test_the_defaults_pass() -> None:
    """What is shipped needs no exception."""
    single([])
