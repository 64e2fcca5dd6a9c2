"""The part of `tools.llama_cpp` that runs llama.cpp's libraries, in a process of its own.

    python -m tools.llama_child quantize F16.gguf OUT.gguf Q8_0
    python -m tools.llama_child losses MODEL.gguf ROWS.json NLL.json THREADS
    python -m tools.llama_child serve MODEL.gguf CONTEXT THREADS

The folder of the libraries is on PYTHONPATH. This process imports neither sweeper nor torch, whose
threads and OpenMP library would be in the way of llama.cpp's own. A crash of theirs ends it alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FTYPES = {"Q8_0": 7, "Q4_K_M": 15}
"""Numbers of llama.cpp (llama_ftype of llama.h) for the forms that a float16 file is quantized to."""
IGNORED = -100
"""Label of a token without loss, as in sweeper.data.tokens."""


def quantize(source: str, out: str, kind: str) -> None:
    """Quantize a float16 file by llama_model_quantize, the function behind llama-quantize."""
    from cyllama.llama import llama_cpp

    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype = FTYPES[kind]
    llama_cpp.llama_backend_init()
    llama_cpp.model_quantize(source, out, params)


def losses(model: str, rows: str, out: str, threads: str) -> None:
    """Write the summed negative log-likelihood of each row's target tokens, in nats, as JSON.

    Args:
        model: GGUF file.
        rows: JSON file with a list of {"input_ids": [...], "labels": [...]}.
        out: JSON file to write.
        threads: Number of threads.
    """
    from cyllama.llama import llama_cpp

    found: list[dict[str, list[int]]] = json.loads(Path(rows).read_text(encoding="utf-8"))
    longest = max(len(row["input_ids"]) for row in found)
    llama_cpp.llama_backend_init()
    # The log's last lines would hide an error's own.
    llama_cpp.disable_logging()

    class SizedModel(llama_cpp.LlamaModel):  # type: ignore[misc]
        """A model with the attribute that cyllama's logits ask for, and its models lack (0.2.18)."""

        @property
        def n_vocab(self) -> int:
            return int(self.get_vocab().n_vocab)

    loaded = SizedModel(model, llama_cpp.LlamaModelParams(), verbose=False)
    params = llama_cpp.LlamaContextParams()
    params.n_ctx = params.n_batch = params.n_ubatch = longest
    params.n_threads = params.n_threads_batch = int(threads)
    context = llama_cpp.LlamaContext(loaded, params, verbose=False)
    batch = llama_cpp.LlamaBatch(n_tokens=longest, embd=0, n_seq_max=1)
    nll = [_nll(context, batch, row["input_ids"], row["labels"]) for row in found]
    Path(out).write_text(json.dumps(nll), encoding="utf-8")


def _nll(context: Any, batch: Any, ids: Sequence[int], labels: Sequence[int]) -> float:
    """Return the negative log-likelihood of a row's targets, from the logits of one decoding step."""
    # The label of a position is predicted from the position before it.
    targets = {place - 1: label for place, label in enumerate(labels) if place and label != IGNORED}
    context.kv_cache_clear()
    batch.reset()
    for place, token in enumerate(ids):
        batch.add(token, place, [0], place in targets)
    if context.decode(batch):
        sys.exit("llama_decode failed")
    total = 0.0
    for place, target in targets.items():
        logits = np.asarray(context.get_logits_ith(place), dtype=np.float64)
        shifted = logits - logits.max()
        total += float(np.log(np.exp(shifted).sum()) - shifted[target])
    return total


def serve(model: str, context: str, threads: str) -> None:
    """Serve a file on a free port of 127.0.0.1, print the address, and end with standard input."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames, params.port = ["127.0.0.1"], 0
    # One slot: no answer shares a batch with another, whose rounding would change it.
    params.n_parallel, params.n_ctx = 1, int(context)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.use_jinja = True
    server = xllamacpp.Server(params)
    print(f"address {server.listening_address}", flush=True)
    # The parent reads no further line, and a full pipe would halt the server.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdin.read()


VERBS: dict[str, Callable[..., None]] = {"quantize": quantize, "losses": losses, "serve": serve}

if __name__ == "__main__":
    VERBS[sys.argv[1]](*sys.argv[2:])
