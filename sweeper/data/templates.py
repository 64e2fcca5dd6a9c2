"""Templates: how a conversation is printed as text, and which part of the text is an answer.

Where an answer stands is found by printing the conversation up to it with the generation prompt, and
again with the answer: what the second print adds is what the model learns to write. No marker strings,
so it holds for every template, the model's own chat template included. Knows nothing of token ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import jinja2

from sweeper.core.errors import DataError, first_line
from sweeper.data.examples import ChatMessage, Example
from sweeper.data.row_formats import FORMATS, UnusableRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["completions", "last_completion", "everything"]
Span = tuple[int, int]
"""First character and the one behind the last."""

NAMES = ("auto", "instruction", "instruction_input", "chat", "plain")
VERBATIM = ("prompt_completion", "text")
"""Formats whose authors wrote the prompt as it shall stand."""

LLAMA_DATE = "26 Jul 2024"
"""Llama 3.1+ prints today's date; its own fallback is pinned, or a study would change at midnight."""

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class PromptTemplate(Protocol):
    """Prints messages."""

    @property
    def name(self) -> str:
        """As `data.template` says it."""

    @property
    def source(self) -> str:
        """All that decides the print, for fingerprints."""

    @property
    def owns_tokens(self) -> bool:
        """The text holds every special token and is tokenized whole, as apply_chat_template does."""

    def text(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = False) -> str:
        """The messages as text; the generation prompt is what an answer is written behind."""

    def marked(self, messages: Sequence[ChatMessage]) -> list[Span]:
        """The spans that the template itself marks as generated ({% generation %})."""


@dataclass(frozen=True)
class RenderedText:
    """A printed conversation: the text, and the spans of it that carry loss."""

    text: str
    spans: tuple[Span, ...]


def said(message: ChatMessage) -> str:
    """A turn's whole text: Alpaca's input stands below its instruction."""
    return "\n\n".join(part for part in (message.content, message.input) if part)


@dataclass(frozen=True)
class InstructionTemplate:
    """Alpaca's short form: ### Instruction, ### Input where there is one, ### Response.

    A system turn stands above, as Alpaca's preamble does; further turns follow below, each answer ended
    by the end-of-text token.
    """

    eos: str
    always_input: bool = False
    """Print the Input section where it is empty, too."""
    owns_tokens: bool = False

    @property
    def name(self) -> str:
        return "instruction_input" if self.always_input else "instruction"

    @property
    def source(self) -> str:
        return f"{self.name} {self.eos}"

    def text(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = False) -> str:
        sections: list[str] = []
        for message in messages:
            if message.role == "assistant":
                sections.append(f"### Response:\n{message.content}{self.eos}")
            elif message.role == "system":
                sections.append(message.content)
            else:
                sections += self._question(message)
        if add_generation_prompt:
            sections.append("### Response:\n")
        return "\n\n".join(sections)

    def _question(self, message: ChatMessage) -> list[str]:
        asked = f"### Instruction:\n{message.content}"
        given = f"### Input:\n{message.input}"
        return [asked, given] if message.input or self.always_input else [asked]

    def marked(self, messages: Sequence[ChatMessage]) -> list[Span]:
        return []


@dataclass(frozen=True)
class PlainTemplate:
    """Turns as they stand, with nothing between them but the end-of-text token behind each answer."""

    eos: str
    name: str = "plain"
    owns_tokens: bool = False

    @property
    def source(self) -> str:
        return f"{self.name} {self.eos}"

    def text(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = False) -> str:
        return "".join(
            said(message) + (self.eos if message.role == "assistant" else "")
            for message in messages
        )

    def marked(self, messages: Sequence[ChatMessage]) -> list[Span]:
        return []


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template: the tokenizer's own, or a user's file, in transformers' sandbox.

    Variables are those of Hugging Face chat templates; a user's file also gets each message's
    `instruction` and `input` apart from `content`.
    """

    name: str
    source: str
    tokenizer: PreTrainedTokenizerBase
    owns_tokens: bool

    def text(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = False) -> str:
        text = self._apply(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return str(text)

    def marked(self, messages: Sequence[ChatMessage]) -> list[Span]:
        if not GENERATION_MARK.search(self.source) or not self.tokenizer.is_fast:
            return []
        found = self._apply(
            messages,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        marked = zip(found["assistant_masks"], found["offset_mapping"], strict=True)
        return _joined([tuple(offsets) for is_target, offsets in marked if is_target])

    def _apply(self, messages: Sequence[ChatMessage], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                [self._variables(message) for message in messages],
                chat_template=self.source,
                date_string=LLAMA_DATE,
                **options,
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"data.template={self.name}: line {error.lineno}: {error}") from None
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UnusableRow(f"the template {self.name} refuses it: {first_line(error)}") from None

    def _variables(self, message: ChatMessage) -> dict[str, str]:
        variables = {"role": message.role, "content": said(message)}
        apart = {"instruction": message.content, "input": message.input}
        return variables if self.owns_tokens else {**variables, **apart}


def _joined(spans: Sequence[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def template_problem(name: str) -> str | None:
    """What is wrong with a `data.template`, as far as that is known without a tokenizer."""
    if name in NAMES or Path(name).expanduser().is_file():
        return None
    return f"data.template={name}: no such file, and none of {', '.join(NAMES)}"


def choose_template(
    name: str, format_name: str, tokenizer: PreTrainedTokenizerBase
) -> PromptTemplate:
    """The template for examples of a format.

    `auto`: conversations get the tokenizer's chat template if it has one; prompts with their completions
    and plain texts stand as they are; everything else gets the instruction template.

    Raises:
        DataError: no such template, or it cannot print that format.
    """
    if name == "auto":
        name = _automatic(format_name, tokenizer)
    if format_name == "text" and name != "plain":
        raise DataError(
            f"data.template={name} prints questions and answers, and data.format=text has none; "
            "give data.template=auto or plain"
        )
    eos = tokenizer.eos_token or ""
    if name in ("instruction", "instruction_input"):
        return InstructionTemplate(eos, always_input=name == "instruction_input")
    if name == "plain":
        return PlainTemplate(eos)
    if name == "chat":
        return JinjaTemplate("chat", _chat_template(tokenizer), tokenizer, owns_tokens=True)
    if problem := template_problem(name):
        raise DataError(problem)
    try:
        source = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.template={name}: {error}") from None
    return JinjaTemplate(name, source, tokenizer, owns_tokens=False)


def _automatic(format_name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if format_name in VERBATIM:
        return "plain"
    if FORMATS[format_name].conversational and tokenizer.chat_template is not None:
        return "chat"
    return "instruction"


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise DataError(
            "data.template=chat: the model's tokenizer has no chat template (base models often have "
            "none); give data.template=instruction, a Jinja file (data.template=FILE), or the model's "
            "instruct version"
        ) from None


def render(example: Example, template: PromptTemplate, train_on: TrainOn) -> list[RenderedText]:
    """Print an example: one text, or one per answer where the template prints history differently.

    Some chat templates change earlier answers once the conversation goes on (Qwen3 strips their
    thinking, Mistral moves the system prompt). There every answer gets a text of its own, which is how
    it is generated.

    Raises:
        Unusable: the template refuses the conversation, or prints an answer that does not begin with
            its own generation prompt.
    """
    messages = example.messages
    text = template.text(messages)
    if train_on == "everything":
        return [RenderedText(text, ((0, len(text)),))]
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if train_on == "last_completion":
        turns = turns[-1:]
    if spans := _spans(text, messages, turns, template):
        return [RenderedText(text, tuple(spans))]
    parts = [messages[: turn + 1] for turn in turns]
    return [render_last(part, template) for part in parts]


def render_last(messages: Sequence[ChatMessage], template: PromptTemplate) -> RenderedText:
    """Print a conversation that ends with an answer, with that answer's span.

    Raises:
        Unusable: as `render`.
    """
    text = template.text(messages)
    spans = _spans(text, messages, [len(messages) - 1], template)
    if not spans:
        raise UnusableRow(
            f"the template {template.name} prints a generation prompt that its answers do not begin "
            "with, and marks no {% generation %}; give data.template=instruction or a Jinja file"
        )
    return RenderedText(text, tuple(spans))


def _spans(
    text: str, messages: Sequence[ChatMessage], turns: Sequence[int], template: PromptTemplate
) -> list[Span] | None:
    """The spans of the answers at `turns`, or None where the template does not tell."""
    spans = []
    for turn in turns:
        prompt = template.text(messages[:turn], add_generation_prompt=True)
        answered = text if turn == len(messages) - 1 else template.text(messages[: turn + 1])
        if not (text.startswith(answered) and answered.startswith(prompt)):
            return _marked(messages, turns, template)
        spans.append((len(prompt), len(answered)))
    return spans


def _marked(
    messages: Sequence[ChatMessage], turns: Sequence[int], template: PromptTemplate
) -> list[Span] | None:
    answers = sum(message.role == "assistant" for message in messages)
    marked = template.marked(messages)
    return marked[-len(turns) :] if len(marked) == answers else None
