"""Write a chat template in the language of Ollama's Modelfile.

The texts around the turns are found by rendering conversations with the template. The result is checked:
conversations rendered with these texts must equal those of the template. Does not know models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Turns = Sequence[tuple[str, str]]
"""Role and content of each turn."""
RenderTurns = Callable[[Turns], str]
"""Return a conversation as text with the generation prompt. ValueError if the template refuses it."""
ASKED: Turns = (("user", "\ue000"),)
TALK: Turns = (("user", "\ue000"), ("assistant", "\ue001"), ("user", "\ue002"))
RULED: Turns = (("system", "\ue003"), *TALK)
"""Conversations whose contents are single characters of no other use."""
UNWRITABLE = ("{{", "}}", '"""')
"""Texts that mean something in a Modelfile."""


@dataclass(frozen=True)
class TurnTexts:
    """The texts that a chat template prints around each turn.

    Attributes:
        opening: Text before a conversation without a system turn.
        system: Text before and after a system turn, or None if the template prints none.
        user: Text before a user turn.
        answer: Text between a user turn and its answer: the generation prompt.
        end: Text after an answer.
    """

    opening: str
    system: tuple[str, str] | None
    user: str
    answer: str
    end: str

    def render(self, turns: Turns) -> str:
        """Return a conversation as text with the generation prompt, as Ollama renders it."""
        before, after = self.system or ("", "")
        parts = [] if turns[0][0] == "system" else [self.opening]
        for role, content in turns:
            parts += {
                "system": [before, content, after],
                "user": [self.user, content, self.answer],
                "assistant": [content, self.end],
            }[role]
        return "".join(parts)

    @property
    def go(self) -> str:
        """The template in Go's language, which Ollama uses."""
        opening = f"{{{{ if not .System }}}}{self.opening}{{{{ end }}}}" if self.opening else ""
        before, after = self.system or ("", "")
        return (
            f"{opening}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "system" }}}}{before}{{{{ .Content }}}}{after}'
            f'{{{{ else if eq .Role "user" }}}}{self.user}{{{{ .Content }}}}{self.answer}'
            f"{{{{ else }}}}{{{{ .Content }}}}{self.end}{{{{ end }}}}{{{{ end }}}}"
        )


def turn_texts(render: RenderTurns) -> TurnTexts | None:
    """Return the texts around the turns, or None if a template is not made of such texts."""
    try:
        alone, talk = render(ASKED), render(TALK)
        ruled = _rendered(render, RULED)
        first, answer = alone.split("\ue000")
        between = talk.split("\ue001")[1].split("\ue002")[0]
        system = None if ruled is None else _around_system(ruled)
    except (ValueError, IndexError):
        return None
    heads = [first, between] if system is None else [first, between, system[1]]
    # What all user turns begin with alike belongs to the turn,
    # and the rest is printed once before the first.
    user = _common_end(heads)
    found = TurnTexts(
        first.removesuffix(user),
        None if system is None else (system[0], system[1].removesuffix(user)),
        user,
        answer,
        between.removesuffix(user),
    )
    known = [(ASKED, alone), (TALK, talk), *([] if ruled is None else [(RULED, ruled)])]
    writable = not any(mark in text for mark in UNWRITABLE for text in (first, answer, between))
    return found if writable and all(found.render(t) == text for t, text in known) else None


def _rendered(render: RenderTurns, turns: Turns) -> str | None:
    """Return a conversation with a system turn, or None if the template prints none."""
    try:
        text = render(turns)
    except ValueError:
        return None
    return text if "\ue003" in text else None


def _around_system(text: str) -> tuple[str, str]:
    before, rest = text.split("\ue003")
    return before, rest.split("\ue000")[0]


def _common_end(texts: Sequence[str]) -> str:
    shortest = min(texts, key=len)
    starts = range(len(shortest) + 1)
    common = (shortest[start:] for start in starts)
    return next(end for end in common if all(text.endswith(end) for text in texts))
