"""Limits on the size of YAML files, enforced before anything builds their content.

A few aliases of aliases stand for billions of nodes, and OmegaConf copies each of them. The module
knows PyYAML's events, not what a configuration means.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from sweeper.core.errors import ConfigError

MAX_BYTES = 2**20
"""Maximum size of a YAML file in bytes. A judgement: 300 times the largest file of conf/."""
MAX_NODES = 20_000
"""Maximum number of values, aliases counted at every use: ten times the largest real file."""
MAX_DEPTH = 100
"""Maximum nesting. A judgement: far above real files, and far below the depth at which Python's own
limit of 1,000 nested calls ends the parser."""

# libyaml's parser, which PyYAML has only where it was built with it
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def require_bounded(path: Path) -> None:
    """Refuse an oversized file. A file that is not YAML at all is left to the parser.

    Raises:
        ConfigError: the file is too long, too deep, or has too many values. Names file and line.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError([f"{path}: {size / 2**20:,.0f} MiB. A configuration has at most 1 MiB"])
    try:
        with path.open(encoding="utf-8") as file:
            problem = _problem(yaml.parse(file, Loader=_LOADER))
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # whoever reads it says what is wrong
    if problem is not None:
        raise ConfigError([f"{path}:{problem}"])


def _problem(events: object) -> str | None:
    """Return the first excess with its line, or None."""
    sizes: dict[str | None, int] = {}  # nodes that an anchor stands for, 0 while it is open
    opened: list[tuple[str | None, int]] = []  # anchors, and the nodes before them
    nodes = 0
    for event in events:  # type: ignore[attr-defined]
        line = event.start_mark.line + 1
        match event:
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                opened.append((event.anchor, nodes))
                sizes |= {event.anchor: 0} if event.anchor else {}
                nodes += 1
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                anchor, before = opened.pop()
                sizes |= {anchor: nodes - before} if anchor else {}
            case yaml.ScalarEvent():
                nodes += 1
                sizes |= {event.anchor: 1} if event.anchor else {}
            case yaml.AliasEvent():
                if sizes.get(event.anchor) == 0:
                    return f"{line}: *{event.anchor} stands inside itself"
                nodes += sizes.get(event.anchor, 1)
        if nodes > MAX_NODES:
            return (
                f"{line}: more than {MAX_NODES:,} values (aliases count as often as they are used)"
            )
        if len(opened) > MAX_DEPTH:
            return f"{line}: nested deeper than {MAX_DEPTH} levels"
    return None
