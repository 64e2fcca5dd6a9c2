"""Where a base comes from, what is refused, and what the user hears of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoTokenizer

from sweeper.builtin.embedded import BASE_DIR
from sweeper.config.settings import ModelSettings
from sweeper.core.errors import ModelError
from sweeper.modeling import hardware, model_source
from sweeper.modeling.base_model import complete_tokenizer, load_base
from sweeper.modeling.hardware import choose_dtype, device_report
from sweeper.modeling.model_source import find_source, load_config
from tests.conftest import make_settings

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _model(base_model: str | Path, *overrides: str) -> ModelSettings:
    return make_settings(f"model.base_model={base_model}", *overrides).model


@pytest.mark.parametrize(
    ("error", "sentences"),
    [
        (
            GatedRepoError("403", response=Mock()),
            ["huggingface.co/org/name", "licence", "HF_TOKEN"],
        ),
        (
            RepositoryNotFoundError("404", response=Mock()),
            ["neither a local folder nor a model on the hub", "HF_TOKEN"],
        ),
        (RevisionNotFoundError("404", response=Mock()), ["no revision 'v9'"]),
        (
            LocalEntryNotFoundError("offline"),
            ["sweeper prefetch model.base_model=org/name", "set a folder", "HF_HUB_OFFLINE"],
        ),
        (HFValidationError("bad"), ["neither a local folder nor a hub id"]),
        (RuntimeError("disk full\nlong story"), ["could not be fetched", "disk full"]),
    ],
)
def test_a_hub_that_does_not_give_the_model_says_what_to_do(
    error: Exception, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gated, unknown, offline, ill-named: each has its own way out."""

    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(model_source, "snapshot_download", refuse)
    with pytest.raises(ModelError) as caught:
        find_source(_model("org/name", "model.revision=v9"))
    assert all(sentence in str(caught.value) for sentence in sentences)
    assert "long story" not in str(caught.value)


def test_a_hub_id_is_pinned_and_its_commit_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revision reaches the hub; the commit is the snapshot's name."""
    asked: dict[str, object] = {}
    snapshot = tmp_path / "snapshots" / COMMIT
    shutil.copytree(BASE_DIR, snapshot)

    def fetch(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(snapshot)

    monkeypatch.setattr(model_source, "snapshot_download", fetch)
    found = find_source(_model("org/name", "model.revision=v1"))
    assert (asked["name"], asked["revision"], found.commit) == ("org/name", "v1", COMMIT)
    load_config(_model("org/name"))
    assert "*.safetensors" not in asked["allow_patterns"]  # type: ignore[operator]


def test_the_hub_caches_own_layout_is_a_local_folder(tmp_path: Path) -> None:
    """models--org--name works by its ref, by its only snapshot, and by commit; else it lists them."""
    cache = tmp_path / "models--org--name"
    shutil.copytree(BASE_DIR, cache / "snapshots" / COMMIT)
    assert find_source(_model(cache)).commit == COMMIT
    assert find_source(_model(cache / "snapshots" / COMMIT)).commit == COMMIT
    other = "f" * 40
    shutil.copytree(BASE_DIR, cache / "snapshots" / other)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(other)
    assert find_source(_model(cache)).commit == other
    assert find_source(_model(cache, f"model.revision={COMMIT}")).commit == COMMIT
    with pytest.raises(
        ModelError, match=f"does not contain this revision. Its revisions are {COMMIT}, {other}"
    ):
        find_source(_model(cache, "model.revision=v9"))


def test_a_plain_folder_has_no_commit() -> None:
    """The embedded base and a folder of the user's own come from no hub."""
    assert find_source(_model("embedded")).commit is None
    assert find_source(_model(BASE_DIR)).commit is None


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_a_quantized_checkpoint_is_refused(method: str, tmp_path: Path) -> None:
    """Before any weight is read, with the way out."""
    config = json.loads((BASE_DIR / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"already quantized \({method}\).*unquantized"):
        find_source(_model(tmp_path))


def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    """An adapter's folder, and weights in a format that can run code."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter, not a base"):
        find_source(_model(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    shutil.copy(BASE_DIR / "config.json", tmp_path)
    (tmp_path / "pytest_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no \*.safetensors weights"):
        find_source(_model(tmp_path))


def test_weights_that_are_missing_are_an_error_not_random(tmp_path: Path) -> None:
    """transformers would initialise a layer that the file does not have, and go on."""
    folder = shutil.copytree(BASE_DIR, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    settings = make_settings(f"model.base_model={folder}", "quantization=none")
    with pytest.raises(ModelError, match="its files lack the weights"):
        load_base(settings.model, settings.quantization, trained=False)


def test_a_tokenizer_without_end_and_padding_gets_them_from_the_model() -> None:
    """The end of text that the model's configuration names; padding is the same, and masked."""
    settings = make_settings("quantization=none")
    base = load_base(settings.model, settings.quantization, trained=False)
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    wanted = tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.pad_token = None
    base.model.generation_config.eos_token_id = [wanted, 5]
    complete_tokenizer(tokenizer, base.model, settings.model)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == wanted
    tokenizer.eos_token = None
    base.model.generation_config.eos_token_id = base.model.config.eos_token_id = None
    with pytest.raises(ModelError, match="names an end-of-text token"):
        complete_tokenizer(tokenizer, base.model, settings.model)


@pytest.mark.parametrize(
    ("bf16", "dtype", "reason"),
    [
        (True, torch.bfloat16, "bfloat16: the GPU (sm_80) computes in it"),
        (
            False,
            torch.float16,
            "float16: the GPU (sm_75) does not compute in bfloat16 but emulates",
        ),
    ],
)
def test_auto_on_a_gpu_follows_what_it_computes_in(
    bf16: bool, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An emulated bf16 (T4, V100) is not taken."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    capability = (8, 0) if bf16 else (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = choose_dtype("auto", torch.device("cuda", 0))
    assert found.dtype == dtype
    assert str(found).startswith(reason)


def test_auto_on_a_cpu_is_fp32_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without bf16 units; an explicit dtype is its own reason."""
    monkeypatch.setattr(hardware, "_cpu_bf16_units", lambda: ())
    assert str(choose_dtype("auto", CPU)).startswith("float32: this CPU has no AVX512_BF16 or AMX")
    monkeypatch.setattr(hardware, "_cpu_bf16_units", lambda: ("AMX",))
    assert "model.dtype=bfloat16 would be faster" in str(choose_dtype("auto", CPU))
    assert choose_dtype("auto", CPU).dtype == torch.float32
    assert choose_dtype("float16", CPU).reason == "set by model.dtype=float16"


def test_the_device_report_has_figures() -> None:
    """Free memory is part of the total."""
    report = device_report(CPU)
    assert report.name
    assert 0 < report.free_mib <= report.total_mib
    assert report.bf16 == bool(report.capability)


def test_8bit_training_logs_no_cast_per_call(caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes' line for every layer and call is filtered; the base records its reason."""
    settings = make_settings("quantization=int8")
    base = load_base(settings.model, settings.quantization, trained=False)
    with torch.no_grad():
        base.model.eval()(torch.arange(9).unsqueeze(0))
    assert "MatMul8bitLt" not in caplog.text
    assert base.dtype_reason.startswith("float32: ")
    assert base.commit is None


def _copy_of_the_embedded_base(folder: Path) -> Path:
    return Path(shutil.copytree(BASE_DIR, folder / "base"))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("target", [None, "/dev/zero"], ids=["pipe", "zeros"])
def test_a_model_of_pipes_and_devices_is_refused_unopened(
    name: str, target: str | None, tmp_path: Path
) -> None:
    """Whichever of its files is none, before anything waits for it."""
    path = _copy_of_the_embedded_base(tmp_path) / name
    path.unlink(missing_ok=True)
    if target is None:
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    for read in (find_source, load_config):
        with pytest.raises(
            ModelError, match=rf"model\.base_model=.*{name} is .*not a regular file"
        ):
            read(_model(path.parent))


def _declare(folder: Path, layers: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))


def test_more_layers_than_the_weights_hold_are_refused(tmp_path: Path) -> None:
    """transformers would build 300,000 layers first; a config without weights has a maximum."""
    folder = _copy_of_the_embedded_base(tmp_path)
    _declare(folder, 300_000)
    words = r"config\.json declares 300,000 layers \(num_hidden_layers\), but its weights hold \d+ "
    for read in (find_source, load_config):
        with pytest.raises(ModelError, match=words):
            read(_model(folder))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ModelError, match=r"300,000 layers .* but its weights hold 1 tensors"):
        load_config(_model(folder))
    index.unlink()
    # one shard of an interrupted download says nothing
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"300,000 layers .* but at most 10,000 are supported"):
        load_config(_model(folder))
