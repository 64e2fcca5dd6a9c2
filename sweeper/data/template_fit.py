"""Fit examples to what a template can print: system turns, tools, end tokens and control tokens.

What a template can do is found by rendering short conversations with it. Every change of an example is
named, so that it can be counted. Does not know files or length limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from sweeper.data.examples import ChatMessage, Example
from sweeper.data.row_formats import BOOK, TEXT_FORMATS
from sweeper.data.templates import VERBATIM, PromptTemplate, RenderedText
from sweeper.data.tokens import LITERAL_MARK, TokenizerSetup
from sweeper.data.turns import HANDED_OVER, UnusableRow

PROBE = "probe_text"
"""Text whose presence in a rendering shows that the template prints it."""
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Probe.",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "Probe."}},
            "required": ["probe_key"],
        },
    },
}
CALL_ID = "callprobe"  # Mistral's templates require nine letters and digits
IN_ANSWERS = re.compile(r"</?(think|tool_call|tool_response)>|\[/?THINK\]")
"""Tokens that answers contain on purpose."""
PRINTED_KEYS = ("reasoning_content", *(key for key in HANDED_OVER if key != "tool_call_id"))


@dataclass(frozen=True)
class CallStyle:
    """The form in which a template takes the tool calls of an assistant turn.

    Attributes:
        as_object: True if `arguments` is an object, False if it is JSON text.
        null_content: True if `content` is null in a turn that holds only calls.
    """

    as_object: bool
    null_content: bool

    def message(self, message: ChatMessage) -> ChatMessage:
        """Return a turn with its tool calls in this form."""
        calls = [self._call(call) for call in message.extra["tool_calls"]]
        extra = {**message.extra, "tool_calls": calls}
        if self.null_content and not message.content:
            extra["content"] = None
        return replace(message, extra=extra)

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        if not self.as_object:
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": function}


@dataclass(frozen=True)
class TemplateFit:
    """A template with what it can print, as found by probes.

    Attributes:
        template: Template of the examples' format.
        format: Format of the examples, a key of row_formats.FORMATS.
        setup: Tokenizer, whose control tokens are recognised in texts.
        control_tokens: Value of data.control_tokens.
    """

    template: PromptTemplate
    format: str
    setup: TokenizerSetup
    control_tokens: str = "auto"

    @cached_property
    def prints_system(self) -> bool:
        """True if the template takes a system turn and prints its text."""
        turns = (ChatMessage("system", PROBE), ChatMessage("user", "a"))
        return PROBE in self._printed(turns)

    @cached_property
    def prints_tools(self) -> bool:
        """True if the template prints the functions that a row offers."""
        return "probe_tool" in self._printed((ChatMessage("user", "a"),), (PROBE_TOOL,))

    @cached_property
    def call_style(self) -> CallStyle | None:
        """The form of tool calls that the template prints, or None if it prints none."""
        for as_object, null_content in product((True, False), (True, False)):
            style = CallStyle(as_object, null_content)
            if self._prints_calls(style):
                return style
        return None

    @cached_property
    def answer_ends(self) -> tuple[str, ...]:
        """Texts that end an answer: the end-of-text token and the template's end of a turn."""
        ends = {self.setup.tokenizer.eos_token}
        printed = self._printed((ChatMessage("user", "a"), ChatMessage("assistant", PROBE)))
        behind = printed.rpartition(PROBE)[2].strip()
        ends.update(token for token in self.setup.special if behind == token)
        return tuple(end for end in ends if end)

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Pattern of every control token of the tokenizer."""
        names = sorted(filter(None, self.setup.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @property
    def as_text(self) -> bool:
        """True if control tokens inside the users' texts are encoded as text."""
        # Texts that no template wraps are often already rendered, so their tokens are meant.
        if self.control_tokens == "auto":
            return self.format not in VERBATIM
        return self.control_tokens == "text"

    def fitted(self, example: Example) -> tuple[Example, set[str]]:
        """Return an example as the template can print it, and what was changed.

        Raises:
            UnusableRow: The template does not print the tools or the tool calls of the example.
        """
        changes: set[str] = set()
        turns = [self._without_end(turn, changes) for turn in example.messages]
        turns = self._folded(turns, changes)
        turns = [self._with_calls(turn) for turn in turns]
        if example.tools and not self.prints_tools:
            raise UnusableRow(
                f"the template {self.template.name} does not print the tools of the row. Use a "
                "template that does, or 'data.ignore_columns=[tools]'"
            )
        turns = [self._with_marks(turn, changes) for turn in turns]
        if not changes and turns == list(example.messages):
            return example, changes
        return replace(example, messages=tuple(turns)), changes

    def unprinted(self, example: Example, rendered: Iterable[RenderedText]) -> set[str]:
        """Return what the template printed nothing of, in words."""
        keys = [key for key in PRINTED_KEYS if any(key in turn.extra for turn in example.messages)]
        if not keys:
            return set()
        text = "\n".join(each.text for each in rendered)
        return {
            f"{key} of a turn not printed by the template {self.template.name}"
            for key in keys
            for turn in example.messages
            if str(turn.extra.get(key, "")).strip() not in text
        }

    def _printed(
        self, turns: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        try:
            return self.template.text(turns, tools=tools)
        except UnusableRow:
            return ""

    def _prints_calls(self, style: CallStyle) -> bool:
        function = {"name": "probe_tool", "arguments": {"probe_key": PROBE}}
        call = {"id": CALL_ID, "type": "function", "function": function}
        turns = (
            ChatMessage("user", "a"),
            style.message(ChatMessage("assistant", "", extra={"tool_calls": [call]})),
            ChatMessage("tool", "b", extra={"tool_call_id": CALL_ID, "name": "probe_tool"}),
            ChatMessage("assistant", "c"),
        )
        text = self._printed(turns, (PROBE_TOOL,) if self.prints_tools else ())
        # Of a wrong type Python's notation of an object, or quoted JSON, would be printed.
        wrong = ("{'probe_key'", '\\"probe_key', "None")
        return PROBE in text and not any(part in text for part in wrong)

    def _without_end(self, turn: ChatMessage, changes: set[str]) -> ChatMessage:
        if turn.role != "assistant" or self.format == BOOK:
            return turn
        content = turn.content
        while content.rstrip().endswith(self.answer_ends) and self.answer_ends:
            end = next(end for end in self.answer_ends if content.rstrip().endswith(end))
            content = content.rstrip().removesuffix(end)
        if content == turn.content or not content.strip():
            return turn
        changes.add("an end token that the answer already has, not repeated")
        return replace(turn, content=content)

    def _folded(self, turns: list[ChatMessage], changes: set[str]) -> list[ChatMessage]:
        if turns[0].role != "system" or len(turns) < 2 or self.prints_system:
            return turns
        system, first, *others = turns
        changes.add(f"system turn folded into the first user turn (template {self.template.name})")
        return [replace(first, content=f"{system.content}\n\n{first.content}"), *others]

    def _with_calls(self, turn: ChatMessage) -> ChatMessage:
        if turn.role != "tool" and "tool_calls" not in turn.extra:
            return turn
        if self.call_style is None:
            raise UnusableRow(f"the template {self.template.name} does not print tool calls")
        return self.call_style.message(turn) if "tool_calls" in turn.extra else turn

    def _with_marks(self, turn: ChatMessage, changes: set[str]) -> ChatMessage:
        """Mark the control tokens of a turn's own texts, so that they are encoded as text."""
        found = [self._marked(text, turn) for text in (turn.content, turn.input)]
        extra = self._marked_value(turn.extra, turn)
        if found == [turn.content, turn.input] and extra == turn.extra:
            return turn
        if not self.as_text:
            changes.add("control tokens in the text, kept as tokens")
            return turn
        changes.add("control tokens in the text, encoded as text")
        return replace(turn, content=found[0], input=found[1], extra=extra)

    def _marked_value(self, value: Any, turn: ChatMessage) -> Any:
        if isinstance(value, str):
            return self._marked(value, turn)
        if isinstance(value, Mapping):
            return {key: self._marked_value(item, turn) for key, item in value.items()}
        return (
            [self._marked_value(item, turn) for item in value] if isinstance(value, list) else value
        )

    def _marked(self, text: str, turn: ChatMessage) -> str:
        def mark(found: re.Match[str]) -> str:
            token = found[0]
            meant = turn.role == "assistant" and IN_ANSWERS.fullmatch(token)
            return token if meant else token[:1] + LITERAL_MARK + token[1:]

        return self.control_pattern.sub(mark, text)


def is_text(example: Example) -> bool:
    """Return True if an example has no prompt: a text that is trained as a whole."""
    return example.format in TEXT_FORMATS
