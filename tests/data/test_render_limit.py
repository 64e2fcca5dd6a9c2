"""A template that never ends is ended, in whatever thread it renders."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sweeper.core.errors import DataError
from sweeper.data.render_limit import WATCH, RenderTooSlow, RenderWatch
from sweeper.data.templates import choose_template
from sweeper.data.turns import UnusableRow
from tests.data.chat import byte_level, talk

LONG = "range(99999)"
ENDLESS = {
    "nested loops": f"{{% for a in {LONG} %}}{{% for b in {LONG} %}}{{% endfor %}}{{% endfor %}}",
    "output": f"{{% for a in {LONG} %}}{{% for b in {LONG} %}}x{{% endfor %}}{{% endfor %}}",
    "branching macro": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
}


def _render(source: str, folder: Path) -> str:
    path = folder / "own.jinja"
    path.write_text(source, encoding="utf-8")
    return choose_template(str(path), "messages", byte_level()).text(talk("Hi?", "Yes.").messages)


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_never_ends_is_an_error_of_the_template(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the limit, with the setting and what to look for."""
    monkeypatch.setattr("sweeper.data.templates.WATCH", RenderWatch(0.2))
    with pytest.raises(
        DataError, match=r"own\.jinja: one conversation is not rendered within 0\.2"
    ):
        _render(ENDLESS[kind], tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0].content * (30 * 2**20) }}",
    ],
    ids=["range", "recursion", "length"],
)
def test_a_template_that_asks_for_too_much_loses_the_row(source: str, tmp_path: Path) -> None:
    """Python and the sandbox stop it by themselves, and the output has a limit."""
    with pytest.raises(UnusableRow, match=r"the template .*own\.jinja re(jects|nders)"):
        _render(source, tmp_path)


def test_only_the_thread_that_is_too_slow_is_ended() -> None:
    """Its neighbour renders on, and so does the same thread afterwards."""
    watch = RenderWatch(0.1)
    ended: list[str] = []

    def loop() -> None:
        try:
            with watch.limited():
                while True:
                    pass
        except RenderTooSlow:
            ended.append("slow")

    thread = threading.Thread(target=loop)
    thread.start()
    while thread.is_alive():
        with watch.limited():
            thread.join(0.01)
    with watch.limited():
        ended.append("next")
    assert ended == ["slow", "next"]


def test_the_limit_is_far_above_any_rendering() -> None:
    """Ten seconds: a busy machine ends no sound template."""
    assert WATCH.limit_s == 10
