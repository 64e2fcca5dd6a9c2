"""How large a YAML file may be, told before anything builds what it says.

A few aliases of aliases stand for billions of nodes, and OmegaConf copies every one. Knows PyYAML's
events only, not what a configuration means.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from sweeper.core.errors import ConfigError

MAX_BYTES = 2**20
MAX_NODES = 20_000
"""Values in all, aliases counted as often as they are used; ten times the largest real one."""
MAX_DEPTH = 100

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def require_bounded(path: Path) -> None:
    """Check a file that somebody else may have written; what is no YAML at all is not judged.

    Raises:
        ConfigError: it is too long, too deep, or stands for too many values; names file and line.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError([f"{path}: {size / 2**20:,.0f} MiB; a configuration has at most 1 MiB"])
    try:
        with path.open(encoding="utf-8") as file:
            problem = _problem(yaml.parse(file, Loader=_LOADER))
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # whoever reads it says what is wrong
    if problem is not None:
        raise ConfigError([f"{path}:{problem}"])


def _problem(events: object) -> str | None:
    """The first thing that is too much, with its line."""
    sizes: dict[str | None, int] = {}  # of what an anchor stands for; 0 while it is still open
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
