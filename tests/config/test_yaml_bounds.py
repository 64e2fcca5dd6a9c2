"""How much a YAML file may stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeper.config import compose
from sweeper.config.compose import conf_dir, read_yaml
from sweeper.config.yaml_bounds import MAX_NODES, require_bounded
from sweeper.core.errors import ConfigError


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return path


def test_every_packaged_file_is_far_within() -> None:
    """No configuration of ours comes near a bound."""
    paths = list(conf_dir().rglob("*.yaml"))
    assert conf_dir() / "config.yaml" in paths
    for path in paths:
        require_bounded(path)


@pytest.mark.parametrize("leaves", [MAX_NODES - 20, MAX_NODES + 20])
def test_aliases_count_as_often_as_they_are_used(tmp_path: Path, leaves: int) -> None:
    """Ten times a list is ten lists, whatever the file's length."""
    items = ", ".join(["x"] * (leaves // 11))
    uses = "\n".join(f"u{number}: *all" for number in range(10))
    path = _write(tmp_path, f"all: &all [{items}]\n{uses}\n")
    if leaves < MAX_NODES:
        require_bounded(path)
        return
    with pytest.raises(ConfigError, match=rf"some\.yaml:\d+: more than {MAX_NODES:,} values"):
        require_bounded(path)


def test_ordinary_anchors_and_merges_pass(tmp_path: Path) -> None:
    """What people write anchors for."""
    path = _write(tmp_path, "base: &b {x: 1, y: &y 2}\nother: {<<: *b, z: *y}\n")
    require_bounded(path)
    assert read_yaml(path)["other"] == {"x": 1, "y": 2, "z": 2}


def test_what_is_no_yaml_is_left_to_its_reader(tmp_path: Path) -> None:
    """The reader says what is wrong, and where."""
    require_bounded(_write(tmp_path, "a: [1, 2\nb: 3\n"))
    require_bounded(_write(tmp_path, "a: *nowhere\n"))


def test_a_configuration_file_is_read_again_once_it_has_changed(tmp_path: Path) -> None:
    """Of the same length, and composed in between: the new value counts."""
    file = tmp_path / "mine" / "a.yaml"
    file.parent.mkdir()
    overrides = [f"hydra.searchpath=[file://{tmp_path}]", "+mine=a"]
    found = []
    for seed in (1, 2):
        file.write_text(f"# @package _global_\nseed: {seed}\n", encoding="utf-8")
        compose._composed_or_refused.cache_clear()
        found.append(compose.compose(overrides).config["seed"])
    assert found == [1, 2]
