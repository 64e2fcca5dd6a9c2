"""ROUGE-1, ROUGE-2 and ROUGE-L between answers and references: F-measures, plain means over examples.

rouge_score computes them, as it does inside evaluate's own metric, whose aggregation (a bootstrap
without a seed) is not used. ROUGE-L is the sentence-level one: the longest common subsequence of the
whole texts (Lin 2004, section 3.1).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

KINDS = ("rouge1", "rouge2", "rougeL")
TokenizerName = Literal["ascii", "unicode"]

# Scripts without spaces between words: each character is a token of its own.
_SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNICODE_TOKEN = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")


@dataclass(frozen=True)
class RougeScores:
    """ROUGE scores (0 to 1) of each example by kind."""

    examples: Mapping[str, Sequence[float]]
    empty_references: int
    """Number of references without any token. Their examples score 0 for every answer."""

    @property
    def means(self) -> dict[str, float]:
        """Mean F-measure over the examples, by kind."""
        return {kind: math.fsum(scores) / len(scores) for kind, scores in self.examples.items()}

    @property
    def warning(self) -> str | None:
        """Warning that some examples score 0 for every answer, or None if there are no such examples."""
        if not self.empty_references:
            return None
        count = len(self.examples[KINDS[0]])
        return (
            f"ROUGE is 0 for {self.empty_references} of {count} examples, because the tokenizer finds "
            "no token in their references (ascii knows a-z and 0-9 only). For other scripts set "
            "evaluation.rouge_tokenizer=unicode."
        )


class UnicodeTokenizer(Tokenizer):  # type: ignore[misc]
    """Tokenizer for any script: words in lower case, and single Chinese and Japanese characters."""

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text, as rouge_score asks of a tokenizer."""
        return _UNICODE_TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


TOKENIZERS: dict[str, type[Tokenizer]] = {"ascii": DefaultTokenizer, "unicode": UnicodeTokenizer}


def rouge(
    predictions: Sequence[str],
    references: Sequence[str],
    tokenizer: TokenizerName = "ascii",
) -> RougeScores:
    """Score predictions against their references.

    Args:
        tokenizer: `ascii` is rouge_score's own, the one published figures use.
    """
    assert len(predictions) == len(references) > 0
    words = TOKENIZERS[tokenizer]()
    scorer = RougeScorer(list(KINDS), tokenizer=words)
    rows = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
    scores = {kind: [float(row[kind].fmeasure) for row in rows] for kind in KINDS}
    return RougeScores(scores, sum(not words.tokenize(reference) for reference in references))
