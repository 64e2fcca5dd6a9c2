"""Splitting, leaks between splits, and the shape of train."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from sweeper.core.errors import DataError
from sweeper.data.examples import Example
from sweeper.data.mixture import shape_train, shares
from sweeper.data.partition import partition
from sweeper.data.splits import load_splits
from tests.data.samples import example, make_data, pairs, text_example, write_rows


def answers(examples: Sequence[Example]) -> list[str]:
    """What the examples answer."""
    return [item.completion for item in examples]


@pytest.fixture
def forty(tmp_path: Path) -> str:
    """Forty rows in a file."""
    return write_rows(tmp_path / "forty.jsonl", pairs(range(40)))


def test_one_file_is_split_by_row_without_overlap(forty: str) -> None:
    """Validation and test are taken off train: every row in one split, the same every time."""
    splits = load_splits(make_data(train=forty, test_ratio=0.25))
    assert splits.counts == {"train": 26, "validation": 4, "test": 10}
    assert len({item.text for found in splits.examples.values() for item in found}) == 40
    assert load_splits(make_data(train=forty, test_ratio=0.25)).digest == splits.digest
    other = load_splits(make_data(train=forty, test_ratio=0.25, split_seed=1))
    assert other.digest != splits.digest


def test_duplicate_rows_do_not_leak_across_the_split(tmp_path: Path, forty: str) -> None:
    """A file with every row twice is split as if each stood there once, and the count is told."""
    twice = tmp_path / "twice.jsonl"
    twice.write_text(Path(forty).read_text() * 2)
    splits = load_splits(make_data(train=str(twice)))
    assert splits.digest == load_splits(make_data(train=forty)).digest
    assert splits.dropped == {"duplicate": 40}
    assert splits.passed == {
        "read": 80,
        "usable": 80,
        "clean": 40,
        "disjoint": 40,
        "train": 32,
        "train as shaped": 32,
    }


def test_kept_duplicates_leave_train_when_validation_or_test_has_them(
    tmp_path: Path, forty: str
) -> None:
    """deduplicate=none keeps repeats, but never on both sides of a split."""
    twice = tmp_path / "twice.jsonl"
    twice.write_text(Path(forty).read_text() * 2)
    splits = load_splits(make_data(train=str(twice), cleaning={"deduplicate": "none"}))
    judged = {item.text for name in ("validation", "test") for item in splits.examples[name]}
    assert judged.isdisjoint(item.text for item in splits.examples["train"])
    assert splits.dropped["train leak (duplicate)"] == 64 - splits.counts["train"]


def test_a_validation_file_is_taken_whole_and_its_rows_leave_train(
    tmp_path: Path, forty: str
) -> None:
    """A file per split is not split again nor cleaned; rows in both files are no longer trained on."""
    validation = write_rows(tmp_path / "v.jsonl", pairs([3, 3, 50]))
    test = write_rows(tmp_path / "t.jsonl", pairs([50, 4]))
    splits = load_splits(make_data(train=forty, validation=validation, test=test))
    assert splits.counts == {"train": 38, "validation": 2, "test": 2}
    assert splits.dropped == {"validation leak (duplicate)": 1, "train leak (duplicate)": 2}
    with pytest.raises(DataError, match=r"train split is empty.*Dropped: 40 train leak"):
        load_splits(make_data(train=forty, validation=forty))


def test_a_test_split_is_not_drawn_from_rows_of_the_validation_file(
    tmp_path: Path, forty: str
) -> None:
    """The user's validation file stays whole: shared rows leave train before test is taken off it."""
    validation = write_rows(tmp_path / "v.jsonl", pairs(range(20)))
    splits = load_splits(make_data(train=forty, validation=validation, test_ratio=0.4))
    assert splits.counts == {"train": 12, "validation": 20, "test": 8}
    assert splits.dropped == {"train leak (duplicate)": 20}


def test_near_leaks_are_found_when_near_duplicates_are(tmp_path: Path) -> None:
    """A row that nearly stands in the validation file leaves train in near mode only."""
    text = "The quick brown fox jumps over the lazy dog and runs away into the dark forest"
    train = [{"prompt": text, "completion": "Yes."}, *pairs(range(5))]
    path = write_rows(tmp_path / "a.jsonl", train)
    judge = write_rows(tmp_path / "b.jsonl", [{"prompt": text + "s", "completion": "Yes."}])
    near = {"deduplicate": "near", "near_threshold": 0.8}
    data = make_data(train=path, validation=judge, test_ratio=0.0, cleaning=near)
    assert load_splits(data).dropped["train leak (near duplicate)"] == 1
    exact = make_data(train=path, validation=judge, test_ratio=0.0)
    assert load_splits(exact).dropped == {}


def test_groups_never_straddle(tmp_path: Path) -> None:
    """Rows of one document stay in one split, and each split gets about its share."""
    rows = [row for doc in range(50) for row in pairs(range(doc * 10, doc * 10 + 10), doc=doc)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    splits = load_splits(make_data(train=path, group_by="doc"))
    docs = {name: {e.row.values["doc"] for e in found} for name, found in splits.examples.items()}
    assert splits.counts == {"train": 400, "validation": 50, "test": 50}
    assert docs["train"].isdisjoint(docs["validation"] | docs["test"])
    assert docs["validation"].isdisjoint(docs["test"])


def test_few_groups_still_give_a_validation_split(tmp_path: Path) -> None:
    """With two large groups the smaller one judges."""
    rows = [*pairs(range(12), doc="a"), *pairs(range(20, 28), doc="b")]
    splits = load_splits(make_data(train=write_rows(tmp_path / "r.jsonl", rows), group_by="doc"))
    assert splits.counts == {"train": 12, "validation": 8, "test": 0}


def test_a_missing_group_column_is_named(forty: str) -> None:
    """The first row without the column is shown, with the columns it has."""
    with pytest.raises(
        DataError, match=r":1: no value in the column 'doc' \(data\.group_by=doc\)\. The row's col"
    ):
        load_splits(make_data(train=forty, group_by="doc"))


def test_splits_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    """Two interpreters with different hash seeds give one digest, groups and balance included."""
    rows = [row for doc in range(9) for row in pairs(range(doc * 5, doc * 5 + 5), doc=f"d{doc}")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = make_data(train=path, group_by="doc", balance_by="doc", max_samples=20)
    code = (
        "import sys; from sweeper.config.settings import DataSettings as Data\n"
        "from sweeper.data.splits import load_splits\n"
        "print(load_splits(Data.model_validate_json(sys.argv[1])).digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, data.model_dump_json()],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_the_smallest_file_that_can_be_split(tmp_path: Path) -> None:
    """Two rows are one to learn from and one to be judged on."""
    path = write_rows(tmp_path / "rows.jsonl", pairs(range(2)))
    assert load_splits(make_data(train=path)).counts == {"train": 1, "validation": 1, "test": 0}


def paragraphs(count: int) -> str:
    """A text of numbered paragraphs of about a hundred characters."""
    return "\n\n".join(
        f"Paragraph {n:03}. " + "Words follow words here. " * 3 for n in range(count)
    )


def test_a_book_is_cut_at_paragraphs_into_contiguous_parts() -> None:
    """Train, validation and test are the book in its order; nothing is lost, each cut is a border."""
    book = paragraphs(100)
    data = make_data(validation_ratio=0.1, test_ratio=0.05)
    parts = partition({"train": [[text_example(book)]]}, data)
    texts = [parts[name][0][0].completion for name in ("train", "validation", "test")]
    assert "".join(texts) == book
    assert all(text.startswith("Paragraph ") for text in texts)
    assert [len(text) / len(book) for text in texts] == pytest.approx([0.85, 0.1, 0.05], abs=0.01)
    assert (
        parts["test"][0][0].row.where
        == f"book.txt, characters {len(book) - len(texts[2])}-{len(book)}"
    )


def test_chapters_are_cut_as_one_book() -> None:
    """Several files are one text in order: whole files are judges where they fit."""
    chapters = [text_example(paragraphs(10), f"{n:02}.txt") for n in range(10)]
    data = make_data(validation_ratio=0.1, test_ratio=0.1)
    parts = partition({"train": [chapters]}, data)
    assert parts["test"][0] == chapters[9:]
    assert parts["validation"][0] == chapters[8:9]
    assert parts["train"][0] == chapters[:8]


def test_a_text_without_paragraphs_is_cut_at_a_word() -> None:
    """Without paragraphs, lines and sentences the border is a space; without any, the exact place."""
    data = make_data(validation_ratio=0.1, test_ratio=0.0)
    parts = partition({"train": [[text_example("word " * 200)]]}, data)
    assert parts["validation"][0][0].completion == "word " * 20
    parts = partition({"train": [[text_example("x" * 100)]]}, data)
    assert parts["validation"][0][0].completion == "x" * 10


def test_shares_are_whole_and_sum_to_the_total() -> None:
    """Largest remainders: 3:1 of 10 is 8 and 2 (7.5 and 2.5, the first remainder wins)."""
    assert shares([3, 1], 10) == [8, 2]
    assert shares([1, 1, 1], 100) == [34, 33, 33]
    assert shares([0.1, 0.2, 0.7], 10) == [1, 2, 7]


def test_weights_mix_sources_after_the_split(tmp_path: Path) -> None:
    """Shares follow the weights by repeating the small source; the judges hold no repeats."""
    large = write_rows(tmp_path / "large.jsonl", pairs(range(100), source="large"))
    small = write_rows(tmp_path / "small.jsonl", pairs(range(200, 220), source="small"))
    sources = [{"path": large, "weight": 1}, {"path": small, "weight": 1}]
    splits = load_splits(make_data(train=sources))
    found = Counter(item.row.values["source"] for item in splits.examples["train"])
    assert found == {"large": 48, "small": 48}
    texts = Counter(
        item.text for item in splits.examples["train"] if item.row.values["source"] == "small"
    )
    assert len(texts) == 16
    assert set(texts.values()) == {3}
    assert splits.counts["validation"] == len({e.text for e in splits.examples["validation"]}) == 12
    plain = load_splits(make_data(train=[large, small]))
    assert Counter(e.row.values["source"] for e in plain.examples["train"]) == {
        "large": 80,
        "small": 16,
    }
    limited = load_splits(make_data(train=sources, max_samples=10))
    assert Counter(e.row.values["source"] for e in limited.examples["train"]) == {
        "large": 5,
        "small": 5,
    }


def test_sources_have_formats_and_columns_of_their_own(tmp_path: Path) -> None:
    """An Alpaca file and a question/answer file with other column names make one training set."""
    alpaca = [{"instruction": f"Do {n}.", "input": "", "output": f"Done {n}."} for n in range(20)]
    asked = [{"q": f"Why {n}?", "a": f"Because {n}."} for n in range(20)]
    one = write_rows(tmp_path / "one.jsonl", alpaca)
    two = write_rows(tmp_path / "two.jsonl", asked)
    columns = {"question": "q", "answer": "a"}
    splits = load_splits(
        make_data(train=[one, {"path": two, "format": "question_answer", "columns": columns}])
    )
    assert splits.formats == ("alpaca", "question_answer")
    assert splits.source == f"{one} + {two}"
    assert splits.counts == {"train": 32, "validation": 4, "test": 4}
    with pytest.raises(DataError, match=r"format=qa: no such format. Use auto, .*alpaca"):
        load_splits(make_data(train=[one, {"path": two, "format": "qa"}]))


def test_max_samples_limits_training_only(forty: str) -> None:
    """max_samples draws from train with the split's seed and leaves the judges alone."""
    whole = load_splits(make_data(train=forty))
    splits = load_splits(make_data(train=forty, max_samples=5))
    assert splits.counts == {"train": 5, "validation": 4, "test": 4}
    assert splits.examples["validation"] == whole.examples["validation"]
    assert load_splits(make_data(train=forty, max_samples=10_000)).counts == whole.counts


def test_balance_makes_tasks_equally_frequent() -> None:
    """Tasks are sampled down and repeated up to one size; the number of rows stays."""
    rows = [example(str(n), "x", task="a" if n < 90 else "b") for n in range(100)]
    shaped = shape_train([rows], None, make_data(balance_by="task"))
    assert Counter(item.row.values["task"] for item in shaped) == {"a": 50, "b": 50}
    assert shaped == shape_train([rows], None, make_data(balance_by="task"))


def test_curriculum_orders_train_by_a_column_or_by_length() -> None:
    """Numbers order as numbers even when a CSV file wrote them as text; ties keep their order."""
    rows = [
        example("p", "x" * size, level=level) for size, level in ((3, "10"), (1, "9"), (2, "9"))
    ]
    assert answers(shape_train([rows], None, make_data(order_by="level"))) == ["x", "xx", "xxx"]
    assert answers(shape_train([rows], None, make_data(order_by="length"))) == ["x", "xx", "xxx"]
    words = [example("p", level, level=level) for level in ("hard", "easy")]
    assert answers(shape_train([words], None, make_data(order_by="level"))) == ["easy", "hard"]
    with pytest.raises(DataError, match=r"no value in the column 'gone' \(data\.order_by=gone\)"):
        shape_train([words], None, make_data(order_by="gone"))


def test_an_ordered_split_says_so(forty: str) -> None:
    """Training must know not to shuffle a curriculum."""
    assert load_splits(make_data(train=forty, order_by="length")).ordered
    assert not load_splits(make_data(train=forty)).ordered


def test_redaction_reaches_every_split(tmp_path: Path) -> None:
    """Validation and test rows are redacted as well: anonymised logs stay so everywhere."""
    rows = [{"prompt": f"I am a{n}@b.org", "completion": f"Hello {n}."} for n in range(20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    judge = write_rows(tmp_path / "judge.jsonl", [{"prompt": "z@b.org?", "completion": "No."}])
    data = make_data(train=path, validation=judge, cleaning={"redact": ["email"]})
    splits = load_splits(data)
    assert not any("@" in item.text for found in splits.examples.values() for item in found)
    assert splits.examples["validation"][0].text == "[EMAIL]?\nNo."


def test_embedded_pairs_keep_their_own_splits() -> None:
    """By module, already clean: nothing is split again and nothing leaks."""
    splits = load_splits(make_data())
    assert splits.format == "alpaca"
    assert all(count > 250 for count in splits.counts.values())
    assert not any("leak" in reason for reason in splits.dropped if "(" in reason)
    assert splits.source.startswith("docstring pairs of CPython 3.")
