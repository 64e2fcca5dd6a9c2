"""The chat template and the end tokens with which other programs prompt a model as it was trained.

Every template of `templates.py` is written as one Jinja chat template, which tokenizers carry. The
template is then tried: its tokens must be those of the training. Does not know models.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from sweeper.core.errors import DataError, first_line
from sweeper.data.encode import encode_prompts
from sweeper.data.examples import ChatMessage, Example, RawRow
from sweeper.data.row_formats import TEXT_FORMATS
from sweeper.data.templates import (
    LLAMA_DATE,
    InstructionTemplate,
    JinjaTemplate,
    PromptTemplate,
    choose_template,
)
from sweeper.data.tokens import EncodedPrompt, TokenizerSetup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sweeper.config.settings import DataSettings

PROBES = (
    (ChatMessage("user", "What is this?"),),
    (
        ChatMessage("user", "What is this?"),
        ChatMessage("assistant", "An answer."),
        ChatMessage("user", "And that?"),
    ),
)
"""Conversations whose tokens are compared."""
ALPACA_COLUMNS = re.compile(r"\b(instruction|input)\b")
WITH_ALPACA_COLUMNS = (
    "{% set found = namespace(messages=[]) %}{% for message in messages %}"
    "{% set found.messages = found.messages + [dict(message, "
    "instruction=message.instruction or message.content, input=message.input or '')] %}"
    "{% endfor %}{% set messages = found.messages %}"
)
"""Start of a template that reads Alpaca's columns, which a chat message does not have."""


@dataclass(frozen=True)
class ServedPrompt:
    """The prompt template of a stored model and the tokens that end its answers.

    Attributes:
        name: Name of the template, or None if no prompts were trained.
        chat_template: The template as Jinja source, or None if no prompts were trained.
        end_token_ids: Ids of the tokens that end an answer.
        problem: Reason why the chat template gives other tokens than the training had, or None.
        tools: True if functions were offered in the training.
    """

    name: str | None
    chat_template: str | None
    end_token_ids: tuple[int, ...]
    problem: str | None = None
    tools: bool = False

    def tokenizer(self, trained: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Return a copy of the tokenizer with this template and end token."""
        served = copy.deepcopy(trained)
        if self.chat_template is not None:
            served.chat_template = self.chat_template
        if len(self.end_token_ids) == 1:
            # GGUF files take the only end token that they know from here.
            served.eos_token = served.convert_ids_to_tokens(self.end_token_ids[0])
        return served


def prompt_format(examples: Sequence[Example]) -> str:
    """Return the format in which a model that was trained on these examples is asked.

    Rows of several formats may have several templates. The format of most rows is taken.
    """
    counts = Counter(each.format for each in examples if each.format not in TEXT_FORMATS)
    # Plain texts have no prompts. A prompt of this format is printed as they are, without a template
    return counts.most_common(1)[0][0] if counts else "prompt_completion"


def serve_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> ServedPrompt:
    """Return how a model that was trained on these examples is prompted.

    Rows of several formats may have several templates. The template of most rows is served, because
    a tokenizer has one, and the problem names the others.

    Raises:
        DataError: A template cannot render a question and its answer.
    """
    counts = Counter(each.format for each in examples if each.format not in TEXT_FORMATS)
    own = (tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ()
    if not counts:
        return ServedPrompt(None, None, own)
    names = [name for name, _ in counts.most_common()]
    probes = {name: _encoded(PROBES[0], name, tokenizer, settings) for name in names}
    ends = tuple(dict.fromkeys(probe.end_token_id for probe in probes.values()))
    templates = [
        choose_template(settings.template, name, tokenizer, settings.chat_template_kwargs)
        for name in names
    ]
    source = chat_template(templates[0], TokenizerSetup(tokenizer))
    served = ServedPrompt(
        templates[0].name,
        source,
        ends,
        tools=any(each.tools for each in examples),
    )
    others = sorted({each.name for each in templates} - {templates[0].name})
    problem = (
        f"other rows were trained with the template {' and '.join(others)}"
        if others
        else _problem(served, names[0], tokenizer, settings)
    )
    return ServedPrompt(served.name, source, ends, problem, served.tools)


def chat_template(template: PromptTemplate, setup: TokenizerSetup) -> str:
    """Return a template as Jinja source that prints special tokens itself, as chat templates do."""
    tokens = setup.tokenizer.convert_ids_to_tokens(setup.opening)
    opening = f"{{{{ {_literal(''.join(tokens))} }}}}" if tokens else ""
    if isinstance(template, JinjaTemplate):
        variables = {"date_string": LLAMA_DATE, **template.variables}
        known = [
            _default(name, value) for name, value in variables.items() if name in template.source
        ]
        if template.owns_tokens:
            return "".join([*known, template.source])
        columns = WITH_ALPACA_COLUMNS if ALPACA_COLUMNS.search(template.source) else ""
        return "".join([opening, *known, columns, template.source])
    end = _literal(setup.tokenizer.eos_token or "")
    if isinstance(template, InstructionTemplate):
        return opening + _instruction(end, always_input=template.always_input)
    return opening + (
        '{% for message in messages %}{{ message.content }}{% if message.role == "assistant" %}'
        f"{{{{ {end} }}}}{{% endif %}}{{% endfor %}}"
    )


def _instruction(end: str, *, always_input: bool) -> str:
    given = r'{{ "\n\n### Input:\n" + (message.input or "") }}'
    if not always_input:
        given = f"{{% if message.input %}}{given}{{% endif %}}"
    return (
        r'{% for message in messages %}{% if not loop.first %}{{ "\n\n" }}{% endif %}'
        r'{% if message.role == "assistant" %}{{ "### Response:\n" + message.content + '
        f"{end} }}}}"
        r'{% elif message.role == "system" %}{{ message.content }}'
        r'{% else %}{{ "### Instruction:\n" + message.content }}'
        f"{given}{{% endif %}}{{% endfor %}}"
        r'{% if add_generation_prompt %}{{ "\n\n### Response:\n" }}{% endif %}'
    )


def _default(name: str, value: Any) -> str:
    """Return Jinja source that gives a variable its trained value where a program gives none."""
    return f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"


def _literal(value: Any) -> str:
    """Return a value as a literal of Jinja."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if value is None:
        return "none"
    return json.dumps(value, ensure_ascii=False)


def _encoded(
    turns: Sequence[ChatMessage],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
) -> EncodedPrompt:
    answered = (*turns, ChatMessage("assistant", "An answer."))
    example = Example(answered, RawRow({}, "a probe of the template"), format=name)
    return encode_prompts([example], tokenizer, settings)[0]


def _problem(
    served: ServedPrompt, name: str, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> str | None:
    """Return why a program that uses the chat template gives a model other tokens than the training."""
    copied = served.tokenizer(tokenizer)
    for turns in PROBES:
        try:
            trained = _encoded(turns, name, tokenizer, settings).input_ids
            found = copied.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in turns],
                add_generation_prompt=True,
                return_dict=True,
            )["input_ids"]
        except DataError:
            continue  # a template for single questions has no conversations
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            return (
                f"it cannot be rendered without the training's own variables: {first_line(error)}"
            )
        if found != trained:
            return f"it gives {len(found)} tokens where the training had {len(trained)} others"
    return None
