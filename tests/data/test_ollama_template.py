"""Chat templates in the language of Ollama's Modelfile."""

from __future__ import annotations

import re

import jinja2
import pytest

from sweeper.builtin.stand_in_models import CHATML, LLAMA3
from sweeper.data.ollama_template import Turns, TurnTexts, turn_texts
from sweeper.data.served_prompt import _instruction

MORE: Turns = (
    ("system", "Be brief."),
    ("user", "One?"),
    ("assistant", "1."),
    ("user", "Two?"),
    ("assistant", "2."),
    ("user", "Three?"),
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
QWEN25 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
) + CHATML
BRACES = CHATML.replace("message['content']", "'{{' + message['content']")
COUNTING = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"


def _renderer(source: str):  # type: ignore[no-untyped-def]
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)

    def refuse(message: str) -> None:
        raise ValueError(message)

    def render(turns: Turns) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        options = {"add_generation_prompt": True, "bos_token": "", "raise_exception": refuse}
        return template.render(messages=messages, **options)

    return render


@pytest.mark.parametrize(
    "source",
    [CHATML, LLAMA3, QWEN25, MISTRAL, _instruction('"</s>"', always_input=False)],
    ids=["chatml", "llama3", "default system", "no system", "instruction"],
)
def test_longer_conversations_are_rendered_the_same(source: str) -> None:
    """The texts around the turns give the template's own text of a conversation never tried."""
    render = _renderer(source)
    found = turn_texts(render)
    assert isinstance(found, TurnTexts)
    turns = MORE if found.system is not None else MORE[1:]
    assert found.render(turns) == render(turns)
    assert found.render(MORE[1:]) == render(MORE[1:])
    assert found.user in found.go


class GoTemplate:
    """Go's text/template as far as Modelfiles use it: if, else if, else, range, end.

    A second reading of the written template, which knows nothing of the texts around the turns.
    """

    def __init__(self, template: str, turns: Turns) -> None:
        self._parts = re.split(r"\{\{ (.*?) \}\}", template)
        self._turns = turns
        self._printed: list[str] = []

    def text(self) -> str:
        """Return what the template prints."""
        assert self._block(0, ("", ""), True) == len(self._parts)
        return "".join(self._printed)

    def _block(self, place: int, turn: tuple[str, str], active: bool) -> int:
        """Print from a part on, up to the end or else of its block, whose place is returned."""
        while place < len(self._parts):
            part = self._parts[place]
            if place % 2 == 0 or part == ".Content":
                self._printed += [part if place % 2 == 0 else turn[1]] if active else []
            elif part == "range .Messages":
                place = max(self._block(place + 1, each, active) for each in self._turns)
            elif part.startswith("if "):
                place = self._branches(place, turn, active)
            else:
                return place
            place += 1
        return place

    def _branches(self, place: int, turn: tuple[str, str], active: bool) -> int:
        taken = False
        while self._parts[place] != "end":
            holds = not taken and self._holds(self._parts[place].removeprefix("else "), turn)
            place = self._block(place + 1, turn, active and holds)
            taken = taken or holds
        return place

    def _holds(self, words: str, turn: tuple[str, str]) -> bool:
        if match := re.fullmatch(r'if eq \.Role "(\w+)"', words):
            return turn[0] == match[1]
        ruled = any(role == "system" for role, _ in self._turns)
        return {"if not .System": not ruled, "else": True}[words]


@pytest.mark.parametrize(
    "source",
    [CHATML, LLAMA3, QWEN25, MISTRAL, _instruction('"</s>"', always_input=False)],
    ids=["chatml", "llama3", "default system", "no system", "instruction"],
)
def test_the_modelfile_s_template_prints_what_the_chat_template_prints(source: str) -> None:
    """The template in Go's language, run by a second reading of that language, gives the same text."""
    render = _renderer(source)
    found = turn_texts(render)
    assert isinstance(found, TurnTexts)
    for turns in (MORE if found.system is not None else MORE[1:], MORE[1:], MORE[1:2]):
        assert GoTemplate(found.go, turns).text() == render(turns)


@pytest.mark.parametrize(
    "source", [COUNTING, CHATML.replace("message['content']", "'{{' + message['content']")]
)
def test_an_irregular_template_is_not_written(source: str) -> None:
    """A template that counts turns, or prints what a Modelfile would read, has no such texts."""
    assert turn_texts(_renderer(source)) is None
