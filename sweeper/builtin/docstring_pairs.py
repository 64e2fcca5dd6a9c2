"""Make the embedded data set: (signature -> one-line docstring) rows, cleaned and split.

Knows what a good row is and when two rows are too alike. Does not know where modules belong
(`stdlib`), how rows become prompts, or anything about tokens and models; torch-free. The same
Python build gives the same rows in the same order, whatever the hash seed.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from sweeper.builtin.stdlib_text import HELD_OUT_MODULES, TASK_MODULES, documented

INSTRUCTION = "Write a one-line docstring."

SPLITS = ("train", "validation", "test")
DROP_REASONS = (
    "doctest",
    "echo",
    "fragment",
    "too_short",
    "too_long",
    "duplicate",
    "near_duplicate",
    "leak",
)

MIN_OUTPUT_CHARS = 10
MAX_OUTPUT_CHARS = 300
MAX_INPUT_CHARS = 300
NEAR_DUPLICATE_JACCARD = 0.8
_SHINGLE_CHARS = 5

Row = dict[str, str]
"""`instruction`, `input` (the signature) and `output` (the summary)."""

_CALL = re.compile(r"[\w.]+\(.*\)(\s*(->|-->|:|=)|\.?$)")  # "fork() -> (pid, fd)": no summary
_SENTENCE_END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?<=[.!?])\s+(?=[A-Z])")


@dataclass(frozen=True)
class DocstringPairs:
    """The cleaned data set and what cleaning removed.

    `rows` has one list for each of `SPLITS`. `dropped` counts the removed rows for each of
    `DROP_REASONS`; a `leak` equals or nearly equals a row of another split: the copy in train
    goes, and between validation and test the one in validation.
    """

    rows: dict[str, list[Row]]
    dropped: dict[str, int]


def docstring_pairs() -> DocstringPairs:
    """Extract and clean the rows of the running Python's standard library (about 2 s)."""
    return clean({split: list(_rows_of(TASK_MODULES[split])) for split in SPLITS})


def held_out_pairs() -> list[Row]:
    """Clean rows of the modules that neither the splits nor the base's pre-training read."""
    raw = {split: list(_rows_of(HELD_OUT_MODULES)) if split == "test" else [] for split in SPLITS}
    return clean(raw).rows["test"]


def clean(raw: dict[str, list[Row]]) -> DocstringPairs:
    """Drop what is defective by itself, then what repeats an earlier row; order is kept."""
    dropped = dict.fromkeys(DROP_REASONS, 0)
    sound: list[tuple[str, Row]] = []
    for split in reversed(SPLITS):  # test claims its text first, train last
        for row in raw[split]:
            if reason := _defect(row):
                dropped[reason] += 1
            else:
                sound.append((split, row))
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for (split, row), reason in zip(sound, _repetitions(sound), strict=True):
        if reason:
            dropped[reason] += 1
        else:
            rows[split].append(row)
    return DocstringPairs(rows, dropped)


def first_sentence(docstring: str) -> str:
    """First sentence of the docstring's first paragraph, on one line."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]


def normalised(text: str) -> str:
    """Lower-case words and digits of `text`, single-spaced: what likeness is judged by."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def row_text(row: Row) -> str:
    """Signature and summary of `row`, normalised: its identity among duplicates."""
    return normalised(f"{row['input']} {row['output']}")


def shingles(text: str) -> frozenset[str]:
    """All runs of five characters in `text` (the text itself if it is shorter)."""
    starts = range(max(1, len(text) - _SHINGLE_CHARS + 1))
    return frozenset(text[start : start + _SHINGLE_CHARS] for start in starts)


def _rows_of(modules: frozenset[str]) -> Iterator[Row]:
    for source in documented(modules):
        if source.signature:  # a module's docstring has no signature to write it from
            output = first_sentence(source.docstring)
            yield {"instruction": INSTRUCTION, "input": source.signature, "output": output}


def _defect(row: Row) -> str:
    """Why `row` is no good by itself, or ""."""
    output = row["output"]
    if ">>>" in output:
        return "doctest"
    if len(output) < MIN_OUTPUT_CHARS or " " not in output:
        return "too_short"
    if len(output) > MAX_OUTPUT_CHARS or len(row["input"]) > MAX_INPUT_CHARS:
        return "too_long"
    if output.endswith((":", ",", ";", "--")):
        return "fragment"
    if _CALL.match(output):
        return "echo"
    return ""


def _repetitions(rows: Sequence[tuple[str, Row]]) -> Iterator[str]:
    """Why each (split, row) repeats an earlier kept one, or "": Jaccard over shingles, exact.

    Two sets with Jaccard >= t share an element among the first |set| - ceil(t |set|) + 1 of each,
    in any order common to both; with the rarest first, few rows share one (prefix filtering), so
    that comparing all pairs costs well under a second.
    """
    texts = [row_text(row) for _, row in rows]
    sets = [shingles(text) for text in texts]
    rarity = Counter(shingle for items in sets for shingle in items)
    index: defaultdict[str, list[int]] = defaultdict(list)
    for number, items in enumerate(sets):
        ordered = sorted(items, key=lambda shingle: (rarity[shingle], shingle))
        prefix = ordered[: len(items) - ceil(NEAR_DUPLICATE_JACCARD * len(items)) + 1]
        rivals = {rival for shingle in prefix for rival in index[shingle]}
        alike = {rival for rival in rivals if jaccard(items, sets[rival]) >= NEAR_DUPLICATE_JACCARD}
        if not alike:
            for shingle in prefix:
                index[shingle].append(number)
            yield ""
        elif any(rows[rival][0] != rows[number][0] for rival in alike):
            yield "leak"
        else:
            exact = any(texts[rival] == texts[number] for rival in alike)
            yield "duplicate" if exact else "near_duplicate"


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """Shared share of two non-empty sets, 0 to 1."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)
