"""Renew the pictures of a terminal in docs/images: `sweeper data` on three files, and a forecast.

    python docs/terminal_pictures.py          (or: make pictures)

Runs the commands on small files in a terminal of 100 columns, and writes what they print as SVG.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parent / "images"
COLUMNS = 100
LINES = 48
"""Lines of a picture. What follows repeats the kind of what is shown."""
SECONDS = 300
COMMANDS = {
    "data_chat": ("data", "data.train=chat.jsonl"),
    "data_table": ("data", "data.train=answers.csv"),
    "data_texts": ("data", "data.train=texts"),
    "forecast": ("+experiment=lr_rank_sweep", "dry_run=true", "-m"),
}
TOPICS = (
    "lists",
    "tuples",
    "sets",
    "dicts",
    "strings",
    "bytes",
    "files",
    "loops",
    "classes",
    "errors",
)


def main() -> None:
    """Write the files, run the commands and store their pictures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        for picture, arguments in COMMANDS.items():
            shown = f"python -m sweeper {' '.join(arguments)}"
            target = IMAGES / f"{picture}.svg"
            target.write_text(as_svg(run(arguments, folder), shown), encoding="utf-8")
            print(f"{target}  {target.stat().st_size / 1000:.0f} kB")


def write_files(folder: Path) -> None:
    """Write a chat with a turn that must not be learned, a table with gaps, and a folder of texts."""
    chat = folder / "chat.jsonl"
    chat.write_text("".join(json.dumps(row) + "\n" for row in chat_rows()), encoding="utf-8")
    lines = ["id;question;answer;author"]
    for number, topic in enumerate(TOPICS * 30):
        answer = "" if number == 7 else f"Read the chapter about {topic}, part {number % 7}."
        lines.append(f"{number};How do I use {topic} in case {number // 2}?;{answer};ada")
    (folder / "answers.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = folder / "texts"
    texts.mkdir()
    (texts / "README.md").write_text("# Where these texts are from\n", encoding="utf-8")
    for number, topic in enumerate(TOPICS):
        sentences = (f"Part {part} of {topic} says when to use {topic}." for part in range(60))
        (texts / f"{number}_{topic}.txt").write_text(" ".join(sentences), encoding="utf-8")


def chat_rows() -> Iterator[dict[str, object]]:
    """Yield conversations, of which every fifth has an answer of weight 0."""
    for number, topic in enumerate(TOPICS * 5):
        turns = [
            {"role": "user", "content": f"What are {topic} good for? ({number})"},
            {"role": "assistant", "content": f"{topic.capitalize()} keep things together."},
            {"role": "user", "content": "Shorter."},
            {"role": "assistant", "content": f"Order, number {number}."},
        ]
        if number % 5 == 0:
            turns[1]["weight"] = 0  # type: ignore[assignment]
        yield {"messages": turns, "score": number / 50}


def run(arguments: Sequence[str], folder: Path) -> str:
    """Return what the command prints into a terminal, with its colours.

    Raises:
        CalledProcessError: The command failed.
    """
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeper", *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    printed = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux reports the end of a pseudo-terminal as an error
            break
        if not part:
            break
        printed += part
    os.close(ours)
    if process.wait(SECONDS):
        raise subprocess.CalledProcessError(process.returncode, process.args, printed)
    return printed.decode("utf-8").replace("\r\n", "\n")


def as_svg(printed: str, title: str) -> str:
    """Return the first lines of what a terminal showed as SVG."""
    lines = printed.splitlines()
    shown = lines if len(lines) <= LINES else [*lines[: LINES - 1], "…"]
    console = Console(record=True, width=COLUMNS, file=StringIO())
    console.print(Text.from_ansi("\n".join(shown)))
    return console.export_svg(title=title)


if __name__ == "__main__":
    main()
