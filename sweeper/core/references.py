"""Values that a configuration takes from environment variables, and are written as the references.

A setting `${oc.env:NAME}` is resolved when it is used. In everything that is stored, shown or sent, the
value is replaced by the reference, because the user has kept it out of the configuration on purpose.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import quote

MIN_LENGTH = 6
"""Minimum length of a value that is replaced. Shorter ones occur as ordinary words in any text."""
PUBLIC = frozenset(
    {"HOME", "USER", "LOGNAME", "PWD", "OLDPWD", "HOSTNAME", "TMPDIR", "SHELL", "LANG"}
    # the packaged configuration's own references: an address has to be read by people and programs
    | {"MLFLOW_TRACKING_URI"}
)
"""Variables whose values are written out."""
_REFERENCE = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)\}")

_VALUES: dict[str, str] = {}
"""Values in use, by the name of their variable."""
_LEFT_OUT: set[str] = set()
_FORMS: list[tuple[str, str]] = []
"""Every spelling of every value with its reference, the longest spelling first."""


_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: repr(text)[1:-1],
    lambda text: text.replace("'", "''"),
    html.escape,
    lambda text: html.escape(text, quote=False),
    # the page's templates escape quotes as numbers
    lambda text: html.escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
    lambda text: quote(text, safe=""),
    quote,
)


def remember(values: Mapping[str, str]) -> None:
    """Add variables that the configuration refers to, with their values."""
    new = {name: value for name, value in values.items() if _VALUES.get(name) != value}
    if new:
        _VALUES.update(new)
        _spell()


def leave_out(names: Collection[str]) -> None:
    """Write the values of these variables out from now on, and of no others but PUBLIC.

    The folder of all output is one of them: its path is needed as it is.
    """
    if set(names) != _LEFT_OUT:
        _LEFT_OUT.clear()
        _LEFT_OUT.update(names)
        _spell()


def remembered() -> dict[str, str]:
    """Return the variables in use with their values, for a process that writes as well."""
    return {name: value for name, value in _VALUES.items() if name not in PUBLIC | _LEFT_OUT}


def referenced(text: str) -> str:
    """Return a text with every such value replaced by its reference."""
    for form, reference in _FORMS:
        text = text.replace(form, reference)
    return text


def referenced_tree(value: Any) -> Any:
    """Return a JSON-like value with the replacement in all of its texts."""
    if not _FORMS:
        return value
    if isinstance(value, str):
        return referenced(value)
    if isinstance(value, Mapping):
        return {referenced_tree(key): referenced_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [referenced_tree(item) for item in value]
    return value


def resolved(text: str) -> str:
    """Return a stored text with its references replaced by the values of this process's variables."""
    known = {**os.environ, **_VALUES}
    return _REFERENCE.sub(lambda found: known.get(found[1], found[0]), text)


def names_in(text: str) -> set[str]:
    """Return the names of the variables that an unresolved setting refers to."""
    return set(re.findall(r"oc\.env:\s*([A-Za-z_]\w*)", text))


def _spell() -> None:
    forms = {
        form: f"${{oc.env:{name}}}"
        for name, text in _VALUES.items()
        if name not in PUBLIC | _LEFT_OUT and len(text) >= MIN_LENGTH
        for form in _forms(text)
    }
    # Long forms first: a short one may be part of a longer one.
    _FORMS[:] = sorted(forms.items(), key=lambda item: -len(item[0]))


def _forms(value: str) -> set[str]:
    """Return the spellings of a value in plain text, JSON, YAML, Python, HTML and URLs."""
    plain = {value, *(line for line in value.splitlines() if len(line) >= MIN_LENGTH)}
    once = {spell(text) for text in plain for spell in _SPELLINGS}
    # twice, because a list that is shown on a page is spelled for Python, and then for HTML
    return plain | once | {spell(text) for text in once for spell in _SPELLINGS}
