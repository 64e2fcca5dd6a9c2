"""Notifications through apprise. A failure never ends the night."""

from __future__ import annotations

import logging
from collections.abc import Sequence


def notify(urls: Sequence[str | None], title: str, text: str) -> list[str]:
    """Send the digest to every URL.

    Returns:
        One message per failure, without the URL, which may hold a secret.
    """
    wanted = [url for url in urls if url]
    if not wanted:
        return []
    try:
        import apprise  # an extra: sweeper[nightly]
    except ImportError:
        return [
            "no notification sent: apprise is not installed. Run: pip install 'sweeper[nightly]'"
        ]
    # apprise's own log lines may contain the URL.
    logging.getLogger("apprise").setLevel(logging.CRITICAL)
    return [
        problem
        for index, url in enumerate(wanted)
        if (problem := _send(apprise, url, title, text, f"notify[{index}]"))
    ]


def _send(apprise: object, url: str, title: str, text: str, name: str) -> str | None:
    try:
        sender = apprise.Apprise()  # type: ignore[attr-defined]
        if not sender.add(url):
            return f"{name}: apprise does not support this URL"
        sent = sender.notify(title=title, body=text, body_format="markdown")
    except Exception as error:  # noqa: BLE001 - a third-party plug-in, over a network
        return f"{name}: not sent ({type(error).__name__})"
    return None if sent else f"{name}: not sent"
