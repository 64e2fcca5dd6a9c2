"""Metrics of the length and the ending of generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from sweeper.evaluation.generation import GeneratedAnswer


def length_metrics(
    answers: Sequence[GeneratedAnswer], references: Sequence[str]
) -> dict[str, float]:
    """Return the lengths of answers and references in words, and shares of the answers (0 to 1).

    A word is a run of characters other than white space. `eos` is the share of answers that the model
    ended itself, `limit` the share that was cut at max_new_tokens.
    """
    # Words, not tokens: lengths must be comparable between tokenizers.
    responses = [_words(answer.text) for answer in answers]
    expected = [_words(reference) for reference in references]
    return {
        "eval/response_words_mean": fmean(responses),
        "eval/response_words_median": float(median(responses)),
        "eval/reference_words_mean": fmean(expected),
        "eval/reference_words_median": float(median(expected)),
        "eval/response_empty_share": fmean(words == 0 for words in responses),
        "eval/response_eos_share": fmean(answer.ended for answer in answers),
        "eval/response_limit_share": fmean(not answer.ended for answer in answers),
    }


def _words(text: str) -> int:
    return len(text.split())
