"""ROUGE-1, ROUGE-2 and ROUGE-L between answers and references: F-measures, plain means over examples.

evaluate's metric computes with rouge_score, so both ways give identical figures; its own aggregation, a
bootstrap without a seed, is not used. ROUGE-L is the sentence-level one: the longest common subsequence
of the whole texts (Lin 2004, section 3.1).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from sweeper.core.errors import ConfigError

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
    source: str
    """What computed it: `rouge_score`, or `evaluate` and its script."""

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
    path: str | None = None,
) -> RougeScores:
    """Score predictions against their references.

    Args:
        tokenizer: `ascii` is rouge_score's own, the one published figures use.
        path: a local folder (or script) of evaluate's rouge metric. Without one, the copy in
            evaluate's cache is used if there is one, and rouge_score's scorer otherwise; nothing is
            downloaded.

    Raises:
        ConfigError: `path` holds no metric script.
    """
    assert len(predictions) == len(references) > 0
    words = TOKENIZERS[tokenizer]()
    script = _given_script(path) if path is not None else _cached_script()
    if script is None:
        scores, source = _by_rouge_score(predictions, references, words), "rouge_score"
    else:
        scores, source = _by_evaluate(script, predictions, references, words), f"evaluate {script}"
    empty = sum(not words.tokenize(reference) for reference in references)
    return RougeScores(scores, empty, source)


def _by_rouge_score(
    predictions: Sequence[str], references: Sequence[str], words: Tokenizer
) -> dict[str, list[float]]:
    scorer = RougeScorer(list(KINDS), tokenizer=words)
    rows = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
    return {kind: [float(row[kind].fmeasure) for row in rows] for kind in KINDS}


def _by_evaluate(
    script: Path, predictions: Sequence[str], references: Sequence[str], words: Tokenizer
) -> dict[str, list[float]]:
    import evaluate  # seconds of imports that most runs never need

    metric: Any = evaluate.load(str(script), keep_in_memory=True)
    scores = metric.compute(
        predictions=list(predictions),
        references=list(references),
        rouge_types=list(KINDS),
        use_aggregator=False,
        tokenizer=words.tokenize,
    )
    return {kind: [float(score) for score in scores[kind]] for kind in KINDS}


def _given_script(path: str) -> Path:
    """evaluate looks for a script of its folder's name."""
    given = Path(path).expanduser()
    script = given if given.suffix == ".py" else given / f"{given.name}.py"
    if not script.is_file():
        raise ConfigError(
            [
                f"evaluation.rouge_path={path}: no metric script {script}; give evaluate's rouge "
                "folder, or null for rouge_score"
            ]
        )
    return script


def _cached_script() -> Path | None:
    """The newest copy that an earlier `evaluate.load("rouge")` left in its cache of modules."""
    from evaluate.config import HF_MODULES_CACHE

    folder = Path(HF_MODULES_CACHE) / "evaluate_modules" / "metrics" / "evaluate-metric--rouge"
    scripts = sorted(folder.glob("*/rouge.py"), key=lambda script: script.stat().st_mtime)
    return scripts[-1] if scripts else None
