"""What a trial stores, file by file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from peft import PeftModel
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sweeper.builtin.embedded import BASE_DIR
from sweeper.core.errors import ArtifactError
from sweeper.core.manifest import MANIFEST, verify_manifest, write_manifest
from sweeper.core.paths import TrialFolder
from sweeper.training.artifact import save_bpe, write_zip
from tests.training.conftest import RunTiny

TEXTS = ["def add(a, b):", "Return the sum — naïve, with 3 tabs:\t\t\t.", "  ###\n\nResponse"]


def test_adapter_folder_has_what_the_reports_list(run_tiny: RunTiny, tiny_base: Path) -> None:
    """Adapter, config, tokenizer, vocab.json and merges.txt; verified, and loadable by PEFT alone."""
    _, _, folder = run_tiny("t", "artifacts.zip=true")
    names = {path.name for path in folder.adapter.iterdir()}
    assert names >= {
        *("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"),
        *("tokenizer_config.json", "vocab.json", "merges.txt", MANIFEST),
    }
    verify_manifest(folder.adapter)
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_base)
    assert config["target_modules"] == sorted(config["target_modules"])
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert PeftModel.from_pretrained(model, folder.adapter).peft_config["default"].r == 8
    with zipfile.ZipFile(folder.archive) as archive:
        assert folder.archive.name == "adapter.zip"
        assert set(archive.namelist()) == names
        assert archive.testzip() is None


def test_base_is_named_by_what_can_be_loaded(
    run_tiny: RunTiny, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path, which the hub would take for a repository, and `embedded` become folders."""
    monkeypatch.chdir(tiny_base.parent.parent)
    relative = tiny_base.relative_to(tiny_base.parent.parent).as_posix()
    for name, folder in ((relative, tiny_base), ("embedded", BASE_DIR)):
        _, _, trial = run_tiny(
            folder.name, f"model.base_model={name}", "training.max_steps=1", "data.train=embedded"
        )
        config = json.loads((trial.adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == folder.resolve().as_posix()
        assert config["revision"] is None


def test_full_weights_are_verified_too(run_tiny: RunTiny) -> None:
    """A full fine-tune stores model/, with the same manifest, and model.zip on request."""
    _, _, folder = run_tiny("t", "adapter=none", "artifacts.zip=true", "training.max_steps=1")
    verify_manifest(folder.model)
    assert (folder.model / "merges.txt").exists()
    assert folder.archive == folder.path / "model.zip"
    assert folder.archive.exists()


def test_bpe_files_encode_as_the_tokenizer_does(tmp_path: Path) -> None:
    """vocab.json and merges.txt, loaded by tokenizers alone, give the very same tokens."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    save_bpe(tokenizer, tmp_path)
    again = Tokenizer(BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
    again.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in TEXTS:
        assert again.encode(text).ids == tokenizer(text)["input_ids"]


def test_other_tokenizers_have_no_bpe_files(tmp_path: Path) -> None:
    """A word-level tokenizer, and a BPE that is not byte-level, write neither file."""
    words = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    lines = Tokenizer(BPE({"\n": 0, "\n\n": 1}, [("\n", "\n")]))
    lines.decoder = decoders.Fuse()
    for backend in (words, lines):
        save_bpe(PreTrainedTokenizerFast(tokenizer_object=backend), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("template", ["chat", "instruction"])
def test_the_trained_template_travels_with_the_adapter(
    run_tiny: RunTiny, tiny_base: Path, tmp_path: Path, template: str
) -> None:
    """The adapter's tokenizer renders as the training did, whichever template the base carries."""
    base = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(base)
    chosen = (f"model.base_model={base}", f"data.template={template}", "training.max_steps=1")
    _, _, folder = run_tiny("t", *chosen)
    stored = AutoTokenizer.from_pretrained(folder.adapter)
    messages = [{"role": "user", "content": "hi"}]
    rendered = stored.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = {
        "chat": "<user>hi<assistant>",
        "instruction": "### Instruction:\nhi\n\n### Response:\n",
    }
    assert rendered == expected[template]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder of two files and its manifest."""
    folder = tmp_path / "stored"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deep" / "b.bin").write_bytes(b"b" * 100_000)
    write_manifest(folder)
    return folder


def test_manifest_holds_sha256_and_size(stored: Path) -> None:
    """The digest of the one letter a is the published one."""
    verify_manifest(stored)
    files = json.loads((stored / MANIFEST).read_text())["files"]
    assert files["a.txt"] == {
        "sha256": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb",
        "bytes": 1,
    }
    assert set(files) == {"a.txt", "deep/b.bin"}


def test_manifest_names_every_file_that_differs(stored: Path) -> None:
    """One changed byte, one missing file and one stranger are all told at once."""
    (stored / "deep" / "b.bin").write_bytes(b"b" * 99_999 + b"c")
    (stored / "a.txt").unlink()
    (stored / "evil.bin").write_bytes(b"")
    with pytest.raises(ArtifactError) as error:
        verify_manifest(stored)
    told = str(error.value)
    assert "a.txt: missing" in told
    assert "deep/b.bin: changed" in told
    assert "evil.bin: not in the manifest" in told


def test_folder_without_manifest_is_an_error(tmp_path: Path) -> None:
    """Nothing to check against is not the same as unchanged."""
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        verify_manifest(tmp_path)


def test_zip_of_the_same_files_has_the_same_bytes(stored: Path, tmp_path: Path) -> None:
    """Neither the time of writing nor the files' own times and modes are in it."""
    write_zip(stored, tmp_path / "one.zip")
    for path in stored.rglob("*"):
        path.touch()
        path.chmod(0o700)
    write_zip(stored, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "two.zip") as archive:
        archive.extractall(tmp_path / "again")
    verify_manifest(tmp_path / "again")


def test_a_new_attempt_removes_the_old_archive(tmp_path: Path) -> None:
    """clear_results leaves no adapter.zip of an earlier attempt beside a new adapter."""
    (tmp_path / "adapter.zip").write_bytes(b"old")
    TrialFolder(tmp_path).clear_results()
    assert not (tmp_path / "adapter.zip").exists()
