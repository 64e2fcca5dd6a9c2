"""What the logits of a large vocabulary cost a training step, whole and in chunks.

One forward and backward over 2,048 target tokens at a vocabulary of 128,000, each way in a process of
its own; the body is tiny, so that the head is what is measured. Peak memory is the process's high-water
mark less its resident memory just before the step.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from record import record

VOCABULARY = 128_000
TARGETS = 2_048
CHUNKS = ("whole", "256", "64")

STEP = f"""
import re, sys, time
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from sweeper.evaluation.token_loss import target_nll

def mib(field):
    text = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", text)[1]) / 1024

torch.manual_seed(0)
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_config(LlamaConfig(
    vocab_size={VOCABULARY}, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, tie_word_embeddings=True))
model.model.embed_tokens.weight.requires_grad_(False)  # as under LoRA: the head itself is frozen
ids = torch.randint({VOCABULARY}, (4, {TARGETS} // 4 + 1))
batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
chunk_size = None if sys.argv[1] == "whole" else int(sys.argv[1])
target_nll(model, dict(batch, input_ids=ids[:, :9], attention_mask=torch.ones_like(ids[:, :9]),
                       labels=ids[:, :9]), chunk_size).backward()
model.zero_grad()
before, started = mib("VmRSS"), time.perf_counter()
loss = target_nll(model, batch, chunk_size)
loss.backward()
seconds = time.perf_counter() - started
norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
print(mib("VmHWM") - before, seconds, loss.item(), norm.item())
"""


def measure(chunk: str) -> dict[str, float]:
    """One step in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", STEP, chunk],
        cwd=Path(__file__).parent.parent,
        # glibc keeps freed blocks below 32 MiB in its heap, which would be measured as well
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"},
        capture_output=True,
        text=True,
        check=True,
    )
    memory, seconds, loss, norm = (float(word) for word in result.stdout.split())
    return {
        "peak MiB above the start": round(memory),
        "seconds": round(seconds, 2),
        "loss": round(loss / TARGETS, 6),
        "gradient norm": round(norm, 4),
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """The figures for people."""
    names = list(next(iter(rows.values())))
    lines = [f"{'chunk':>6}  " + "  ".join(names)]
    for chunk, row in rows.items():
        lines.append(f"{chunk:>6}  " + "  ".join(f"{row[name]:>{len(name)}}" for name in names))
    return "\n".join(lines)


if __name__ == "__main__":
    found = {chunk: measure(chunk) for chunk in CHUNKS}
    print(table(found))
    record(
        "chunked_cross_entropy",
        {"vocabulary": VOCABULARY, "target tokens": TARGETS, "by chunk size": found},
    )
