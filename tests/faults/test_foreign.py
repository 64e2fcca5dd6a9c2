"""S6: weights, adapters and checkpoints of others are data: nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from sweeper.commands.generate import find_adapter
from sweeper.core.errors import ArtifactError, ModelError
from sweeper.core.manifest import write_manifest
from sweeper.core.paths import TrialFolder
from sweeper.modeling.base_model import load_base
from sweeper.modeling.merge import merge
from sweeper.training.checkpoint import newest_checkpoint
from tests.conftest import make_settings
from tests.training.conftest import RunTiny
from tests.training.conftest import run_tiny as run_tiny
from tests.training.conftest import run_tiny_at as run_tiny_at
from tests.training.conftest import warm_runner as warm_runner
from tests.training.recorder import Recorder


class Payload:
    """Leaves a trace if anybody unpickles it."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._trace}",)


def _poison(path: Path, trace: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(trace)))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A file that exists if foreign code ran; its absence means something only if it can come."""
    trace = tmp_path / "executed"
    _poison(tmp_path / "proof.bin", trace)
    pickle.loads((tmp_path / "proof.bin").read_bytes())  # noqa: S301 - the payload works
    assert trace.exists()
    trace.unlink()
    return trace


def _copied(tiny_base: Path, to: Path) -> Path:
    return Path(shutil.copytree(tiny_base, to))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused_unread(
    tiny_base: Path, tmp_path: Path, trace: Path, name: str
) -> None:
    """A base without safetensors is no base; what lies beside them is not looked at."""
    base = _copied(tiny_base, tmp_path / "base")
    _poison(base / name, trace)
    settings = make_settings(f"model.base_model={base}", "quantization=none").trial
    load_base(settings.model, settings.quantization, trained=False)
    (base / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"no \*\.safetensors weights .*Other formats can run code"
    ):
        load_base(settings.model, settings.quantization, trained=False)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_not_run(
    tiny_base: Path, tmp_path: Path, trace: Path, kind: str
) -> None:
    """auto_map names Python files in the model's folder: a message, no question at the terminal."""
    base = _copied(tiny_base, tmp_path / "base")
    (base / "foreign.py").write_text(f"import os\nos.system('touch {trace}')\nclass Foreign: ...\n")
    config = json.loads((base / kind).read_text())
    if kind == "config.json":
        config |= {"model_type": "foreign", "architectures": ["Foreign"]}
        config["auto_map"] = dict.fromkeys(
            ("AutoConfig", "AutoModelForCausalLM"), "foreign.Foreign"
        )
    else:
        config |= {"tokenizer_class": "Foreign"}
        config["auto_map"] = {"AutoTokenizer": ["foreign.Foreign", "foreign.Foreign"]}
    (base / kind).write_text(json.dumps(config))
    settings = make_settings(f"model.base_model={base}", "quantization=none").trial
    with pytest.raises(ModelError, match=r"model\.base_model="):
        load_base(settings.model, settings.quantization, trained=False)
    assert not trace.exists()


def test_an_adapter_is_read_only_as_it_was_stored(
    run_tiny: RunTiny, tiny_base: Path, tmp_path: Path, trace: Path
) -> None:
    """A flipped byte, which safetensors loads without a word, a pickle in its place: both refused."""
    _, _, folder = run_tiny("trial")
    weights = folder.adapter / "adapter_model.safetensors"
    stored = weights.read_bytes()
    assert find_adapter(folder.path).path == folder.adapter
    weights.write_bytes(stored[:-1] + bytes([stored[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors: changed"):
        find_adapter(folder.path)
    weights.unlink()
    _poison(folder.adapter / "adapter_model.bin", trace)
    for read in (
        lambda: find_adapter(folder.path),
        lambda: merge(tiny_base, folder.adapter, tmp_path / "merged", "float32"),
    ):
        with pytest.raises(ModelError, match=r"no \*\.safetensors weights"):
            read()
    assert not trace.exists()


class Killed(BaseException):
    """Ends an attempt as SIGKILL does: its checkpoints stay."""


class Killer(Recorder):
    """Kills at the second evaluation, after the first checkpoint."""

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        if step >= 4:
            raise Killed


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_of_somebody_else_runs_no_code(
    run_tiny: RunTiny, trace: Path, name: str
) -> None:
    """A pickle in a checkpoint, though its manifest was written anew: refused by what loads it."""
    with pytest.raises(Killed):
        run_tiny("trial", observer=Killer())
    checkpoint = newest_checkpoint(TrialFolder(trace.parent / "trial").checkpoints)
    assert checkpoint is not None
    assert (checkpoint.path / name).exists()
    _poison(checkpoint.path / name, trace)
    write_manifest(checkpoint.path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        run_tiny("trial")
    assert not trace.exists()


CONTRADICTIONS = {
    "config.json": (
        *("[]", "null", "5", "", "[" * 10_000 + "]" * 10_000, '{"a":' * 5_000 + "1" + "}" * 5_000),
        *({"hidden_size": 64}, {"hidden_size": -4}, {"hidden_size": "x"}, {"vocab_size": 10**12}),
        *({"num_attention_heads": 0}, {"num_attention_heads": 3}, {"num_hidden_layers": 4}),
        *({"model_type": ["llama"]}, {"dtype": "evil"}, {"quantization_config": [1]}),
        *({"hidden_act": "nope"}, {"rope_parameters": "x"}, {"num_key_value_heads": 7}),
    ),
    "tokenizer_config.json": ("[]", "5", "[" * 10_000 + "]" * 10_000),
    "tokenizer.json": ("[]", "{}", "", "[" * 10_000 + "]" * 10_000),
    "generation_config.json": ("[]", "5"),
    "model.safetensors": ("", "x" * 100, "\x08\0\0\0\0\0\0\0{}      "),
}
CASES = [(name, number) for name, found in CONTRADICTIONS.items() for number in range(len(found))]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(name, number, marks=() if (name, number) in CASES[:7] else pytest.mark.slow)
        for name, number in CASES
    ],
)
def test_a_model_that_contradicts_itself_is_a_sentence(
    name: str, number: int, tiny_base: Path, tmp_path: Path
) -> None:
    """A list or a nest instead of a configuration, shapes that are not those of the weights."""
    base = _copied(tiny_base, tmp_path / "base")
    content = CONTRADICTIONS[name][number]
    if isinstance(content, dict):
        content = json.dumps({**json.loads((base / name).read_text()), **content})
    (base / name).write_text(content)
    settings = make_settings(f"model.base_model={base}", "quantization=none").trial
    with pytest.raises(ModelError, match=r"model\.base_model=") as caught:
        load_base(settings.model, settings.quantization, trained=False)
    assert len(str(caught.value).splitlines()) == 1
