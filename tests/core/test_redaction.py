"""What is hidden, and what is left alone."""

from __future__ import annotations

import pytest

from sweeper.core.redaction import holds_password, redact


def test_passwords_in_urls_are_hidden() -> None:
    """Scheme, user, host and path stay, so that a person still knows which server it was."""
    text = "away: postgresql+psycopg://me:pa55%40word@db:5432/optuna, http://a:b@h/"
    assert redact(text) == "away: postgresql+psycopg://me:***@db:5432/optuna, http://a:***@h/"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://tok3n@h/x", "https://***@h/x"),
        ("postgresql://me:pa/ss@h/d", "postgresql://me:***@h/d"),
        ("https://h/x?a=1&token=tok3n&b=2", "https://h/x?a=1&token=***&b=2"),
        ("https://h/x?X-Amz-Signature=abc", "https://h/x?X-Amz-Signature=***"),
        ("https://h/x?max_tokens=5", "https://h/x?max_tokens=5"),
    ],
)
def test_tokens_in_urls_are_hidden(text: str, hidden: str) -> None:
    """As a user, as a password with a slash, and in a query."""
    assert redact(text) == hidden


@pytest.mark.parametrize("name", ["HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"])
def test_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Wherever they stand in a text."""
    monkeypatch.setenv(name, "hf_abcdef123456")
    assert redact("refused: <hf_abcdef123456>") == "refused: <***>"


def test_ordinary_text_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No false alarms: ports, times, references, and variables that only sound secret."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/.ray/auth_token")
    monkeypatch.setenv("SHORT_SECRET", "a")
    text = "false at 12:30, http://127.0.0.1:5000/a@b, /home/me/.ray/auth_token, a"
    assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("hydra.sweeper.storage=postgresql://me:secret@h/d", True),
        ("hydra.sweeper.storage=${oc.env:SWEEPER_STORAGE}", False),
        ("hydra.sweeper.storage='postgresql://me:${oc.env:PW}@h/d'", False),
        ("tracking.uri=http://127.0.0.1:5000", False),
        ("data.train=a:b@c", False),
        ("hydra.sweeper.storage=postgresql://me:pa/ss@h/d", True),
        ("hydra.sweeper.storage=postgresql://me:pa@/ss@h/d", True),
        ("tracking.uri=https://tok3n@h/d", True),
        ("tracking.uri=https://${oc.env:TOKEN}@h/d", False),
        ("data.train=https://h:8080/files@v2/rows.jsonl", False),
        ("hydra.sweeper.storage=postgresql://me@h/d", False),
    ],
)
def test_a_literal_password_is_told_from_a_reference(text: str, holds: bool) -> None:
    """Only a password that is there in full counts."""
    assert holds_password(text) is holds
