"""Make the embedded data set: (signature -> one-line docstring) rows, cleaned and split.

Decides which rows are usable and which are duplicates. Does not know which module belongs to which
split (`stdlib_text`), prompts, tokens or models, and imports no torch. The same Python build gives the
same rows in the same order.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

from sweeper.builtin.kept_json import kept_document
from sweeper.builtin.stdlib_text import HELD_OUT_MODULES, TASK_MODULES, documented, source_digest

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
"""One row: `instruction`, `input` (the signature) and `output` (the summary)."""

_CALL = re.compile(r"[\w.]+\(.*\)(\s*(->|-->|:|=)|\.?$)")  # "fork() -> (pid, fd)" is no summary
_SENTENCE_END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?<=[.!?])\s+(?=[A-Z])")


@dataclass(frozen=True)
class DocstringPairs:
    """The cleaned data set and the counts of removed rows.

    Attributes:
        rows: Rows by split.
        dropped: Number of removed rows by reason. A `leak` equals or nearly equals a row of another
            split: train loses rows to validation and test, and validation to test.
    """

    rows: dict[str, list[Row]]
    dropped: dict[str, int]


def docstring_pairs() -> DocstringPairs:
    """Return the rows of the running Python's standard library, from the cache if it has them."""
    # Each worker of each study needs the rows, and making them takes more than a second
    digest = source_digest(frozenset().union(*TASK_MODULES.values()), code=(Path(__file__),))
    return DocstringPairs(**kept_document("docstring_pairs", digest, lambda: asdict(make_pairs())))


def make_pairs() -> DocstringPairs:
    """Extract and clean the rows of the running Python's standard library (about 2 s)."""
    return clean({split: list(_rows_of(TASK_MODULES[split])) for split in SPLITS})


def held_out_pairs() -> list[Row]:
    """Return clean rows of the modules that neither a split nor the base's pre-training uses."""
    raw = {split: list(_rows_of(HELD_OUT_MODULES)) if split == "test" else [] for split in SPLITS}
    return clean(raw).rows["test"]


def clean(raw: dict[str, list[Row]]) -> DocstringPairs:
    """Drop defective rows, then rows that repeat an earlier one, and keep the order of the others."""
    dropped = dict.fromkeys(DROP_REASONS, 0)
    sound: list[tuple[str, Row]] = []
    # Test comes first and train last, so that train loses the rows that the splits share.
    for split in reversed(SPLITS):
        for row in raw[split]:
            if reason := row_defect(row):
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
    """Return the first sentence of a docstring's first paragraph, on one line."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]


def normalised(text: str) -> str:
    """Return the lower-case words and digits of a text, with single spaces, for comparisons."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def row_text(row: Row) -> str:
    """Return the normalised signature and summary of a row, by which duplicates are found."""
    return normalised(f"{row['input']} {row['output']}")


def shingles(text: str) -> frozenset[str]:
    """Return all runs of five characters in a text (or the text itself if it is shorter)."""
    starts = range(max(1, len(text) - _SHINGLE_CHARS + 1))
    return frozenset(text[start : start + _SHINGLE_CHARS] for start in starts)


def row_defect(row: Row) -> str:
    """Return the reason why a row is defective regardless of other rows, or ""."""
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


def _rows_of(modules: frozenset[str]) -> Iterator[Row]:
    for source in documented(modules):
        if source.signature:  # a module's docstring has no signature to write it from
            output = first_sentence(source.docstring)
            yield {"instruction": INSTRUCTION, "input": source.signature, "output": output}


def _repetitions(rows: Sequence[tuple[str, Row]]) -> Iterator[str]:
    """Yield for each (split, row) the reason why it repeats an earlier kept row, or "".

    Rows repeat each other if the exact Jaccard similarity of their shingles reaches the threshold.
    """
    # Prefix filtering: two sets with Jaccard >= t share an element among the first
    # |set| - ceil(t |set|) + 1 of each, in any common order. With the rarest shingles first, few rows
    # share one, so all pairs are compared in well under a second and without another dependency.
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
    """Return the Jaccard similarity of two non-empty sets, 0 to 1."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)
