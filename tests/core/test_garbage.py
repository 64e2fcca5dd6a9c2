"""Imports are kept out of garbage collection, and garbage is not."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from sweeper.core.garbage import uncollected

EXEMPT = """
import gc, weakref
from sweeper.core.garbage import exempt_from_collection

class Node:
    pass

def ring():
    node = Node()
    node.self = node
    return weakref.ref(node)

before = ring()
kept = [[] for _ in range(1000)]
exempt_from_collection()
after = ring()
gc.collect()
assert before() is None and after() is None
assert not any(one is kept for one in gc.get_objects())
"""


def _fail_to_import() -> None:
    with uncollected():
        assert not gc.isenabled()
        raise ImportError


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_afterwards_as_it_was(enabled: bool) -> None:
    """Enabled or disabled before, and after an import that fails."""
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ImportError):
            _fail_to_import()
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_what_lives_is_exempted_and_what_is_garbage_is_freed() -> None:
    """Cycles made before and after are collected; what lived at the call is walked no more."""
    result = subprocess.run(
        [sys.executable, "-c", EXEMPT], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
