"""ROUGE-1, ROUGE-2 and ROUGE-L between answers and references, as mean F-measures over the examples.

The scores are computed by rouge_score, which the rouge metric of `evaluate` uses as well. ROUGE-L is the
sentence-level variant: the longest common subsequence of the whole texts (Lin 2004, section 3.1).
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
        predictions: Generated answers.
        references: Expected answers, one for each prediction.
        tokenizer: Key of TOKENIZERS. `ascii` is rouge_score's own tokenizer, used in publications.
    """
    assert len(predictions) == len(references) > 0
    splitter = TOKENIZERS[tokenizer]()
    scorer = RougeScorer(list(KINDS), tokenizer=splitter)
    # rouge_score takes the reference first.
    rows = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
    # The means are plain: the default aggregation of `evaluate` is a bootstrap without a seed.
    scores = {kind: [float(row[kind].fmeasure) for row in rows] for kind in KINDS}
    return RougeScores(scores, sum(not splitter.tokenize(reference) for reference in references))
