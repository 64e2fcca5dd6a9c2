"""Every hint that a message or a page of the docs gives can be typed as it stands.

A hint is a `sweeper …` command, or a KEY=VALUE override, in a string of the source or in code style
in docs/. Docstrings are left out, since no user reads them. Placeholders get an example's value.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from sweeper.cli.verbs import VERBS, app
from sweeper.config.compose import (
    compose,
    compose_leniently,
    conf_dir,
    flag_problems,
    parse_command_line,
)
from sweeper.config.override_hints import in_full, shortened
from sweeper.config.settings import RunSettings, StudySettings, flatten, validate

ROOT = conf_dir().parent
SOURCES = sorted((ROOT / "sweeper").rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PLACEHOLDER = "…"
"""Stands for the parts of an f-string that are filled in when it is shown."""

_COMMAND = re.compile(
    r"(?:(?<=`)|python -m )sweeper ([a-z+~-].*)"
    rf"|(?<![\w./`-])(?<!-m )sweeper ((?:{'|'.join(VERBS)}|[+-]).*)"
)
_OVERRIDE = re.compile(
    r"(?<![\w.{\[/=-])([~+]{0,2}([a-z]\w*(?:[./]\w+)*)="
    r"(?:\[[^\]]*\]|\$?\{[^}]*\}|\w+\([^)]*\)|[^\s,;)'\"`|?]*[^\s,;:.)'\"`|?]))"
)

NO_OVERRIDES = {
    "policy=continue": "of a nightly set",
    "nightly.budget.wall_clock=2h": "of a nightly set",
    "nightly.champion.max_forgetting=null": "of a nightly set",
    "width=device-width": "HTML",
    "over=before": "a Python call",
    "over=last.best": "a Python call",
    "timezone=utc": "a PostgreSQL option",
    "adapter.use_dora=true/adapter.r": "the name of a sampler's parameter",
    "hydra.sweeper.arms={}": "an example of what is refused",
    "add_generation_prompt=True": "Python that a card shows",
    "skip_special_tokens=True": "Python that a card shows",
    "messages=[]": "Python that a card shows",
    "input=message.input": "a chat template",
    "instruction=message.instruction": "a chat template",
}
"""Texts that look like overrides of training and are none, with what they are."""

NEEDS = {
    "adapter=none": ["quantization=none"],
    "adapter.r=null": ["adapter.trainable_parameters=20M"],
    "adapter.trainable_parameters=20M": ["adapter.r=null"],
    "adapter.init_lora_weights=olora": ["quantization=none"],
    "objective=rougeL": ["evaluation.generation.num_examples=1"],
    "sampler=optuna": ["sampler.class_name=QMCSampler"],
    "pruner=optuna": ["pruner.class_name=HyperbandPruner"],
    "sampler.class_name=CmaEsSampler": ["sampler=optuna"],
    "sampler.class_name=NSGAIISampler": ["sampler=optuna"],
    "sampler.class_name=QMCSampler": ["sampler=optuna"],
    "pruner.class_name=HyperbandPruner": ["pruner=optuna"],
    "pruner.rungs=[]": ["pruner=none"],
    "workers.address=FIRST_NODE:6379": ["workers=ray"],
    "training.fsdp=true": ["adapter=none", "quantization=none", "training.devices_per_trial=2"],
}
"""Hints that are valid beside other settings only: those settings."""

METAVARIABLE = re.compile(r"…|^[A-Z_]+$|/NAME$|^\$\{|^choice\(")
"""Values that a reader replaces, or that only a search reads."""


def _strings(path: Path) -> Iterator[str]:
    """The strings of a module that may be shown, f-strings with … for what is filled in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            hidden |= {id(part) for part in node.values}
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and id(node) not in hidden:
            yield str(node.value)


def _code(path: Path) -> Iterator[str]:
    """The texts in code style of a page: inline and in blocks."""
    text = path.read_text(encoding="utf-8")
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    yield from re.findall(r"^(?: {4}|\$ ?)(.*sweeper .*)$", text, flags=re.MULTILINE)


def _texts() -> Iterator[tuple[str, str]]:
    for path in SOURCES:
        yield from ((path.relative_to(ROOT).as_posix(), text) for text in _strings(path))
    for path in PAGES:
        yield from ((path.relative_to(ROOT).as_posix(), text) for text in _code(path))


def known_keys() -> set[str]:
    """Every key and group that may stand on the command line, with its sections."""
    defaults = compose([])
    keys = set(flatten({**defaults.config, "hydra": {"sweeper": defaults.sweeper}}))
    keys |= {key.rpartition(".")[0] for key in keys}
    keys |= {shortened(key) for key in keys} | set(defaults.choices) | {"hydra.searchpath"}
    return keys | {"experiment", "stand_in", "nightly"}


KNOWN = known_keys()
SECTIONS = {key.split(".")[0] for key in KNOWN if "." in key}


def _overrides() -> dict[str, str]:
    """Override -> where it is written. Unknown keys count where they begin like a setting."""
    found: dict[str, str] = {}
    for where, text in _texts():
        for override, key in _OVERRIDE.findall(text):
            literal = PLACEHOLDER not in override and where.startswith("sweeper")
            if key in KNOWN or ("." in key and key.split(".")[0] in SECTIONS) or literal:
                found.setdefault(override, where)
    return found


OVERRIDES = _overrides()


def _commands() -> dict[str, str]:
    found: dict[str, str] = {}
    for where, text in _texts():
        for line in text.splitlines():
            for command in map("".join, _COMMAND.findall(line)):
                cut = re.split(r"\s{2,}|[`]|\s#\s|\s\(|\)$|[?;,:]\s|[?;,:]$| && | > ", command)[0]
                found.setdefault(cut.strip(), where)
    return found


COMMANDS = _commands()


def test_hints_are_found() -> None:
    """The collectors see the hints of messages and pages, so an empty table means a broken pattern."""
    assert len(OVERRIDES) > 150
    assert len(COMMANDS) > 40
    assert "tracking=mlflow" in OVERRIDES
    assert any(command.startswith("best") for command in COMMANDS)


@pytest.mark.parametrize("override", sorted(OVERRIDES))
def test_an_override_of_a_hint_is_valid(override: str) -> None:
    """The key of a hint exists, and its value, where the hint has one, is accepted."""
    if override in NO_OVERRIDES:
        return
    _, key, value = re.match(r"([+~]*)([^=]+)=(.*)", override, flags=re.DOTALL).groups()  # type: ignore[union-attr]
    assert key in KNOWN, (
        f"{OVERRIDES[override]}: {override} has no such key. Mend the hint, or add it to NO_OVERRIDES"
    )
    if METAVARIABLE.search(value) or key in ("experiment", "nightly", "hydra.searchpath"):
        return
    overrides = [in_full(text) for text in (override, *NEEDS.get(override, []))]
    composition, problems = compose_leniently(overrides)
    assert not problems, f"{OVERRIDES[override]}: {problems}"
    validate(RunSettings, composition.config)
    validate(StudySettings, composition.sweeper)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_of_a_hint_exists(command: str) -> None:
    """The verb, its own verb and its options exist; overrides are read as a command line is."""
    words = command.rstrip("\\").replace(PLACEHOLDER, "x").split()
    if words[0] not in VERBS:
        assert "=" in words[0] or words[0].startswith("-"), COMMANDS[command]
        assert not flag_problems(parse_command_line(words).flags)
        return
    node = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    if hasattr(node, "commands") and len(words) > 1 and words[1] not in ("x", "VERB"):
        assert set(words[1].split("|")) <= set(node.commands), COMMANDS[command]
        node = node.commands[words[1].split("|")[0]]
    options = {option for parameter in node.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options, COMMANDS[command]
