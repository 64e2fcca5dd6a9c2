"""Remove secrets from texts before they are stored, shown or sent.

A secret is a password in a URL, or the value of an environment variable whose name indicates a secret.
Configurations hold secrets only by reference (`${oc.env:NAME}`) and need no redaction. This module is
for texts of other programs: error messages, tracebacks, and output of workers.
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
SECRET_NAMES = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_KEY|ACCESS_KEY|CREDENTIALS)")
NO_SECRETS = re.compile(r"(_PATH|_FILE|_DIR|_NAME|PARALLELISM)$")
"""Variables that are not secret although their names match (TOKENIZERS_PARALLELISM=false)."""
MIN_LENGTH = 6
"""Minimum length of a secret. Shorter values occur as ordinary words in any text."""
# Addresses of PostgreSQL and MLflow may contain a password, and occur in their error messages.
URL_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/:@'\"]*):([^\s/@'\"]+)@", re.IGNORECASE)


def redact(text: str) -> str:
    """Return the text with every known secret replaced by ***."""
    # Long values first: a secret may be part of a longer one.
    for value in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return URL_PASSWORD.sub(rf"\1:{HIDDEN}@", text)


def holds_password(text: str) -> bool:
    """Return True if a URL in the text contains a password that is not a reference."""
    return any("${" not in match[2] for match in URL_PASSWORD.finditer(text))


def _secrets() -> set[str]:
    return {
        value
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name.upper())
        and not NO_SECRETS.search(name.upper())
        and len(value) >= MIN_LENGTH
    }
