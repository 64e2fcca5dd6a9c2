"""ROUGE against rouge_score itself and against values by hand."""

from __future__ import annotations

from statistics import fmean

import pytest
from rouge_score.rouge_scorer import RougeScorer

from sweeper.config.settings import EvaluationSettings, validate
from sweeper.core.errors import ConfigError
from sweeper.evaluation import rouge as module
from sweeper.evaluation.rouge import KINDS, rouge
from tests.conftest import make_settings

REFERENCES = [
    "the cat sat on the mat",
    "Return the sum of a and b.",
    "A long answer, with several words; and punctuation!",
    "something",
]
PREDICTIONS = [
    "the cat lay on the mat",
    "Return a and b",
    "Punctuation and words, several: an answer with length.",
    "",
]


def test_scores_are_rouge_scores_f_measures() -> None:
    """Every example's F-measure is the library's, and the figure is their plain mean."""
    found = rouge(PREDICTIONS, REFERENCES)
    scorer = RougeScorer(list(KINDS))
    for kind in KINDS:
        expected = [
            scorer.score(reference, prediction)[kind].fmeasure
            for reference, prediction in zip(REFERENCES, PREDICTIONS, strict=True)
        ]
        assert list(found.examples[kind]) == expected
        assert found.means[kind] == pytest.approx(fmean(expected), abs=1e-15)
    assert found.warning is None


def test_scores_by_hand() -> None:
    """5 of 6 words, 3 of 5 pairs and a common subsequence of 5 words out of 6."""
    means = rouge(PREDICTIONS[:1], REFERENCES[:1]).means
    assert means == pytest.approx({"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6})


def test_rouge_l_is_of_the_whole_text_not_of_its_lines() -> None:
    """Lines in another order cost ROUGE-L what they would cost in one line (that is not Lsum)."""
    one_line = rouge(["b c a"], ["a b c"]).means["rougeL"]
    assert rouge(["b c\na"], ["a\nb c"]).means["rougeL"] == pytest.approx(one_line)


def test_other_scripts_score_zero_in_ascii_and_say_so() -> None:
    """rouge_score knows a-z and 0-9: a perfect answer in Cyrillic is worth 0, with a warning."""
    texts = ["привет мир", "hello world"]
    found = rouge(texts, texts)
    assert found.means["rouge1"] == 0.5
    assert found.empty_references == 1
    assert "1 of 2" in (found.warning or "")
    assert "rouge_tokenizer=unicode" in (found.warning or "")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Привет, мир!", ["привет", "мир"]),
        ("日本語 text", ["日", "本", "語", "text"]),
        ("Ünïcode １２", ["ünïcode", "12"]),
        ("don't 3.5", ["don", "t", "3", "5"]),
    ],
)
def test_unicode_tokens(text: str, tokens: list[str]) -> None:
    """Words of any script, and characters where a script has no blanks."""
    assert module.UnicodeTokenizer().tokenize(text) == tokens
    assert rouge([text], [text], "unicode").means["rouge1"] == pytest.approx(1)


def test_unicode_equals_ascii_on_ascii_text() -> None:
    """The tokenizers differ only where ascii knows nothing."""
    assert rouge(PREDICTIONS, REFERENCES, "unicode").means == rouge(PREDICTIONS, REFERENCES).means


def test_a_stored_rouge_path_is_read_if_it_was_unset() -> None:
    """An earlier config.yaml with the key's default is read; a path, which has no effect now, is not."""
    stored = make_settings().evaluation.model_dump()
    assert (
        validate(EvaluationSettings, {**stored, "rouge_path": None}) == make_settings().evaluation
    )
    with pytest.raises(ConfigError, match=r"rouge_path='/rouge': no such key"):
        validate(EvaluationSettings, {**stored, "rouge_path": "/rouge"})
