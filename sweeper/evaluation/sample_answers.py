"""Pair the base's and the tuned model's answers to the qualitative prompts (evaluation.prompts).

The prompts must not occur in the training split, or their answers would show memorised text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from sweeper.config.settings import QualitativePrompt
from sweeper.core.errors import DataError
from sweeper.core.plain_text import in_markdown


@dataclass(frozen=True)
class SampleAnswer:
    """One qualitative prompt with the answers of the untuned and the tuned model."""

    category: str
    prompt: str
    base: str
    tuned: str


def pair_answers(
    prompts: Sequence[QualitativePrompt], base: Sequence[str], tuned: Sequence[str]
) -> list[SampleAnswer]:
    """Return the prompts with both models' answers, in the order of the prompts."""
    rows = zip(prompts, base, tuned, strict=True)
    return [SampleAnswer(item.category, item.prompt, *answers) for item, *answers in rows]


def seen_in_training(
    prompts: Sequence[QualitativePrompt], training: Iterable[str]
) -> list[QualitativePrompt]:
    """Return the prompts whose text occurs in a training text, alone or inside a template.

    Texts are compared after Unicode normalisation, in lower case, with single spaces.
    """
    unseen = {item.prompt: normalised(item.prompt) for item in prompts}
    for text in training:
        # Containment, not equality: a prompt inside a rendered template has been trained on as well.
        row = normalised(text)
        unseen = {prompt: form for prompt, form in unseen.items() if form not in row}
        if not unseen:
            break
    return [item for item in prompts if item.prompt not in unseen]


def require_unseen(prompts: Sequence[QualitativePrompt], training: Iterable[str]) -> None:
    """Check that no qualitative prompt occurs in the training split.

    Raises:
        DataError: Some prompts do. The message lists them.
    """
    seen = seen_in_training(prompts, training)
    if seen:
        listed = "; ".join(f"{item.category}: {item.prompt!r}" for item in seen)
        raise DataError(
            f"evaluation.prompts: {len(seen)} of {len(prompts)} prompts occur in the training split, "
            f"so their answers would show memorised text ({listed}). Change these prompts or remove "
            "the training rows."
        )


def normalised(text: str) -> str:
    """Return the text in NFKC and case-folded, with single spaces: the form that is compared."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def as_json(samples: Sequence[SampleAnswer]) -> list[dict[str, str]]:
    """Return the samples as a list of objects with category, prompt, base and tuned."""
    return [asdict(sample) for sample in samples]


def as_markdown(samples: Sequence[SampleAnswer]) -> str:
    """Return the samples as a Markdown table with one row per prompt."""
    lines = ["| category | prompt | base | tuned |", "|---|---|---|---|"]
    for sample in samples:
        cells = (sample.category, sample.prompt, sample.base, sample.tuned)
        lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Return a model's text for a Markdown table, with its line breaks."""
    # Pipes and line breaks would break the table, and a model may write HTML, links and pictures.
    lines = text.strip().replace("&", "&amp;").splitlines()
    return "<br>".join(map(in_markdown, lines))
