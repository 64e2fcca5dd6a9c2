"""Find exact and near duplicates among texts.

Exact duplicates are equal except for letter case and white space. Near duplicates have a Jaccard
similarity of five-character shingles of at least the threshold: MinHash finds candidates (Broder 1997,
implemented by datasketch), and their similarity is then computed exactly. The result is deterministic:
permutations and hash function are fixed.
"""

from __future__ import annotations

import unicodedata
import zlib
from typing import Any

from sweeper.builtin.docstring_pairs import jaccard, shingles

PERMUTATIONS = 128
# At 128 permutations 10,000 rows of 600 characters take 11 CPU seconds. Exact duplicates alone are
# found in 100,000 rows in 9.


class SeenTexts:
    """Set of texts that answers whether another text duplicates one of them.

    Args:
        near_threshold: Jaccard similarity, 0 to 1, from which two texts are near duplicates. With None
            only exact duplicates are found.
    """

    def __init__(self, near_threshold: float | None) -> None:
        self._exact: set[str] = set()
        self._near = None if near_threshold is None else _NearIndex(near_threshold)

    def kind(self, text: str) -> str | None:
        """Return `duplicate`, `near duplicate`, or None for a new text."""
        key = normalised(text)
        if key in self._exact:
            return "duplicate"
        if self._near is not None and self._near.holds(key):
            return "near duplicate"
        return None

    def add(self, text: str) -> None:
        """Add a text to the set."""
        key = normalised(text)
        if key in self._exact:
            return
        self._exact.add(key)
        if self._near is not None:
            self._near.add(key)


class _NearIndex:
    """Locality-sensitive index of MinHash signatures."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH  # imports scipy, which takes seconds

        self._threshold = threshold
        self._empty = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
        # Recall weighs more than precision because candidates are compared exactly afterwards.
        self._index = MinHashLSH(threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        self._texts: list[str] = []
        self._last: tuple[str, Any] = ("", None)

    def holds(self, text: str) -> bool:
        candidates = self._index.query(self._signature(text))
        own = shingles(text) if candidates else frozenset()
        return any(
            jaccard(own, shingles(self._texts[number])) >= self._threshold for number in candidates
        )

    def add(self, text: str) -> None:
        self._index.insert(len(self._texts), self._signature(text))
        self._texts.append(text)

    def _signature(self, text: str) -> Any:
        """Return the MinHash of a text."""
        # The last signature is kept: callers look a text up and then add the same text.
        if self._last[1] is None or self._last[0] != text:
            signature = self._empty.copy()
            signature.update_batch([shingle.encode() for shingle in shingles(text)])
            self._last = (text, signature)
        return self._last[1]


def normalised(text: str) -> str:
    """Return the text in NFC and case-folded, with single spaces: the form that is compared."""
    # Punctuation is kept, unlike in docstring_pairs: `3 + 4` and `3 - 4` are different rows.
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
