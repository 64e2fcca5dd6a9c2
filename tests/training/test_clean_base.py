"""The warm base is the same for every trial: proven after each, and over many."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager

from sweeper.config.settings import ModelSettings, QuantizationSettings
from sweeper.modeling.base_model import LoadedBase, load_base
from sweeper.modeling.checksum import changed, checksums
from sweeper.training import trial_runner as runner_module
from sweeper.training.arguments import module_restored
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.conftest import RunTiny


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_every_single_bit_counts(quantization: str, tiny_base: Path) -> None:
    """A flipped bit in any weight is found, however the weight is held; what is untouched is not."""
    settings = make_settings(f"model.base_model={tiny_base}", f"quantization={quantization}")
    model = load_base(settings.model, settings.quantization, trained=False).model
    before = checksums(model)
    assert changed(before, model) == []
    for name, weight in model.named_parameters():
        raw = weight.data.view(torch.uint8).reshape(-1)
        raw[len(raw) // 2] ^= 4
        assert changed(before, model) == [name]
        raw[len(raw) // 2] ^= 4


def _plain(base: Path) -> tuple[ModelSettings, QuantizationSettings]:
    settings = make_settings(f"model.base_model={base}", "quantization=none")
    return settings.model, settings.quantization


def test_recomputed_activations_end_with_their_trial(run_tiny: RunTiny) -> None:
    """transformers only switches them on; the next trial on the warm base keeps its activations."""
    runner = TransformersRunner(threads=1)
    hooks = []
    for name, recompute in (("first", "true"), ("second", "false")):
        run_tiny(name, f"training.activation_checkpointing={recompute}", runner=runner)
        (base,) = runner._warm.values()
        assert not base.model.is_activation_checkpointing
        hooks.append(len(base.model.get_input_embeddings()._forward_hooks))
    assert hooks == [0, 0]


def test_changes_to_transformers_own_module_end_with_the_trial(tiny_base: Path) -> None:
    """As Liger makes them; models that are built afterwards are of the layers that they should be of."""
    model = load_base(*_plain(tiny_base), trained=False).model
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    with module_restored(model):
        module.LlamaRMSNorm = torch.nn.Identity  # type: ignore[attr-defined]
        module.more = 1  # type: ignore[attr-defined]
    assert vars(module) == before


def test_an_8_bit_optimizer_leaves_nothing_behind(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next trial's states are as wide as in a new process, and the trained model is freed."""
    loaded: list[weakref.ref[torch.nn.Module]] = []

    def watching(*arguments: Any, **options: Any) -> LoadedBase:
        base = load_base(*arguments, **options)
        loaded.append(weakref.ref(base.model))
        return base

    monkeypatch.setattr(runner_module, "load_base", watching)
    runner = TransformersRunner(threads=1)
    run_tiny("t", "adapter=none", "training.optim=adamw_8bit", runner=runner)
    gc.collect()
    assert loaded
    assert [model() for model in loaded] == [None] * len(loaded)
    assert GlobalOptimManager.get_instance().index2config == {}


def test_a_uniform_change_is_found() -> None:
    """Weights that are all equal, as a fresh norm's, and are all changed alike."""
    model = torch.nn.LayerNorm(32)
    before = checksums(model)
    with torch.no_grad():
        model.weight.mul_(0.99)
    assert changed(before, model) == ["weight"]


def test_a_trial_that_changes_its_base_fails_and_the_next_one_starts_clean(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result does not stand and says why; the next trial gets what it would have got anyway."""
    runner = TransformersRunner(threads=1)
    first, _, _ = run_tiny("first", runner=runner)
    train = runner_module.train_trial

    def spoiling(inputs, *arguments):  # type: ignore[no-untyped-def]
        outcome = train(inputs, *arguments)
        with torch.no_grad():
            inputs.model.get_base_model().model.norm.weight.add_(0.1)
        return outcome

    monkeypatch.setattr(runner_module, "train_trial", spoiling)
    spoilt, _, folder = run_tiny("spoilt", runner=runner)
    assert spoilt.cause == "error"
    assert spoilt.best_value is None
    assert "model.norm.weight" in str(spoilt.message)
    assert "its result is invalid" in folder.outcome.read_text(encoding="utf-8")
    monkeypatch.undo()
    again, _, _ = run_tiny("again", runner=runner)
    assert again.best_value == first.best_value


FEW, MANY, ALLOWED_MIB = 20, 200, 24
SCRIPT = f"""
import sys
from pathlib import Path
import psutil
from sweeper.core.paths import TrialFolder
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.recorder import Recorder

base, rows, out = sys.argv[1:]
runner = TransformersRunner(threads=1)
for number in range({MANY}):
    rank = (2, 4, 8)[number % 3]
    settings = make_settings(
        f"model.base_model={{base}}", f"data.train={{rows}}", "quantization=nf4", f"adapter.r={{rank}}",
        "training.max_steps=2", "training.eval_steps=2", f"training.learning_rate={{1e-3 * rank}}",
    ).trial
    outcome = runner.run(settings, TrialFolder(Path(out) / str(number)), {{}}, Recorder())
    assert outcome.cause == "finished", outcome
    if number + 1 in ({FEW}, {MANY}):
        print(psutil.Process().memory_info().rss / 2**20, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_over_two_hundred_trials(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The real runner on one warm NF4 base: resident memory after 200 trials is that after 20."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_base), str(rows_file), str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    early, late = map(float, run.stdout.split())
    assert late - early < ALLOWED_MIB, (
        f"{early:.0f} MiB after {FEW}, {late:.0f} after {MANY} trials"
    )
