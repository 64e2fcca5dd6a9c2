"""Split validation and test off the training examples without separating related rows.

Rows are drawn at random, or whole groups of equal values in a column are, or, for plain text, the last
contiguous parts are taken. The same split_seed gives the same parts. Does not know files.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sweeper.config.settings import SPLIT_KEYS, DataSettings
from sweeper.data.examples import Example, RawRow
from sweeper.data.mixture import column
from sweeper.data.row_formats import BOOK

Pools = dict[str, list[list[Example]]]
"""Examples by split and source: split -> one list for each source."""


def partition(pools: Pools, data: DataSettings) -> Pools:
    """Split validation and test off train unless they have sources of their own.

    Args:
        pools: Examples of train by source, and of validation and test if they have their own sources.
        data: Data settings: validation_ratio, test_ratio, split_seed and group_by.

    Raises:
        DataError: A row lacks the column of data.group_by.
    """
    ratios = {"validation": data.validation_ratio, "test": data.test_ratio}
    missing = {name: ratio for name, ratio in ratios.items() if name not in pools}
    result: Pools = {**{name: [] for name in SPLIT_KEYS}, **pools, "train": []}
    groups = _groups(pools["train"], missing, data)
    rng = random.Random(data.split_seed)
    # Small ratios round to no row. The largest source then gives one, so that validation is not empty.
    largest = max(pools["train"], key=len)
    for pool in pools["train"]:
        if groups is not None:
            parts = _by_group(pool, groups, data)
        elif _is_text(pool):
            parts = _contiguous(pool, missing)
        else:
            parts = _at_random(pool, missing, rng, at_least_one=pool is largest)
        for name, examples in parts.items():
            result[name].append(examples)
    return result


def _at_random(
    pool: Sequence[Example], ratios: Mapping[str, float], rng: random.Random, *, at_least_one: bool
) -> dict[str, list[Example]]:
    train = list(pool)
    rng.shuffle(train)
    total = len(train)
    parts = {}
    for name, ratio in ratios.items():
        count = max(round(total * ratio), at_least_one and name == "validation")
        parts[name], train = train[:count], train[count:]
    return {**parts, "train": train}


def _groups(
    pools: Iterable[Sequence[Example]], ratios: Mapping[str, float], data: DataSettings
) -> dict[str, str] | None:
    """Assign each group to a split so that every split gets about its share of the rows.

    Returns:
        Group -> split, or None if rows are not grouped.
    """
    if data.group_by is None or not ratios:
        return None
    sizes: dict[str, int] = {}
    for pool in pools:
        for example in pool:
            name = str(column(example, data.group_by, "group_by"))
            sizes[name] = sizes.get(name, 0) + 1
    names = sorted(sizes)  # the order of rows must not change the split
    random.Random(data.split_seed).shuffle(names)
    targets = {name: ratio * sum(sizes.values()) for name, ratio in ratios.items()}
    filled = dict.fromkeys(ratios, 0)
    groups = {}
    for name in names:
        # At least half of a group must fit, so a split exceeds its share by half a group at most.
        unfilled = [split for split in ratios if filled[split] + sizes[name] / 2 <= targets[split]]
        groups[name] = unfilled[0] if unfilled else "train"
        if unfilled:
            filled[unfilled[0]] += sizes[name]
    # With few large groups none may fit the validation share, but validation must not be empty.
    if filled.get("validation") == 0 and len(names) > 1:
        groups[min(names, key=lambda name: (sizes[name], name))] = "validation"
    return groups


def _by_group(
    pool: Sequence[Example], groups: Mapping[str, str], data: DataSettings
) -> dict[str, list[Example]]:
    assert data.group_by is not None
    parts: dict[str, list[Example]] = {name: [] for name in SPLIT_KEYS}
    for example in pool:
        parts[groups[str(column(example, data.group_by, "group_by"))]].append(example)
    return {name: found for name, found in parts.items() if found}


def _is_text(pool: Sequence[Example]) -> bool:
    """Return True if a source is plain text that is cut into blocks."""
    return bool(pool) and all(example.format == BOOK for example in pool)


def _contiguous(pool: Sequence[Example], ratios: Mapping[str, float]) -> dict[str, list[Example]]:
    """Split texts in their order: the start is train, the last parts are validation and test."""
    # Windows of one text drawn at random would put neighbours, which share sentences, into different
    # splits. Such leaks give a book a validation perplexity near 1.
    total = sum(len(example.completion) for example in pool)
    parts: dict[str, list[Example]] = {}
    left = list(pool)
    for name, ratio in reversed(list(ratios.items())):  # test takes the end of the text
        left, parts[name] = _cut(left, round(total * ratio)) if ratio else (left, [])
    return {**parts, "train": left}


def _cut(pool: Sequence[Example], size: int) -> tuple[list[Example], list[Example]]:
    """Split texts into a head and a tail of about `size` characters, preferably at a paragraph."""
    tail: list[Example] = []
    for index in range(len(pool) - 1, -1, -1):
        text = pool[index].completion
        if len(text) <= size:
            tail.insert(0, pool[index])
            size -= len(text)
            continue
        head, rest = list(pool[:index]), []
        if size and (border := _border(text, len(text) - size)):
            rest = [_part(pool[index], border, len(text))]
            head.append(_part(pool[index], 0, border))
        else:
            head.append(pool[index])
        return head, rest + tail
    return [], tail


def _border(text: str, near: int) -> int:
    """Return where to cut a text near a position: at a paragraph, else a line, sentence or word.

    A boundary is used only if it moves the cut by less than half of the smaller side.
    """
    reach = max(0, near - min(near, len(text) - near) // 2)
    for mark in ("\n\n", "\n", ". ", " "):
        if (found := text.rfind(mark, reach, near)) > 0:
            return found + len(mark)
    return near


def _part(example: Example, start: int, end: int) -> Example:
    text = example.completion[start:end]
    where = f"{example.row.where}, characters {start}-{end}"
    row = RawRow({**example.row.values, "text": text}, where)
    return replace(example, messages=(replace(example.messages[0], content=text),), row=row)
