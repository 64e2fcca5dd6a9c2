"""ROUGE against rouge_score itself, against values by hand, and through evaluate's metric."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
from rouge_score.rouge_scorer import RougeScorer

from sweeper.core.errors import ConfigError
from sweeper.evaluation import rouge as module
from sweeper.evaluation.rouge import KINDS, rouge

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

# evaluate's metric as its repository has it, less the documentation
METRIC = """
import absl
import datasets
import evaluate
import nltk
from rouge_score import rouge_scorer, scoring


class Tokenizer:
    def __init__(self, tokenizer_func):
        self.tokenizer_func = tokenizer_func

    def tokenize(self, text):
        return self.tokenizer_func(text)


class Rouge(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=[datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                      datasets.Features({"predictions": text, "references": text})])

    def _compute(self, predictions, references, rouge_types=None, use_aggregator=True,
                 use_stemmer=False, tokenizer=None):
        multi_ref = isinstance(references[0], list)
        if tokenizer is not None:
            tokenizer = Tokenizer(tokenizer)
        scorer = rouge_scorer.RougeScorer(rouge_types, use_stemmer=use_stemmer, tokenizer=tokenizer)
        if use_aggregator:
            aggregator = scoring.BootstrapAggregator()
        scores = []
        for ref, pred in zip(references, predictions):
            score = scorer.score_multi(ref, pred) if multi_ref else scorer.score(ref, pred)
            if use_aggregator:
                aggregator.add_scores(score)
            else:
                scores.append(score)
        if use_aggregator:
            result = aggregator.aggregate()
            return {key: result[key].mid.fmeasure for key in result}
        return {key: [score[key].fmeasure for score in scores] for key in scores[0]}
"""


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of evaluate's own: what this machine holds decides nothing here."""
    import evaluate.config

    folder = tmp_path / "modules"
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", folder)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    return folder


@pytest.fixture
def metric_folder(tmp_path: Path) -> Path:
    """A local copy of evaluate's rouge metric."""
    folder = tmp_path / "rouge"
    folder.mkdir()
    (folder / "rouge.py").write_text(METRIC, encoding="utf-8")
    return folder


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
    assert found.source == "rouge_score"
    assert found.warning is None


def test_scores_by_hand() -> None:
    """5 of 6 words, 3 of 5 pairs and a common subsequence of 5 words out of 6."""
    means = rouge(PREDICTIONS[:1], REFERENCES[:1]).means
    assert means == pytest.approx({"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6})


def test_rouge_l_is_of_the_whole_text_not_of_its_lines() -> None:
    """Lines in another order cost ROUGE-L what they would cost in one line (that is not Lsum)."""
    one_line = rouge(["b c a"], ["a b c"]).means["rougeL"]
    assert rouge(["b c\na"], ["a\nb c"]).means["rougeL"] == pytest.approx(one_line)


@pytest.mark.parametrize("tokenizer", ["ascii", "unicode"])
def test_evaluates_metric_gives_identical_figures(
    metric_folder: Path, tokenizer: module.TokenizerName
) -> None:
    """A local folder of evaluate's metric and rouge_score agree to the last bit."""
    through = rouge(PREDICTIONS, REFERENCES, tokenizer, str(metric_folder))
    direct = rouge(PREDICTIONS, REFERENCES, tokenizer)
    assert through.means == direct.means
    assert through.examples == direct.examples
    assert through.source.startswith("evaluate ")


def test_a_cached_metric_is_used_without_asking_a_network(
    metric_folder: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier evaluate.load("rouge") left behind is found by itself."""
    cached = caches / "evaluate_modules" / "metrics" / "evaluate-metric--rouge" / ("a" * 64)
    cached.mkdir(parents=True)
    (cached / "rouge.py").write_text((metric_folder / "rouge.py").read_text())

    def no_network(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr("socket.socket.connect", no_network)
    found = rouge(PREDICTIONS, REFERENCES)
    assert found.source == f"evaluate {cached / 'rouge.py'}"
    monkeypatch.setattr(module, "_cached_script", lambda: None)
    assert found.means == rouge(PREDICTIONS, REFERENCES).means


def test_a_folder_without_a_metric_is_named(tmp_path: Path) -> None:
    """The message names the key and the script that is missing."""
    with pytest.raises(ConfigError, match=r"evaluation\.rouge_path=.*no metric script.*empty\.py"):
        rouge(PREDICTIONS, REFERENCES, path=str(tmp_path / "empty"))


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
