"""Keep secrets out of whatever is written down, shown or sent.

A secret is a password inside a URL, or the value of an environment variable whose name says so. Secrets
are given by reference (`${oc.env:NAME}`), so what is written down names the variable; this is for the
texts of others: error messages, tracebacks, what a worker printed.
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
SECRET_NAMES = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_KEY|ACCESS_KEY|CREDENTIALS)")
NO_SECRETS = re.compile(r"(_PATH|_FILE|_DIR|_NAME|PARALLELISM)$")
"""Variables whose names sound secret and whose values are not (TOKENIZERS_PARALLELISM=false)."""
MIN_LENGTH = 6
"""Shorter values are words of any text."""
URL_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/:@'\"]*):([^\s/@'\"]+)@", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with every known secret replaced by ***."""
    for value in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return URL_PASSWORD.sub(rf"\1:{HIDDEN}@", text)


def holds_password(text: str) -> bool:
    """Whether a URL in the text carries a password, other than by reference."""
    return any("${" not in match[2] for match in URL_PASSWORD.finditer(text))


def _secrets() -> set[str]:
    return {
        value
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name.upper())
        and not NO_SECRETS.search(name.upper())
        and len(value) >= MIN_LENGTH
    }
