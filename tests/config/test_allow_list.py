"""A configuration, whoever wrote it, cannot name code to run, files outside, or a shell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sweeper.__main__ import refuse_overrides
from sweeper.config.compose import compose, refuse_unknown_flags
from sweeper.core.errors import ConfigError
from sweeper.search.study_plan import single, studies

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
