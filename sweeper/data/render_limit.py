"""End the rendering of a template that takes too long, in whatever thread it runs.

A template comes with a model or from a user and may loop for ever. Jinja's sandbox bounds single ranges,
but neither nested loops nor macros that call themselves twice.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

RENDER_SECONDS = 10.0
"""CPU seconds that the rendering of one conversation may take. The longest ones need milliseconds."""


class RenderTooSlow(Exception):
    """A rendering was ended because it exceeded its limit."""


class RenderWatch:
    """Ends renderings that exceed a limit. One thread watches all of them."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._lock = threading.Lock()
        self._begun: dict[int, float] = {}
        """CPU seconds of this process at the begin of each thread's rendering."""
        self._watcher: threading.Thread | None = None

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Limit the time of the block.

        Raises:
            RenderTooSlow: the block took too long and was ended.
        """
        thread = threading.get_ident()
        with self._lock:
            # CPU time, so that neither a busy nor a suspended machine ends a rendering
            self._begun[thread] = time.process_time()
            if self._watcher is None or not self._watcher.is_alive():  # no thread survives a fork
                self._watcher = threading.Thread(target=self._watch, daemon=True)
                self._watcher.start()
        try:
            yield
        finally:
            with self._lock:
                self._begun.pop(thread, None)

    def _watch(self) -> None:
        while True:
            time.sleep(self.limit_s / 4)
            with self._lock:
                ended = time.process_time() - self.limit_s
                for thread in [each for each, begun in self._begun.items() if begun < ended]:
                    # or the next round would raise once more, outside of the block
                    del self._begun[thread]
                    # a signal would reach the main thread only, and the inline engine has another one
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(RenderTooSlow)
                    )


WATCH = RenderWatch(RENDER_SECONDS)
