"""Qualitative prompts: proven absent from the training split, and answered side by side."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from sweeper.config.settings import QualitativePrompt
from sweeper.core.errors import DataError


@dataclass(frozen=True)
class SampleAnswer:
    """One qualitative prompt with the answers of the untuned and the tuned model."""

    category: str
    prompt: str
    base: str
    tuned: str


def pair(
    prompts: Sequence[QualitativePrompt], base: Sequence[str], tuned: Sequence[str]
) -> list[SampleAnswer]:
    """Prompts with both models' answers, in the order of prompts."""
    rows = zip(prompts, base, tuned, strict=True)
    return [SampleAnswer(asked.category, asked.prompt, *answers) for asked, *answers in rows]


def seen_in_training(
    prompts: Sequence[QualitativePrompt], training: Iterable[str]
) -> list[QualitativePrompt]:
    """The prompts whose text occurs in a training text, alone or inside a template.

    Compared after Unicode normalisation, in lower case, with white space as single blanks.
    """
    unseen = {asked.prompt: normalised(asked.prompt) for asked in prompts}
    for text in training:
        given = normalised(text)
        unseen = {prompt: words for prompt, words in unseen.items() if words not in given}
        if not unseen:
            break
    return [asked for asked in prompts if asked.prompt not in unseen]


def require_unseen(prompts: Sequence[QualitativePrompt], training: Iterable[str]) -> None:
    """Prove that no qualitative prompt was trained on.

    Raises:
        DataError: names those that were.
    """
    seen = seen_in_training(prompts, training)
    if seen:
        listed = "; ".join(f"{asked.category}: {asked.prompt!r}" for asked in seen)
        raise DataError(
            f"evaluation.prompts: {len(seen)} of {len(prompts)} occur in the training split, so "
            f"their answers prove nothing ({listed}); change them or remove their training rows"
        )


def normalised(text: str) -> str:
    """Text as the comparison sees it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def as_json(samples: Sequence[SampleAnswer]) -> list[dict[str, str]]:
    """For machines: a list of objects with category, prompt, base and tuned."""
    return [asdict(sample) for sample in samples]


def as_markdown(samples: Sequence[SampleAnswer]) -> str:
    """For people: one row per prompt."""
    lines = ["| category | prompt | base | tuned |", "|---|---|---|---|"]
    for sample in samples:
        cells = (sample.category, sample.prompt, sample.base, sample.tuned)
        lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Model output is shown as it is: neither a pipe, a line break nor HTML may break the table."""
    for mark, shown in (("&", "&amp;"), ("<", "&lt;"), ("\\", "\\\\"), ("|", "\\|")):
        text = text.replace(mark, shown)
    return "<br>".join(text.strip().splitlines())
