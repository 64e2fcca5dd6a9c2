"""Duplicates: whether a text was seen before, word for word or nearly.

Exact means equal but for letter case and white space. Near means a Jaccard similarity of five-character
shingles of at least the threshold: MinHash finds candidates (Broder 1997, by datasketch), the
similarity itself is computed. Deterministic: fixed permutations, no hash seed.
"""

from __future__ import annotations

import unicodedata
import zlib
from typing import Any

from sweeper.builtin.docstring_pairs import jaccard, shingles

PERMUTATIONS = 128


class SeenTexts:
    """The texts met so far.

    Args:
        near_threshold: Jaccard similarity from which two texts count as the same; None compares
            exactly only.
    """

    def __init__(self, near_threshold: float | None) -> None:
        self._exact: set[str] = set()
        self._near = None if near_threshold is None else _NearIndex(near_threshold)

    def kind(self, text: str) -> str | None:
        """`duplicate`, `near duplicate`, or None for a text that is new."""
        key = normalised(text)
        if key in self._exact:
            return "duplicate"
        if self._near is not None and self._near.holds(key):
            return "near duplicate"
        return None

    def add(self, text: str) -> None:
        """Remember a text."""
        key = normalised(text)
        if key in self._exact:
            return
        self._exact.add(key)
        if self._near is not None:
            self._near.add(key)


class _NearIndex:
    """MinHash signatures in a locality-sensitive index."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH  # brings scipy: seconds that most need not pay

        self._threshold = threshold
        self._empty = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
        # recall is weighed above precision: candidates are compared exactly anyway
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
        """The MinHash of a text; the last one is kept, as a text is asked for and then added."""
        if self._last[1] is None or self._last[0] != text:
            signature = self._empty.copy()
            signature.update_batch([shingle.encode() for shingle in shingles(text)])
            self._last = (text, signature)
        return self._last[1]


def normalised(text: str) -> str:
    """In one Unicode form and letter case, white space single: what equality is judged by."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
