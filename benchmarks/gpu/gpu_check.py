"""Run the parts of the kit, in the order of their worth, each in a process of its own with a time limit.

Each result is written to $OUT/results.json as soon as a part has it.

    python gpu_check.py run [--cpu] [--budget S] [--only a,b] [--from a]     all parts
    python gpu_check.py part NAME [--cpu]                                    one, JSON lines on stdout
--cpu: the same code on a small shape, to rehearse the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OUT = Path(os.environ.get("OUT", "gpu_out"))
WORK = Path(os.environ.get("GPU_WORK", "gpu_work"))
CPU = "--cpu" in sys.argv
MARK = "RESULT "
NEEDS_GPU = "needs a GPU"
SLOWER_ON_CPUS = 8
LEAST_SECONDS = 15
"""Seconds of the budget below which no further part is started."""
SHAPES = {  # Qwen3's family: hidden, layers, heads, kv heads, head_dim, intermediate, vocabulary, tied
    "q06": (1024, 28, 16, 8, 128, 3072, 151936, True),
    "q17": (2048, 28, 16, 8, 128, 6144, 151936, True),
    "q8": (4096, 36, 32, 8, 128, 12288, 151936, False),
}
if CPU:
    SHAPES = {name: (64, 2, 4, 2, 16, 128, 4096, name != "q8") for name in SHAPES}
PARTS = [  # name, seconds it may take (a limit, about twice what is expected)
    ("env", 60),
    ("models", 60),
    ("smoke", 150),
    ("estimate", 120),
    ("resume", 90),
    ("oom", 100),
    ("sticky", 40),
    ("syncs", 40),
    ("invariance", 40),
    ("sidebyside", 90),
    ("study", 150),
    ("optimizers", 40),
    ("leak", 60),
    ("generate", 40),
    ("bnb_exit", 30),
    ("padding", 60),
    ("eight_b", 90),
    ("caps", 90),
    ("packed", 120),
]


FAILING_PARTS = ("oom", "sticky", "bnb_exit")
"""Parts that provoke failures: how their trials end is their result."""


def unproven(name: str, entry: dict) -> list[str]:
    """Return what a part did not prove. A part exits with 0 also where a trial inside it has failed."""
    found = [] if entry else ["the part has no result"]
    for key, value in entry.items():
        found += _unproven_at(key, value, name in FAILING_PARTS)
    return found


def _unproven_at(place: str, value: object, may_fail: bool) -> list[str]:
    if isinstance(value, list):
        parts = [(f"{place}[{number}]", each) for number, each in enumerate(value)]
    elif isinstance(value, dict):
        parts = [(f"{place}.{key}", each) for key, each in value.items()]
    else:
        key = place.rsplit(".", 1)[-1]
        failed = (key == "cause" and value != "finished") or (key in ("rc", "_rc") and value != 0)
        differs = key == "same_bits" and value is not True
        return [f"{place} is {value}"] if differs or (failed and not may_fail) else []
    return [problem for at, each in parts for problem in _unproven_at(at, each, may_fail)]


def say(name: str, value: object) -> None:
    """Print a result without the paths of this machine."""
    text = json.dumps({name: value}, default=str)
    folders = {"SITE": os.environ.get("SITE"), "WORK": str(WORK.resolve()), "PYTHON": sys.prefix}
    for symbol, folder in (folders | {"PROJECT": str(Path.cwd())}).items():
        text = text.replace(folder, symbol) if folder else text
    print(MARK + text, flush=True)


def last_words(process: subprocess.CompletedProcess) -> str:
    """Return the end of what a process printed, its errors only if it failed."""
    return process.stdout[-200:] + (process.stderr[-400:] if process.returncode else "")


# ---------------------------------------------------------------- helpers inside a part
class Observer:
    def __init__(self, die_at=None, stop_at=None):
        self.die_at, self.stop_at, self.step, self.values = die_at, stop_at, 0, []

    def progress(self, step, total_steps, tokens_per_second):
        self.step = step

    def evaluated(self, step, total_steps, value):
        self.values.append((step, value))
        self.step = step
        if self.die_at is not None and step >= self.die_at:
            time.sleep(0.3)
            self._armed = True

    def stop_cause(self):
        return None


def torch_():
    import torch

    return torch


def model_folder(name: str) -> Path:
    return WORK / "models" / name


def settings_of(name: str, *overrides: str):
    from sweeper.search.study_plan import single

    small = [
        "training.max_steps=6",
        "training.eval_steps=3",
        "training.logging_steps=1",
        "training.warmup_steps=1",
        "evaluation.look_rows=64",
        "evaluation.generation.num_examples=0",
        "evaluation.prompts=[]",
        "training.early_stopping_patience=null",
        "training.divergence_threshold=null",
        "space=tiny",
        "training=real",
        "evaluation=real",
        "tracking=none",
        "data.validation_ratio=0.05",
        "data.test_ratio=0.05",
    ]
    if CPU:
        small += ["data.max_samples=80", "training.per_device_train_batch_size=4"]
    return single([f"model.base_model={model_folder(name)}", *small, *overrides])


def runner():
    from sweeper.training.trial_runner import TransformersRunner

    return TransformersRunner(threads=8 if not CPU else 1)


def memory():
    torch = torch_()
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_mib": torch.cuda.memory_allocated() / 2**20,
        "reserved_mib": torch.cuda.memory_reserved() / 2**20,
        "max_allocated_mib": torch.cuda.max_memory_allocated() / 2**20,
        "max_reserved_mib": torch.cuda.max_memory_reserved() / 2**20,
        "used_mib": (total - free) / 2**20,
    }


def trial(run, label: str, settings, folder: Path | None = None, observer=None):
    """Run one trial through the worker's own runner, and return every fact that CUDA decides."""
    from sweeper.core.paths import TrialFolder

    torch = torch_()
    place = folder or WORK / "trials" / label
    if folder is None:
        shutil.rmtree(place, ignore_errors=True)
    began = time.time()
    result: dict = {"label": label}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with watched_training() as seen:
        try:
            inner = settings.trial if hasattr(settings, "trial") else settings
            result |= told(run.run(inner, TrialFolder(place), {}, observer or Observer()))
        except BaseException as error:
            text = "".join(traceback.format_exception(error))[-1500:]
            result |= {"cause": "EXCEPTION", "message": text}
    result |= seen | {"seconds": round(time.time() - began, 2), **memory()}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        result["left_mib"] = torch.cuda.memory_allocated() / 2**20
    return result


def told(outcome) -> dict:
    """Return what a trial's outcome says."""
    reported = ("cost/", "train/", "best/eval_loss")
    return {
        "cause": outcome.cause,
        "message": outcome.message,
        "best": outcome.best_value,
        "steps": outcome.steps,
        "metrics": {k: round(v, 4) for k, v in outcome.metrics.items() if k.startswith(reported)},
    }


@contextmanager
def watched_training() -> Iterator[dict]:
    """Yield what is filled with the dtypes and the attention of the model that is trained meanwhile."""
    import sweeper.training.trial_runner as module

    plain, seen = module.train_trial, {}

    def spy(inputs, *rest):
        weights = list(inputs.model.parameters())
        held: dict[str, float] = {}
        for weight in weights:
            if not weight.requires_grad:
                size = weight.numel() * weight.element_size() / 2**20
                held[str(weight.dtype)] = held.get(str(weight.dtype), 0) + size
        seen["adapter_dtypes"] = sorted({str(w.dtype) for w in weights if w.requires_grad})
        seen["frozen_mib"] = held
        seen["compute_dtype"] = str(inputs.compute_dtype)
        seen["attention"] = inputs.model.config._attn_implementation
        return plain(inputs, *rest)

    module.train_trial = spy
    try:
        yield seen
    finally:
        module.train_trial = plain


def rows(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def cli(*words: str, limit: int = 120, env: dict | None = None) -> dict:
    began = time.time()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sweeper", *words],
            capture_output=True,
            text=True,
            timeout=limit * (SLOWER_ON_CPUS if CPU else 1),
            env={**os.environ, **(env or {})},
        )
        code, text = done.returncode, (done.stdout + done.stderr)
    except subprocess.TimeoutExpired as error:
        code, text = 124, str(error.stdout)[-1500:] + str(error.stderr)[-1500:]
    return {"rc": code, "seconds": round(time.time() - began, 1), "tail": text[-1800:]}


# ---------------------------------------------------------------- the parts
def part_env():
    import importlib.metadata as md

    names = (
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "accelerate",
        "datasets",
        "numpy",
        "triton",
        "optuna",
        "mlflow",
        "pydantic",
        "liger-kernel",
        "flash-attn",
    )
    have = {
        (each.name or "").replace("_", "-").lower(): each.version for each in md.distributions()
    }
    say("versions", {name: have.get(name) for name in names})
    site = Path(os.environ.get("SITE", "")).resolve()
    places = [Path(str(found.locate_file(""))).resolve() for found in md.distributions()]
    carried = sum(place == site for place in places)
    say("distributions", {"carried": carried, "of_the_image": len(places) - carried})
    smi = shutil.which("nvidia-smi")
    if smi:
        say(
            "nvidia_smi",
            subprocess.run(
                [
                    smi,
                    "--query-gpu=index,name,driver_version,memory.total,memory.used,mig.mode.current,compute_mode",
                    "--format=csv",
                ],
                capture_output=True,
                text=True,
            ).stdout,
        )
    torch = torch_()
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        say("allocator", torch.cuda.memory._snapshot()["allocator_settings"])
    from sweeper.workers.devices import devices_of

    say("devices_of", {"1": devices_of(0, 1), "worker3": devices_of(3, 1)})
    done = subprocess.run(
        [sys.executable, "-m", "sweeper.modeling.device_check"],
        capture_output=True,
        text=True,
        timeout=300 if CPU else 55,
    )
    say("device_check", done.stdout[-800:] + done.stderr[-500:])


def part_models():
    torch = torch_()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from sweeper.builtin.embedded import BASE_DIR as tokenizer

    for name in ("q06", "q17"):
        folder = model_folder(name)
        if (folder / "config.json").exists():
            continue
        h, layers, heads, kv, hd, inter, vocab, tied = SHAPES[name]
        config = Qwen3Config(
            hidden_size=h,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=hd,
            intermediate_size=inter,
            vocab_size=vocab,
            tie_word_embeddings=tied,
            max_position_embeddings=4096,
            eos_token_id=0,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        began = time.time()
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            torch.set_default_dtype(torch.bfloat16)
            model = Qwen3ForCausalLM(config)
            torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / file, folder / file)
        say(name, {"parameters": model.num_parameters(), "seconds": round(time.time() - began, 1)})
        del model
        gc.collect()


SMOKE = {  # every CUDA path that no test has run
    "nf4_bf16_paged8": ["quantization=nf4", "training.optim=paged_adamw_8bit"],
    "nf4_fp16": ["quantization=nf4", "model.dtype=float16", "training.optim=adamw_8bit"],
    "nf4_recompute": ["quantization=nf4", "training.activation_checkpointing=true"],
    "bf16_lora_adamw": ["quantization=none", "training.optim=adamw_torch"],
    "fp16_lora": ["quantization=none", "model.dtype=float16", "training.optim=paged_adamw_8bit"],
    "int8": ["quantization=int8"],
    "fp4": ["quantization=fp4", "training.optim=paged_adamw_32bit"],
    "full_bf16_adamw": [
        "adapter=none",
        "quantization=none",
        "training.optim=adamw_torch",
        "training.learning_rate=1e-5",
    ],
    "full_bf16_paged8": [
        "adapter=none",
        "quantization=none",
        "training.optim=paged_adamw_8bit",
        "training.learning_rate=1e-5",
    ],
    "packing_sdpa": ["quantization=nf4", "data.packing=true"],
    "modules_to_save_bf16": ["quantization=none", "adapter.modules_to_save=[embed_tokens]"],
    "modules_to_save_fp16": [
        "quantization=none",
        "model.dtype=float16",
        "adapter.modules_to_save=[embed_tokens]",
    ],
    "dora": ["quantization=nf4", "adapter.use_dora=true"],
    "loraplus": ["quantization=nf4", "adapter.loraplus_lr_ratio=16"],
    "liger": ["quantization=nf4", "training.use_liger_kernel=true"],
    "flash_packing": [
        "quantization=nf4",
        "model.attn_implementation=flash_attention_2",
        "data.packing=true",
    ],
    "flash_full_packing": [
        "adapter=none",
        "quantization=none",
        "model.attn_implementation=flash_attention_2",
        "data.packing=true",
    ],
}


def part_smoke():
    run = runner()
    for label, overrides in SMOKE.items():
        if CPU and any(word in label for word in ("fp16", "liger", "flash")):
            say(label, NEEDS_GPU)
            continue
        try:
            settings = settings_of("q06", *overrides)
            began = time.time()
            facts = run.probe(settings.trial)
            probed = {
                "probe_seconds": round(time.time() - began, 2),
                "device": facts.device,
                "dtype": facts.dtype,
                "base_loss": facts.base_metrics.get("eval/loss"),
            }
            say(label, trial(run, label, settings) | probed)
        except BaseException as error:
            say(
                label, {"cause": "PROBE", "message": f"{type(error).__name__}: {str(error)[-900:]}"}
            )


ESTIMATE_LENGTH = 64 if CPU else 512
"""Tokens of the longest rows."""
SPACE = "\u0120"
"""The letter by which byte-level tokenizers write a space."""
ESTIMATE = [
    ("q06", "nf4", 4, "paged_adamw_8bit", False),
    ("q06", "nf4", 16, "paged_adamw_8bit", False),
    ("q06", "none", 8, "adamw_torch", False),
    ("q06", "nf4", 16, "adamw_8bit", True),
    ("q17", "nf4", 8, "adamw_8bit", False),
    ("q06", "full", 4, "adamw_torch", False),
]


def part_estimate():
    """Compare the estimate with the allocator's peak, for equal rows (no mask) and for padded ones."""
    for kind in ("equal", "padded"):
        write_rows(kind)
    run = runner()
    for case in ESTIMATE[: 2 if CPU else None]:
        for data in ("equal", "padded"):
            name, kind, batch, optim, recompute = case
            label = f"{name}_{kind}_b{batch}_{optim}_{'re' if recompute else 'keep'}_{data}"
            try:
                say(label, estimated_and_measured(run, label, case, data))
            except BaseException as error:
                text = f"{type(error).__name__}: {str(error)[-600:]}"
                say(label, {"cause": "EXCEPTION", "message": text})


def write_rows(kind: str) -> None:
    """Write rows of one length in tokens, or rows of which every second is short."""
    from transformers import AutoTokenizer

    known = AutoTokenizer.from_pretrained(model_folder("q06")).get_vocab()
    # a word with its space is one token of the vocabulary, so a row has as many tokens as words
    words = sorted(w[1:] for w in known if w[0] == SPACE and w[1:].isascii() and w[1:].isalpha())
    file = WORK / "data" / f"{kind}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    long = ESTIMATE_LENGTH - 8
    with file.open("w") as out:
        for index in range(160):
            count = long if kind == "equal" or index % 2 else long // 4
            chosen = [words[(index * 131 + k * 17) % len(words)] for k in range(count)]
            text = " ".join(["the", *chosen])  # no space precedes the first word
            out.write(json.dumps({"text": text}) + "\n")


def estimated_and_measured(run, label, case, data) -> dict:
    """Train a few steps of a case, and return its peak and the estimate."""
    from sweeper.modeling.hardware import device
    from sweeper.modeling.memory_estimate import estimate_trial

    name, kind, batch, optim, recompute = case
    length = ESTIMATE_LENGTH
    full = ["adapter=none", "quantization=none"]
    settings = settings_of(
        name,
        *(full if kind == "full" else [f"quantization={kind}"]),
        f"data.train={WORK / 'data' / data}.jsonl",
        "data.train_on=everything",
        f"data.max_length={length}",
        f"training.per_device_train_batch_size={batch}",
        "training.gradient_accumulation_steps=1",
        f"training.optim={optim}",
        f"training.activation_checkpointing={str(recompute).lower()}",
        "training.micro_batch=as_given",
        "training.max_steps=3",
        "data.max_samples=null",
        "evaluation.per_device_eval_batch_size=2",
    )
    run.probe(settings.trial)
    got = trial(run, label, settings)
    costs = got.get("metrics", {})
    peak = costs.get("cost/peak_memory_mib")
    got["estimate_mib"] = estimate_trial(settings.trial, device(), length=length).total
    got["measured_over_estimate"] = peak and round(peak / got["estimate_mib"], 3)
    got["own_estimate_mib"] = costs.get("cost/estimated_memory_mib")
    return got


RESUMED = [
    "quantization=nf4",
    "training.max_steps=12",
    "training.eval_steps=4",
    "training.optim=paged_adamw_8bit",
]
ONE_TRIAL = """
import sys
from pathlib import Path
sys.argv += ["--cpu"] if {cpu} else []
sys.path.insert(0, {kit!r})
import gpu_check as kit
settings = kit.settings_of("q06", *{overrides!r})
print(kit.trial(kit.runner(), "x", settings, Path({place!r}))["cause"])
"""


def part_resume():
    """Kill a trial after a checkpoint, run its folder again, and compare with an unbroken run."""
    whole, broken, again = (WORK / "trials" / name for name in ("whole", "broken", "again"))
    for place in (whole, broken, again):
        shutil.rmtree(place, ignore_errors=True)
    first = subprocess.run(one_trial(whole), capture_output=True, text=True)
    killed = kill_between_checkpoints(broken)
    second = subprocess.run(one_trial(broken), capture_output=True, text=True)
    log = broken / "training_log.txt"
    say(
        "resume",
        {
            "killed_at_row": killed,
            "first": last_words(first),
            "second": last_words(second),
            "log": log.read_text()[:700] if log.exists() else None,
            **compared(whole, broken),
        },
    )
    subprocess.run(one_trial(again), capture_output=True, text=True)
    say("repeat", compared(whole, again))


def one_trial(place: Path) -> list[str]:
    """Return the command that trains the trial of a folder in a process of its own."""
    kit = str(Path(__file__).parent)
    code = ONE_TRIAL.format(cpu=CPU, kit=kit, overrides=RESUMED, place=str(place))
    return [sys.executable, "-c", code]


def kill_between_checkpoints(place: Path) -> int:
    """Kill a trial after its checkpoint of step 4 and before that of step 8, and return its last step."""
    process = subprocess.Popen(
        one_trial(place), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + (500 if CPU else 60)
    while time.time() < deadline and process.poll() is None:
        if any(row["step"] >= 6 for row in rows(place)):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return max((row["step"] for row in rows(place)), default=0)


def compared(first: Path, second: Path) -> dict:
    """Return whether the losses of two trials have the same bits, and how much they differ."""
    a, b = losses(first), losses(second)
    return {
        "same_bits": bool(a) and a == b,
        "max_difference": max((abs(a[k] - b[k]) for k in a.keys() & b.keys()), default=None),
        "rows": [len(a), len(b)],
    }


def losses(place: Path) -> dict:
    """Return the losses of a trial by step and name."""
    named = ("train/loss", "eval/loss")
    return {(row["step"], key): row[key] for row in rows(place) for key in named if key in row}


HOG = """
import time, torch
free, total = torch.cuda.mem_get_info()
held = torch.empty(int(free - 2.6 * 2**30), dtype=torch.uint8, device="cuda")
print("held", flush=True)
time.sleep(90)
"""


def part_oom():
    """Run out of memory: in this process, whose allocator is capped, and beside one that holds memory."""
    if CPU:
        say("oom", NEEDS_GPU)
        return
    torch, run = torch_(), runner()
    settings = settings_of(
        "q06",
        "quantization=nf4",
        "training.optim=adamw_8bit",
        "training.per_device_train_batch_size=16",
        "training.gradient_accumulation_steps=1",
        "training.micro_batch=as_given",
        "training.activation_checkpointing=false",
        "training.loss_chunk_size=null",
    )
    run.probe(settings.trial)
    total = torch.cuda.get_device_properties(0).total_memory
    base = torch.cuda.memory_allocated()
    for name, mib in (("halves", 2500), ("infeasible", 60)):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (base + mib * 2**20) / total))
        got = trial(run, f"oom_{name}", settings)
        say(name, {k: got.get(k) for k in ("cause", "message", "seconds", "left_mib", "metrics")})
    torch.cuda.set_per_process_memory_fraction(1.0)
    got = trial(run, "oom_after", settings_of("q06", "quantization=nf4"))
    say("after", {k: got.get(k) for k in ("cause", "message", "best", "left_mib")})
    hog = subprocess.Popen([sys.executable, "-c", HOG], stdout=subprocess.PIPE, text=True)
    hog.stdout.readline()
    try:
        say("study_beside_a_hog", study_in_little_memory())
    finally:
        hog.kill()


def study_in_little_memory() -> dict:
    """Run a study whose trials ask for more memory than another process has left."""
    return cli(
        "+experiment=lr_rank_sweep",
        f"model.base_model={model_folder('q06')}",
        "hydra.sweeper.study_name=oom",
        f"output_dir={WORK}/outputs",
        "tracking=none",
        "~hydra.sweeper.arms.full",
        "hydra.sweeper.finalists.top=0",
        "hydra.sweeper.n_trials=2",
        "training.max_steps=3",
        "training.per_device_train_batch_size=16",
        "training.optim=adamw_8bit",
        "evaluation.look_rows=16",
        "evaluation.generation.num_examples=0",
        "evaluation.prompts=[]",
        "-m",
        limit=80,
    )


def part_sticky():
    """A CUDA error that poisons the process: what the runner raises, and whether the next trial works."""
    torch = torch_()
    if CPU:
        say("sticky", NEEDS_GPU)
        return
    run = runner()
    settings = settings_of("q06", "quantization=nf4", "training.max_steps=2")
    run.probe(settings.trial)
    try:
        torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")].sum().item()
    except BaseException as error:
        say("assert", f"{type(error).__mro__[:3]}: {str(error)[:300]}")
    for index in range(2):
        got = trial(run, f"sticky_{index}", settings) if index == 0 else None
        try:
            if got is None:
                run.probe(settings.trial)
                got = {"cause": "works"}
        except BaseException as error:
            got = {"cause": "EXCEPTION", "message": f"{type(error).__name__}: {str(error)[:300]}"}
        say(f"trial_{index}", {k: got.get(k) for k in ("cause", "message")})


def part_syncs():
    """Host-device synchronisations per optimiser step."""
    torch = torch_()
    import collections

    settings = settings_of(
        "q06",
        "quantization=nf4",
        "training.max_steps=6",
        "training.eval_steps=6",
        "training.logging_steps=6",
        "training.gradient_accumulation_steps=1",
    )
    run = runner()
    run.probe(settings.trial)
    found: collections.Counter = collections.Counter()

    def show(message, category, filename, lineno, file=None, line=None):
        found[f"{filename.split('site')[-1]}:{lineno}"] += 1

    from sweeper.training.trainer import JudgedTrainer

    plain = JudgedTrainer.training_step

    def step(self, *a, **k):
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            return plain(self, *a, **k)
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")

    JudgedTrainer.training_step = step
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        got = trial(run, "syncs", settings)
    say(
        "syncs",
        {
            "cause": got["cause"],
            "steps": got.get("steps"),
            "in_training_step": dict(found.most_common(25)),
            "message": got.get("message"),
        },
    )


def part_invariance():
    """The same loss for every evaluation batch size, in bf16?"""
    run = runner()
    values = {}
    for size in (1, 4, 32):
        settings = settings_of(
            "q06",
            "quantization=nf4",
            "evaluation.look_rows=64",
            f"evaluation.per_device_eval_batch_size={size}",
            "model.dtype=bfloat16",
        )
        values[size] = run.probe(settings.trial).base_metrics["eval/loss"]
    say(
        "eval_loss_by_batch_size",
        {"values": values, "spread": max(values.values()) - min(values.values())},
    )


def part_sidebyside():
    """Compare tokens per second with transformers.Trainer and PEFT by hand, on the same rows."""
    steps, batch = (4, 4) if CPU else (30, 16)
    settings = settings_of(
        "q06",
        "quantization=nf4",
        f"training.max_steps={steps}",
        f"training.eval_steps={steps}",
        f"training.per_device_train_batch_size={batch}",
        "training.gradient_accumulation_steps=1",
        "training.micro_batch=as_given",
        "training.activation_checkpointing=false",
        "training.optim=adamw_8bit",
        "adapter.r=16",
    )
    run = runner()
    run.probe(settings.trial)
    for turn in range(2):
        got = trial(run, f"ours_{turn}", settings)
        costs = got.get("metrics", {})
        figures = {
            name: costs.get(f"cost/{name}")
            for name in ("tokens_per_second", "train_seconds", "peak_memory_mib")
        }
        say(f"sweeper_{turn}", {k: got.get(k) for k in ("cause", "message")} | figures)
    encoded = next(iter(run._prepared.values())).train.rows
    run._warm.clear()
    gc.collect()
    model = model_by_hand()
    for turn in range(2):
        say(f"by_hand_{turn}", trained_by_hand(model, encoded, steps, batch))


def model_by_hand():
    """Return the model as the documentation of PEFT makes it for QLoRA."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch = torch_()
    on = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if on == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        model_folder("q06"),
        dtype=dtype,
        device_map={"": on},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    return get_peft_model(
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False),
        LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )


def padded(batch_rows):
    """Return a batch of rows, each filled to the length of the longest."""
    torch = torch_()
    longest = max(len(row["input_ids"]) for row in batch_rows)
    shown = [[1] * len(row["input_ids"]) for row in batch_rows]

    def fill(values, value):
        return torch.tensor([list(each) + [value] * (longest - len(each)) for each in values])

    return {
        "input_ids": fill([row["input_ids"] for row in batch_rows], 0),
        "labels": fill([row["labels"] for row in batch_rows], -100),
        "attention_mask": fill(shown, 0),
    }


def trained_by_hand(model, encoded, steps: int, batch: int) -> dict:
    """Train with transformers.Trainer, and return tokens per second."""
    from transformers import Trainer, TrainingArguments

    torch, seen = torch_(), [0]
    cuda = torch.cuda.is_available()

    def counted(batch_rows):
        made = padded(batch_rows)
        seen[0] += int(made["attention_mask"].sum())
        return made

    arguments = TrainingArguments(
        output_dir=str(WORK / "hand"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=2e-4,
        bf16=cuda,
        optim="adamw_8bit" if cuda else "adamw_torch",
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not cuda,
    )
    data = [{k: encoded[i][k] for k in ("input_ids", "labels")} for i in range(len(encoded))]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.time()
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=counted).train()
    if cuda:
        torch.cuda.synchronize()
    took = time.time() - began
    return {"tokens_per_second": round(seen[0] / took), "seconds": round(took, 2), **memory()}


def part_study():
    got = cli(
        "+experiment=lr_rank_sweep",
        "hydra.sweeper.study_name=gpu",
        f"output_dir={WORK}/outputs",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.arms.full.n_trials=2",
        "hydra.sweeper.finalists.top=1",
        "hydra.sweeper.finalists.seeds=2",
        *(["training.max_steps=4", "tracking=none"] if CPU else []),
        "-m",
        limit=140,
    )
    say("study", got)
    say("report", cli("report", "gpu", limit=40) if got["rc"] == 0 and not CPU else "not asked")


def part_leak():
    """Several trials in a warm worker: what stays allocated, and what the process holds outside the allocator."""
    run = runner()
    lost = []
    settings = settings_of(
        "q06",
        "quantization=nf4",
        "training.optim=paged_adamw_8bit",
        "adapter.r=64",
        "training.max_steps=2",
    )
    run.probe(settings.trial)
    for index in range(2 if CPU else 5):
        got = trial(run, f"leak_{index}", settings)
        lost.append(
            {k: got.get(k) for k in ("cause", "left_mib", "reserved_mib", "used_mib", "seconds")}
            | {"lost_bytes": run._unfreeable_bytes}
        )
    say("leak", lost)


def part_generate():
    torch_()
    from sweeper.evaluation.generation import generate

    settings = settings_of("q06", "quantization=nf4").trial
    run = runner()
    base = run._base(settings)
    for size in (1, 8, 32):
        answers = generate(
            base.model,
            base.tokenizer,
            [[5, 6, 7, 8, 9, 10, 11, 12]] * size,
            8 if CPU else 64,
            size,
            base.compute_dtype,
        )
        say(
            f"batch_{size}",
            {
                "tokens_per_second": round(answers.tokens_per_second, 1),
                "seconds": round(answers.seconds, 2),
            },
        )


def part_bnb_exit():
    """bitsandbytes ends the process where the runtime refuses a call: a prefetch of plain memory, which is refused at once."""
    code = (
        "import ctypes as ct, torch, bitsandbytes as b; from bitsandbytes.cextension import lib; x = torch.zeros(4096, device='cuda')\n"
        "try:\n  lib.cprefetch(ct.c_void_p(x.data_ptr()), ct.c_size_t(x.nbytes), ct.c_int32(0)); torch.cuda.synchronize(); print('returned')\nexcept BaseException as e: print('raised', type(e), e)"
    )
    if CPU:
        say("bnb_exit", NEEDS_GPU)
        return
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    say("bnb_exit", {"rc": done.returncode, "out": done.stdout[-300:], "err": done.stderr[-400:]})


def part_optimizers():
    """Milliseconds of one optimiser step over a LoRA adapter's tensors (r=16, all-linear, Qwen3-0.6B: 392 small ones)."""
    torch = torch_()
    import bitsandbytes as bnb

    on = "cuda" if torch.cuda.is_available() else "cpu"
    h, layers, heads, kv, hd, inter, *_ = SHAPES["q06"]
    pairs = [
        (h, heads * hd),
        (h, kv * hd),
        (h, kv * hd),
        (heads * hd, h),
        (h, inter),
        (h, inter),
        (inter, h),
    ]
    kinds = {
        "adamw_torch": lambda p: torch.optim.AdamW(p, lr=1e-4),
        "adamw_torch_fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
        "adamw_8bit": lambda p: bnb.optim.AdamW8bit(p, lr=1e-4),
        "paged_adamw_8bit": lambda p: bnb.optim.PagedAdamW8bit(p, lr=1e-4),
        "paged_adamw_32bit": lambda p: bnb.optim.PagedAdamW32bit(p, lr=1e-4),
    }
    for name, make in kinds.items():
        parameters = [
            torch.nn.Parameter(torch.randn(*shape, device=on))
            for _ in range(layers)
            for i, o in pairs
            for shape in ((16, i), (o, 16))
        ]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        before = torch.cuda.memory_allocated() if on == "cuda" else 0
        optimizer = make(parameters)

        def timed(count):
            began = time.time()
            for _ in range(count):
                optimizer.step()
            if on == "cuda":
                torch.cuda.synchronize()
            return (time.time() - began) / count * 1000

        timed(3)
        say(
            name,
            {
                "ms": round(sorted(timed(5 if CPU else 20) for _ in range(3))[1], 3),
                "tensors": len(parameters),
                "states_mib": round(
                    ((torch.cuda.memory_allocated() - before) if on == "cuda" else 0) / 2**20, 1
                ),
            },
        )


def part_eight_b():
    """An 8B shape in NF4, built in pieces: memory, speed, and tensors that a paged optimizer pages."""
    larger_part("eight_b", SHAPES)


def part_caps():
    """What fits into 8, 12, 16 and 24 GiB."""
    larger_part("caps", SHAPES)


def part_padding():
    """Batches without padding against padded ones, and varlen kernels where there are any."""
    larger_part("padding", str(model_folder("q06")))


def part_packed():
    """The rows of K trials in one batch through K adapters, against one trial after the other."""
    larger_part("packed", SHAPES)


def larger_part(name, given):
    """Report what a part of larger_parts.py yields."""
    import larger_parts

    for key, value in getattr(larger_parts, name)(given, CPU):
        say(key, value)


# ---------------------------------------------------------------- the outer loop
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("name", nargs="?")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--budget", type=float, default=540)
    parser.add_argument("--began", type=float, default=time.time())
    parser.add_argument("--only", default="")
    parser.add_argument("--from", dest="first", default="")
    got = parser.parse_args()
    for folder in (OUT, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    if got.what == "part":
        globals()[f"part_{got.name}"]()
        return
    names = [name for name, _ in PARTS]
    chosen = got.only.split(",") if got.only else names[names.index(got.first or names[0]) :]
    file = OUT / "results.json"
    document = json.loads(file.read_text()) if file.exists() else origin()
    for name, limit in PARTS:
        left = got.budget - (time.time() - got.began)
        if name not in chosen:
            continue
        if left < LEAST_SECONDS:
            document["figures"][name] = {"_skipped": "the budget is used up"}
        else:
            run_part(name, min(limit * (SLOWER_ON_CPUS if CPU else 1), left), document, file)
    file.write_text(json.dumps(document, indent=1))
    sys.exit(any(document["figures"][name].get("_unproven") for name in chosen))


def origin():
    """Return the head of a document in the benchmarks' format."""
    import platform
    from datetime import UTC, datetime
    from importlib import metadata

    from sweeper.tracking.provenance import provenance

    found = provenance("")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": found.get("git.commit", ""),
        "machine": found["machine"] + (", rehearsed on CPUs" if CPU else ""),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "figures": {},
    }


def run_part(name, limit_s, document, file):
    """Run one part in a process of its own, and store each of its results as it comes."""
    began, log = time.time(), OUT / "log.txt"
    entry = document["figures"][name] = {}
    with log.open("a") as out:
        out.write(f"=== {name}\n")
        out.flush()
        process = subprocess.Popen(
            [sys.executable, __file__, "part", name, *(["--cpu"] if CPU else [])],
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
            start_new_session=True,
        )
        killer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        for line in process.stdout:
            if line.startswith(MARK):
                entry.update(json.loads(line[len(MARK) :]))
                file.write_text(json.dumps(document, indent=1))
            else:
                out.write(line)
        code = process.wait()
        killer.cancel()
    entry["_rc"] = code
    problems = unproven(name, entry if len(entry) > 1 else {})
    entry["_seconds"], entry["_unproven"] = round(time.time() - began, 1), problems
    entry["_load"] = round(os.getloadavg()[0], 1)
    file.write_text(json.dumps(document, indent=1))
    tail = log.read_text()[-500:].replace("\n", " | ") if code else ""
    print(f"{name}: rc {code}, {entry['_seconds']} s, {len(entry) - 4} results {tail}", flush=True)
    for problem in problems:
        print(f"  NOT PROVEN: {problem}", flush=True)


if __name__ == "__main__":
    main()
