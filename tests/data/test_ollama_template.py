"""Chat templates in the language of Ollama's Modelfile."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    "source", [COUNTING, CHATML.replace("message['content']", "'{{' + message['content']")]
)
def test_an_irregular_template_is_not_written(source: str) -> None:
    """A template that counts turns, or prints what a Modelfile would read, has no such texts."""
    assert turn_texts(_renderer(source)) is None
