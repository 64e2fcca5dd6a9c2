"""Lists that people read are complete: each is compared with the source that it describes."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import typer.main
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sweeper.cli.verbs import VERBS, app
from sweeper.config.compose import group_choices
from sweeper.config.override_hints import SHORT_KEYS, SHORT_SECTIONS
from sweeper.core import errors
from sweeper.data.row_formats import FORMATS
from sweeper.workers import protocol
from tests import versions

ROOT = Path(__file__).resolve().parent.parent


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_help_lists_every_verb() -> None:
    """`python -m sweeper --help` names the verbs in the order of cli.VERBS, which are typer's."""
    header = yaml.safe_load(_read("conf/config.yaml"))["hydra"]["help"]["header"]
    (listed,) = re.findall(r"^Verbs: (.*)\.$", header, flags=re.MULTILINE)
    assert tuple(listed.split(", ")) == VERBS, "the line `Verbs:` of conf/config.yaml"
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == set(VERBS), "@app.command and VERBS of sweeper/cli/verbs.py differ"


def test_docs_list_every_sampler_pruner_and_format() -> None:
    """docs/search.md and docs/data.md name each choice, and so does the comment of data.format."""
    for group in ("sampler", "pruner"):
        page = _read("docs/search.md").partition(f"## {group.title()}s\n")[2].partition("\n## ")[0]
        listed = {word.removeprefix(f"{group}=") for word in re.findall(r"`([\w=]+)[` ]", page)}
        missing = set(group_choices(group)) - listed
        assert not missing, f"docs/search.md, {group.title()}s: {sorted(missing)}"
    table = _read("docs/data.md").partition("## Formats of a row\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(FORMATS), "docs/data.md"
    (comment,) = re.findall(r"^format:.*\n(?: +#.*\n)*", _read("conf/data/default.yaml"), re.M)
    missing = set(FORMATS) - set(re.findall(r"\w+", comment))
    assert not missing, f"conf/data/default.yaml, the comment of format: {sorted(missing)}"


def _kinds(union: Any) -> list[str]:
    """The wire names of a union of messages."""
    return [message.model_fields["kind"].default for message in get_args(union)]


def test_architecture_lists_every_message() -> None:
    """docs/architecture.md names the protocol's commands and events, in the protocol's order."""
    text = " ".join(_read("docs/architecture.md").split())
    (down,) = re.findall(r"Down: ([a-z, ]+)\.", text)
    (up,) = re.findall(r"Up: ([a-z, ]+)\.", text)
    assert down.split(", ") == _kinds(protocol.WorkerCommand), "docs/architecture.md, Down:"
    assert up.split(", ") == _kinds(protocol.WorkerEvent), "docs/architecture.md, Up:"


def test_short_keys_are_listed_where_people_look() -> None:
    """docs/search.md and the sweeper's YAML name every key that needs no hydra.sweeper prefix."""
    (page,) = re.findall(r"On the command line (.*?) need no prefix", _read("docs/search.md"), re.S)
    assert re.findall(r"`(\w+)`", page) == [*SHORT_KEYS, *SHORT_SECTIONS]
    comment = _read("conf/hydra/sweeper/study.yaml").replace("\n# ", " ")
    (words,) = re.findall(r"(n_trials, .*?) need no hydra\.sweeper\. in front", comment)
    named = set(re.findall(r"\w+", words)) - {"and", "the", "keys", "of"}
    assert named == {*SHORT_KEYS, *SHORT_SECTIONS}


def _broad_handlers(path: Path) -> list[ast.ExceptHandler]:
    """The handlers of a module that catch every exception."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    broad = ("Exception", "BaseException")
    return [
        handler
        for handler in handlers
        if handler.type is None
        or any(isinstance(node, ast.Name) and node.id in broad for node in ast.walk(handler.type))
    ]


def test_broad_excepts_stand_where_contributing_says_and_have_a_reason() -> None:
    """Every `except Exception` is in a listed module, and has a comment or raises again."""
    (rule,) = re.findall(r"- \*\*`except Exception`.*?(?=\n- \*\*)", _read("CONTRIBUTING.md"), re.S)
    found: dict[str, list[int]] = {}
    for path in sorted((ROOT / "sweeper").rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        name = path.relative_to(ROOT).as_posix()
        for handler in _broad_handlers(path):
            found.setdefault(name, []).append(handler.lineno)
            raises = any(isinstance(node, ast.Raise) for node in ast.walk(handler))
            assert raises or "#" in lines[handler.lineno - 1], f"{name}:{handler.lineno}: why?"
    assert set(re.findall(r"`(sweeper/[\w/]+\.py)`", rule)) == set(found)


def test_the_tree_of_errors_is_drawn_whole() -> None:
    """The docstring of errors.py draws every class below its base class, and no other class."""
    drawn: dict[str, str] = {}
    above = ["SweeperError"]
    for indent, name in re.findall(r"^([│├└─ ]+)(\w+)", inspect.getdoc(errors) or "", re.MULTILINE):
        depth = len(indent) // 4
        above[depth:] = [name]
        drawn[name] = above[depth - 1]
    classes = [
        kind
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, errors.SweeperError)
    ]
    assert drawn == {
        kind.__name__: kind.__base__.__name__  # type: ignore[union-attr]
        for kind in classes
        if kind is not errors.SweeperError
    }


def test_no_requirement_is_listed_twice() -> None:
    """pyproject.toml gives each package one range, with the reason behind it."""
    project = tomllib.loads(_read("pyproject.toml"))["project"]
    for listed in (project["dependencies"], *project["optional-dependencies"].values()):
        names = [re.split(r"[\[<>=~! ]", requirement)[0].lower() for requirement in listed]
        assert sorted(set(names)) == sorted(names)


def test_both_ends_of_every_range_can_be_installed_by_name() -> None:
    """`make test-versions` pins each lower end, and all pins of constraints.txt lie in the ranges."""
    lines = [line for line in _read("constraints.txt").splitlines() if "==" in line]
    pins = {
        canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines)
    }
    lows = {versions.name_of(text): text.partition("==")[2] for text in versions.at_end("lowest")}
    requirements = [Requirement(text) for text in versions.requirements()]
    assert len(requirements) > 20
    for requirement in requirements:
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier
        assert requirement.name == "torch" or lows[requirement.name] in requirement.specifier


def test_every_make_target_is_phony_and_explained() -> None:
    """`make` lists each target that people type, and no file of that name can hide it."""
    text = _read("Makefile")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    explained = re.findall(r"^([a-z-]+):.*## ", text, flags=re.MULTILINE)
    targets = re.findall(r"^([a-z][a-z-]*):(?!=)", text, flags=re.MULTILINE)
    assert sorted(phony.split()) == sorted(explained) == sorted(targets)
