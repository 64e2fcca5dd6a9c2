"""The cache of quantized bases: the same bits, whole or not at all, and only what is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sweeper.cli.verbs import app
from sweeper.modeling import base_model as base
from sweeper.modeling import quantized_cache
from sweeper.modeling.base_model import load_base
from sweeper.modeling.quantized_cache import QuantizationKey, cache_folder
from tests.conftest import make_settings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, for bases of every size."""
    monkeypatch.setattr(quantized_cache, "SMALLEST_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_folder()


def _entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def _load(base_model: Path, quantization: str) -> base.LoadedBase:
    settings = make_settings(f"model.base_model={base_model}", f"quantization={quantization}")
    return load_base(settings.model, settings.quantization, trained=False)


def _forbid_quantizing(monkeypatch: pytest.MonkeyPatch, base_model: Path) -> None:
    load = base._load

    def from_an_entry(folder: Path, *arguments: object) -> object:
        assert folder != base_model, "quantized again"
        return load(folder, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(base, "_load", from_an_entry)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_cached_base_is_the_base_bit_by_bit(
    quantization: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, quantization statistics, logits and gradient as the base quantized anew."""
    fresh = _load(tiny_base, quantization).model
    _forbid_quantizing(monkeypatch, tiny_base)
    cached = _load(tiny_base, quantization).model
    there, here = fresh.state_dict(), cached.state_dict()
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in there)
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(fresh(ids).logits, cached(ids).logits)
    assert cached.config.name_or_path == str(tiny_base)
    assert not any(weight.requires_grad for weight in cached.parameters())


def test_an_entry_that_was_altered_is_made_again(
    tiny_base: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A flipped bit is found by the manifest, named, and never loaded."""
    fresh = _load(tiny_base, "nf4").model
    (entry,) = _entries(cache)
    path = entry / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    mended = _load(tiny_base, "nf4").model
    assert "model.safetensors: changed" in caplog.text
    there, here = fresh.state_dict(), mended.state_dict()
    assert all(torch.equal(there[name], here[name]) for name in there)
    assert quantized_cache.is_whole(entry)


def test_other_settings_are_another_entry(tiny_base: Path, cache: Path) -> None:
    """nf4 never stands in for fp4, nor one compute dtype for another."""
    _load(tiny_base, "nf4")
    _load(tiny_base, "fp4")
    assert len(_entries(cache)) == 2
    one = QuantizationKey("digest", "c", "{}", "float32", "cpu")
    others = (
        QuantizationKey("other", "c", "{}", "float32", "cpu"),
        QuantizationKey("digest", "other", "{}", "float32", "cpu"),
        QuantizationKey("digest", "c", "{1}", "float32", "cpu"),
        QuantizationKey("digest", "c", "{}", "bfloat16", "cpu"),
        QuantizationKey("digest", "c", "{}", "float32", "cuda"),
        QuantizationKey("digest", "c", "{}", "float32", "cpu", bitsandbytes="0"),
        QuantizationKey("digest", "c", "{}", "float32", "cpu", transformers="0"),
    )
    assert one.name not in {other.name for other in others}
    assert one.name == QuantizationKey("digest", "c", "{}", "float32", "cpu").name


def test_a_worker_killed_while_it_stores_leaves_no_entry(
    tiny_base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had written is not taken for an entry, and the next worker removes it."""

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantized_cache, "write_manifest", killed)
    monkeypatch.setattr(quantized_cache.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        _load(tiny_base, "nf4")
    monkeypatch.undo()
    monkeypatch.setattr(quantized_cache, "SMALLEST_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    assert [path.name[0] for path in _entries(cache)] == ["."]
    _load(tiny_base, "nf4")
    assert [path.name[0] != "." for path in _entries(cache)] == [True]


def test_a_cache_that_cannot_be_written_costs_a_warning(
    tiny_base: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The base is quantized as if there were no cache."""
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    assert _load(tiny_base, "nf4").model.num_parameters() > 0
    assert "cannot be used" in caplog.text


def test_the_cache_keeps_to_its_size(
    tiny_base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was used longest ago goes first; the entry just made stays."""
    monkeypatch.setattr(quantized_cache, "KEPT_BYTES", 1)
    _load(tiny_base, "nf4")
    (first,) = _entries(cache)
    _load(tiny_base, "fp4")
    (second,) = _entries(cache)
    assert first != second


def test_a_small_base_is_not_cached(
    tiny_base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the size at which the cache is faster nothing is stored."""
    monkeypatch.setattr(quantized_cache, "SMALLEST_BYTES", 64 * 2**20)
    _load(tiny_base, "nf4")
    assert not cache.exists()


def test_clean_empties_the_cache(tiny_base: Path, cache: Path) -> None:
    """`sweeper clean --bases` says what it frees; with --dry-run it frees nothing."""
    _load(tiny_base, "nf4")
    ask = CliRunner().invoke(app, ["clean", "--bases", "--dry-run"])
    assert "would be freed" in ask.stdout
    assert len(_entries(cache)) == 1
    done = CliRunner().invoke(app, ["clean", "--bases"])
    assert done.exit_code == 0, done.output
    assert _entries(cache) == []
    unnamed = CliRunner().invoke(app, ["clean"])
    assert (unnamed.exit_code, "Name the study" in unnamed.output) == (2, True)
