"""Names and docstrings stay within the limits that tools/measure_style.py measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import measure_style
from tools.measure_style import LIMITS, Module, measure, read_modules

ROOT = Path(__file__).resolve().parents[2]

BAD = '''"""What a module of the old style said; nobody knows."""


class Room:
    """Whether there is any."""

    size: int
    """Of the room; see there."""
'''


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, float], list[str]]:
    """The figures of the package, and the places that they count."""
    details: list[str] = []
    return measure(read_modules([ROOT / "sweeper"]), details), details


@pytest.mark.parametrize("figure", sorted(LIMITS))
def test_the_package_is_within_the_limit(
    figure: str, measured: tuple[dict[str, float], list[str]]
) -> None:
    """No figure of sweeper/ exceeds its limit."""
    figures, details = measured
    assert figures["lines"] > 10_000
    assert figures[figure] <= LIMITS[figure], "\n".join(details)


def test_the_old_style_is_found(tmp_path: Path) -> None:
    """Two copies of a module in the old style exceed every limit."""
    modules = [Module(tmp_path / name / "room.py", BAD) for name in ("one", "two")]
    figures = measure(modules, [])
    assert [name for name, limit in LIMITS.items() if figures[name] <= limit] == []
    assert figures["docstring openings, %"] == 100.0


def test_a_plain_docstring_passes(tmp_path: Path) -> None:
    """A verb, a noun phrase, and a name of two words are no findings."""
    text = '"""Return the size."""\n\n\nclass TrialSize:\n    """Size of a trial in MiB."""\n'
    figures = measure([Module(tmp_path / "size.py", text)], [])
    assert [name for name, limit in LIMITS.items() if figures[name] > limit] == []


def test_comments_are_counted_without_directives(tmp_path: Path) -> None:
    """A reason counts as a comment, a tool's directive does not."""
    text = "x = 1  # noqa: E501\n# Optuna stores the last value.\ny = 2  # in MiB\n"
    assert measure_style.Module(tmp_path / "x.py", text).comment_lines() == 2
