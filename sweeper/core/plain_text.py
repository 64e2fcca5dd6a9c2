"""The one way out for texts of others: rows, answers, names and messages of other programs.

For a terminal, control characters become visible. For Markdown, nothing of a text is markup. HTML is
escaped by the page's templates.
"""

from __future__ import annotations

import re

SHOWN = "�"
"""The character that stands for a control character."""
# C0 without tab and line feed, DEL, C1, and the marks that reverse the order of what follows.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")

_SHOWN_MARKS = {
    "\\": "\\\\",
    "`": "\\`",
    "<": "&lt;",
    "|": "\\|",
    "](": "]\\(",
    "![": "!\\[",
}
_MARKS = re.compile("|".join(map(re.escape, _SHOWN_MARKS)))


def visible(text: str) -> str:
    """Return a text without characters that steer a terminal. Line breaks and tabs stay."""
    return _CONTROL.sub(SHOWN, text.replace("\r\n", "\n"))


def in_markdown(text: str) -> str:
    """Return a text on one line in which Markdown finds no link, picture, code, HTML or cell."""
    text = visible(" ".join(text.split()))
    return _MARKS.sub(lambda mark: _SHOWN_MARKS[mark[0]], text)


def in_code(text: str) -> str:
    """Return a text on one line as a code span."""
    # a backtick would end the span, and cannot be escaped inside
    return f"`{visible(' '.join(text.split())).replace('`', chr(39))}`"
