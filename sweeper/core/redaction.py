"""Remove secrets from texts before they are stored, shown or sent.

A secret is a password in a URL, or the value of an environment variable whose name indicates a secret.
What a configuration holds by reference (`${oc.env:NAME}`) is written as the reference
(sweeper.core.references). The rest is for texts of other programs: error messages, tracebacks, and
output of workers.
"""

from __future__ import annotations

import os
import re

from sweeper.core.references import referenced

HIDDEN = "***"
SECRET_NAMES = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_KEY|ACCESS_KEY|CREDENTIALS)")
NO_SECRETS = re.compile(r"(_PATH|_FILE|_DIR|_NAME|PARALLELISM)$")
"""Variables that are not secret although their names match (TOKENIZERS_PARALLELISM=false)."""
MIN_LENGTH = 6
"""Minimum length of a secret. Shorter values occur as ordinary words in any text."""
# Addresses of PostgreSQL and MLflow may contain a password, and occur in their error messages.
# A password may contain a slash, but what begins with a port and a slash is a path.
URL_PASSWORD = re.compile(
    r"(\b[a-z][a-z0-9+.-]*://[^\s/:@'\"]*):(?!\d+/)([^\s@'\"]+)@", re.IGNORECASE
)
# Without a password, a user of a web server is a token.
URL_TOKEN = re.compile(r"(\bhttps?://)([^\s/:@'\"]+)@", re.IGNORECASE)
URL_QUERY = re.compile(
    r"([?&](?:[\w-]*(?:token|api_?key|access_?key|secret|passw(?:or)?d|signature|credential)|sig)=)"
    r"(?!\$\{)([^\s&'\"]+)",
    re.IGNORECASE,
)
_REFERENCE = re.compile(r"\$\{[^{}]*\}")


def redact(text: str) -> str:
    """Return the text with every known secret replaced by ***."""
    text = referenced(text)
    # Long values first: a secret may be part of a longer one.
    for value in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = URL_PASSWORD.sub(rf"\1:{HIDDEN}@", text)
    text = URL_TOKEN.sub(rf"\1{HIDDEN}@", text)
    return URL_QUERY.sub(rf"\1{HIDDEN}", text)


def holds_password(text: str) -> bool:
    """Return True if a URL in the text contains a password that is not a reference."""
    without = _REFERENCE.sub(HIDDEN, text)
    found = (match for rule in (URL_PASSWORD, URL_TOKEN) for match in rule.finditer(without))
    return any(match[2] != HIDDEN for match in found)


def _secrets() -> set[str]:
    return {
        value
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name.upper())
        and not NO_SECRETS.search(name.upper())
        and len(value) >= MIN_LENGTH
    }
