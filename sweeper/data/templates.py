"""Render conversations as text, and find the spans of the text that are answers.

An answer's span is found by rendering the conversation up to the answer with the generation prompt, and
again with the answer: the text that the second rendering adds is the answer. This works for every
template, including the model's chat template, without marker strings. Does not know token ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import jinja2

from sweeper.core.errors import DataError, first_line
from sweeper.core.regular_files import irregular
from sweeper.data.examples import ChatMessage, Example
from sweeper.data.render_limit import WATCH, RenderTooSlow
from sweeper.data.row_formats import FORMATS, TEXT_FORMATS
from sweeper.data.turns import REASONING, UnusableRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["completions", "last_completion", "everything"]
Span = tuple[int, int]
"""Start and end of a part of a text in characters, the end exclusive."""
Tools = Sequence[Mapping[str, Any]]
"""Descriptions of functions, as the chat templates of transformers take them."""

NAMES = ("auto", "instruction", "instruction_input", "chat", "plain")
VERBATIM = ("prompt_completion", *TEXT_FORMATS)
"""Formats whose prompts are complete and must not be wrapped in a template."""

LLAMA_DATE = "26 Jul 2024"
"""Date passed to chat templates: the fallback date of Llama 3.1's own template."""
# Llama 3.1+ templates print today's date, so without a fixed date a study's data would change at
# midnight.

MAX_RENDERED_CHARS = 64 * 2**20
"""Maximum characters of a rendered conversation. A row holds at most a quarter of them."""

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class PromptTemplate(Protocol):
    """Protocol of the templates that render messages as text."""

    @property
    def name(self) -> str:
        """Name used in data.template."""

    @property
    def source(self) -> str:
        """Text that determines the rendering, for fingerprints."""

    @property
    def owns_tokens(self) -> bool:
        """True if the text holds every special token and is tokenized whole, as a chat template's is."""

    def text(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = False,
        tools: Tools = (),
    ) -> str:
        """Render the messages, followed by the generation prompt if asked."""

    def marked(self, messages: Sequence[ChatMessage], tools: Tools = ()) -> list[Span]:
        """Return the spans that the template itself marks as generated ({% generation %})."""


@dataclass(frozen=True)
class RenderedText:
    """A rendered conversation: its text and the spans of the text that carry loss."""

    text: str
    spans: tuple[Span, ...]


def turn_text(message: ChatMessage) -> str:
    """Return a turn's whole text: the content and, below a blank line, Alpaca's input."""
    return "\n\n".join(part for part in (message.content, message.input) if part)


@dataclass(frozen=True)
class InstructionTemplate:
    """Alpaca's short form: the sections ### Instruction, ### Input (if there is one) and ### Response.

    A system turn precedes them, like Alpaca's preamble. Further turns follow as further sections. Every
    answer ends with the end-of-text token.
    """

    eos: str
    always_input: bool = False
    """True to render the Input section even if the input is empty."""
    owns_tokens: bool = False

    @property
    def name(self) -> str:
        return "instruction_input" if self.always_input else "instruction"

    @property
    def source(self) -> str:
        return f"{self.name} {self.eos}"

    def text(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = False,
        tools: Tools = (),
    ) -> str:
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
        instruction = f"### Instruction:\n{message.content}"
        extra = f"### Input:\n{message.input}"
        return [instruction, extra] if message.input or self.always_input else [instruction]

    def marked(self, messages: Sequence[ChatMessage], tools: Tools = ()) -> list[Span]:
        return []


@dataclass(frozen=True)
class PlainTemplate:
    """Turns without any decoration. Every answer is followed by the end-of-text token."""

    eos: str
    name: str = "plain"
    owns_tokens: bool = False

    @property
    def source(self) -> str:
        return f"{self.name} {self.eos}"

    def text(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = False,
        tools: Tools = (),
    ) -> str:
        return "".join(
            turn_text(message) + (self.eos if message.role == "assistant" else "")
            for message in messages
        )

    def marked(self, messages: Sequence[ChatMessage], tools: Tools = ()) -> list[Span]:
        return []


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template, either the tokenizer's own or a user's file, rendered in transformers' sandbox.

    The variables are those of Hugging Face chat templates. A user's file also gets each message's
    `instruction` and `input` in addition to `content`.
    """

    name: str
    source: str
    tokenizer: PreTrainedTokenizerBase
    owns_tokens: bool
    variables: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further variables of the template (data.chat_template_kwargs)."""

    def text(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = False,
        tools: Tools = (),
    ) -> str:
        text = str(
            self._apply(
                messages, tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
        if len(text) > MAX_RENDERED_CHARS:
            raise UnusableRow(
                f"the template {self.name} renders more than {MAX_RENDERED_CHARS:,} characters"
            )
        return text

    def marked(self, messages: Sequence[ChatMessage], tools: Tools = ()) -> list[Span]:
        # transformers needs a fast tokenizer for the assistant mask.
        if not GENERATION_MARK.search(self.source) or not self.tokenizer.is_fast:
            return []
        found = self._apply(
            messages,
            tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        # transformers returns a mask over tokens. Their offsets give the spans of the text.
        marked = zip(found["assistant_masks"], found["offset_mapping"], strict=True)
        return _joined([tuple(offsets) for is_target, offsets in marked if is_target])

    def _apply(self, messages: Sequence[ChatMessage], tools: Tools, **options: Any) -> Any:
        try:
            with WATCH.limited():
                return self.tokenizer.apply_chat_template(
                    [self._variables(message) for message in messages],
                    tools=list(tools) or None,
                    chat_template=self.source,
                    **{"date_string": LLAMA_DATE, **self.variables},
                    **options,
                )
        except RenderTooSlow:
            raise DataError(
                f"data.template={self.name}: one conversation is not rendered within "
                f"{WATCH.limit_s:g} s of CPU time. Look for nested loops and for macros that call "
                "themselves, or use data.template=instruction"
            ) from None
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"data.template={self.name}: line {error.lineno}: {error}") from None
        # The sandbox raises OverflowError for a long range. A macro can call itself without an end.
        except (
            *(jinja2.TemplateError, TypeError, ValueError, OverflowError, RecursionError),
            *(MemoryError, KeyError, AttributeError),
        ) as error:
            reason = first_line(error)
            raise UnusableRow(f"the template {self.name} rejects the row: {reason}") from None

    def _variables(self, message: ChatMessage) -> dict[str, Any]:
        variables = {"role": message.role, "content": turn_text(message), **message.extra}
        if reasoning := message.extra.get("reasoning_content"):
            variables |= dict.fromkeys(REASONING, reasoning)  # each template knows one of the names
        # Only a user's file gets the Alpaca columns: chat templates are written for role and content.
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
    """Return why a value of data.template is invalid, or None. Needs no tokenizer."""
    path = Path(name).expanduser()
    if name in NAMES or path.is_file():
        return None
    if problem := irregular(path):
        return f"data.template={problem}"
    return f"data.template={name}: not one of {', '.join(NAMES)}, and no such file"


def choose_template(
    name: str,
    format_name: str,
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] | None = None,
) -> PromptTemplate:
    """Return the template for the examples of a format.

    Args:
        name: Value of data.template. `auto` selects the tokenizer's chat template for conversations (if
            the tokenizer has one), `plain` for prompt_completion and text, and `instruction` otherwise.
        format_name: Key of row_formats.FORMATS.
        tokenizer: Tokenizer of the base model.
        variables: Further variables of a Jinja template (data.chat_template_kwargs).

    Raises:
        DataError: There is no such template, or the template cannot render the format.
    """
    if name == "auto":
        name = _automatic(format_name, tokenizer)
    if format_name in TEXT_FORMATS and name != "plain":
        raise DataError(
            f"data.template={name} renders questions and answers, and data.format={format_name} has "
            "none. Use data.template=auto or plain."
        )
    given = variables or {}
    if given and name in ("instruction", "instruction_input", "plain"):
        raise DataError(
            f"data.chat_template_kwargs: the template {name} has no variables. Use data.template=chat "
            "or a Jinja file, or remove data.chat_template_kwargs"
        )
    eos = tokenizer.eos_token or ""
    if name in ("instruction", "instruction_input"):
        return InstructionTemplate(eos, always_input=name == "instruction_input")
    if name == "plain":
        return PlainTemplate(eos)
    if name == "chat":
        return JinjaTemplate("chat", _chat_template(tokenizer), tokenizer, True, given)
    if problem := template_problem(name):
        raise DataError(problem)
    try:
        # Without the mark of editors
        source = Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.template={name}: {error}") from None
    return JinjaTemplate(name, source, tokenizer, False, given)


def _automatic(format_name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if format_name in VERBATIM:
        return "plain"
    if FORMATS[format_name].conversational and tokenizer.chat_template is not None:
        return "chat"
    # Alpaca-like formats get Alpaca's template even on a chat model, because published results that
    # fine-tune on Alpaca use it.
    return "instruction"


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise DataError(
            "data.template=chat: the model's tokenizer has no chat template (base models often have "
            "none). Use data.template=instruction, a Jinja file (data.template=FILE), or the instruct "
            "version of the model."
        ) from None


def render(example: Example, template: PromptTemplate, train_on: TrainOn) -> list[RenderedText]:
    """Render an example as one text, or as one text per answer if the template rewrites earlier turns.

    Args:
        example: Conversation to render.
        template: Template of the example's format.
        train_on: Turns that carry loss: all answers, the last answer, or everything.

    Raises:
        UnusableRow: The template rejects the conversation, or renders an answer that does not begin with
            the template's own generation prompt.
    """
    messages, tools = example.messages, example.tools
    text = template.text(messages, tools=tools)
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if train_on == "everything":
        return [RenderedText(text, _everything(text, example, answers, template))]
    turns = [index for index in answers if messages[index].trained]
    if train_on == "last_completion":
        turns = turns[-1:]
    if spans := _spans(text, messages, turns, template, tools):
        return [RenderedText(text, tuple(spans))]
    # Some chat templates change earlier answers when more turns follow (Qwen3 strips their thinking,
    # Mistral moves the system prompt). Each answer then gets a text of its own, as in generation.
    parts = [messages[: turn + 1] for turn in turns]
    return [render_last(part, template, tools) for part in parts]


def _everything(
    text: str, example: Example, answers: Sequence[int], template: PromptTemplate
) -> tuple[Span, ...]:
    """Return the spans of a text without the answers that carry no loss."""
    untrained = [index for index in answers if not example.messages[index].trained]
    left_out = _spans(text, example.messages, untrained, template, example.tools)
    if left_out is None:
        raise UnusableRow(
            f"the template {template.name} rewrites earlier turns, so that those without loss cannot "
            "be located. Use data.train_on=completions"
        )
    starts = [0, *(end for _, end in left_out)]
    ends = [*(start for start, _ in left_out), len(text)]
    return tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end)


def render_last(
    messages: Sequence[ChatMessage], template: PromptTemplate, tools: Tools = ()
) -> RenderedText:
    """Render a conversation that ends with an answer, with the span of this answer.

    Raises:
        UnusableRow: The same cases as in `render`.
    """
    text = template.text(messages, tools=tools)
    spans = _spans(text, messages, [len(messages) - 1], template, tools)
    if not spans:
        raise UnusableRow(
            f"the template {template.name} renders a generation prompt that its answers do not begin "
            "with, and has no {% generation %} marks. Use data.template=instruction or a Jinja file"
        )
    return RenderedText(text, tuple(spans))


def _spans(
    text: str,
    messages: Sequence[ChatMessage],
    turns: Sequence[int],
    template: PromptTemplate,
    tools: Tools,
) -> list[Span] | None:
    """Return the spans of the answers at `turns`, or None if they cannot be located in the text."""
    spans = []
    for turn in turns:
        prompt = template.text(messages[:turn], add_generation_prompt=True, tools=tools)
        last = turn == len(messages) - 1
        answered = text if last else template.text(messages[: turn + 1], tools=tools)
        if not (text.startswith(answered) and answered.startswith(prompt)):
            return _marked(messages, turns, template, tools)
        spans.append((len(prompt), len(answered)))
    return spans


def _marked(
    messages: Sequence[ChatMessage],
    turns: Sequence[int],
    template: PromptTemplate,
    tools: Tools,
) -> list[Span] | None:
    # Only with one mark per answer is it known which mark belongs to which answer.
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    marked = template.marked(messages, tools)
    if len(marked) != len(answers):
        return None
    return [span for index, span in zip(answers, marked, strict=True) if index in turns]
