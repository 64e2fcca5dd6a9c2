"""The token cache: the same input hits, any other misses, damage is mended."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sweeper.config.settings import DataSettings
from sweeper.data import token_cache
from sweeper.data.encode import EncodedSplit, encode_train
from sweeper.data.examples import Example
from sweeper.data.token_cache import cache_folder, cached, fingerprint, tokenizer_digest
from tests.conftest import make_settings
from tests.data.chat import CHATML, byte_level, talk, task

EXAMPLES = [task("Add.", "1, 2", "3"), task("Add." * 40, "", "3"), talk("Hi?", "Yes.")]


def _data(**changes: Any) -> DataSettings:
    settings = make_settings("data.max_length=64", "data.max_bad_fraction=0.9").data
    return settings.model_copy(update=changes)


def _key(
    examples: list[Example] = EXAMPLES,
    tokenizer: Any = None,
    settings: DataSettings | None = None,
    limit: int = 512,
) -> str:
    return fingerprint(examples, tokenizer or byte_level(), settings or _data(), limit=limit)


def _jinja(folder: Path, text: str) -> DataSettings:
    path = folder / "mine.jinja"
    path.write_text(text, encoding="utf-8")
    return _data(template=str(path))


def test_same_input_same_fingerprint() -> None:
    """A tokenizer built anew, settings read anew, and keys of other stages change nothing."""
    assert _key() == _key(settings=_data(split_seed=7, max_samples=5))
    used = byte_level()
    used(["a", "b c"], padding=True, truncation=True, max_length=2)
    assert _key(tokenizer=used) == _key(), "a call's padding is no part of a tokenizer"


CHANGES: dict[str, Callable[[], str]] = {
    "an answer": lambda: _key([task("Add.", "1, 2", "4"), *EXAMPLES[1:]]),
    "the input": lambda: _key([task("Add.", "1, 3", "3"), *EXAMPLES[1:]]),
    "the order": lambda: _key(EXAMPLES[::-1]),
    "a role": lambda: _key([*EXAMPLES[:2], talk("Hi?", "Yes.", system="Be.")]),
    "the format": lambda: _key([*EXAMPLES[:2], replace(EXAMPLES[2], format="prompt_completion")]),
    "template": lambda: _key(settings=_data(template="instruction_input")),
    "train_on": lambda: _key(settings=_data(train_on="everything")),
    "max_length": lambda: _key(settings=_data(max_length=65)),
    "over_length": lambda: _key(settings=_data(over_length="truncate")),
    "packing": lambda: _key(settings=_data(packing=True)),
    "the model's limit": lambda: _key(limit=256),
    "the chat template": lambda: _key(tokenizer=byte_level(chat_template=CHATML)),
    "what the tokenizer adds": lambda: _key(tokenizer=byte_level(adds="bos")),
    "the end token": lambda: _key(tokenizer=byte_level(eos="<|im_end|>")),
    "a new token": lambda: _key(tokenizer=_grown()),
}


def _grown() -> Any:
    tokenizer = byte_level()
    tokenizer.add_tokens(["foobarfoo"])
    return tokenizer


@pytest.mark.parametrize("name", CHANGES)
def test_any_change_misses(name: str) -> None:
    """Data, template, tokenizer, option: each alone changes the fingerprint."""
    assert CHANGES[name]() != _key()


def test_edited_template_file_and_new_code_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same path with another text is another template; a new code version forgets all."""
    first = _key(settings=_jinja(tmp_path, "{{ messages }}"))
    assert _key(settings=_jinja(tmp_path, "{{ messages[0] }}")) != first
    before = _key()
    monkeypatch.setattr(token_cache, "CODE_VERSION", token_cache.CODE_VERSION + 1)
    assert _key() != before


@pytest.mark.parametrize("packing", [False, True])
def test_stored_split_comes_back_whole(tmp_path: Path, packing: bool) -> None:
    """Rows, lengths, counts and places survive, and the second time nothing is built."""
    built = encode_train(EXAMPLES, byte_level(), _data(packing=packing), 512)
    assert built.dropped == 1
    assert cached("key", lambda: copy.deepcopy(built), tmp_path) == built
    assert cached("key", _refuse, tmp_path) == built


def _refuse() -> EncodedSplit:
    raise AssertionError("built again")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "another file": lambda path: path.write_bytes(b"not safetensors at all"),
    "one bit": _flip,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file_is_built_again(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged file is never read as tokens; it is replaced, and the log says so."""
    built = encode_train(EXAMPLES, byte_level(), _data(), 512)
    cached("key", lambda: built, tmp_path)
    (path,) = tmp_path.iterdir()
    DAMAGE[name](path)
    assert cached("key", lambda: built, tmp_path) == built
    assert "is damaged" in caplog.text
    assert cached("key", _refuse, tmp_path) == built


def test_unwritable_folder_costs_the_cache_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the folder cannot be made, the split is built and the log says why."""
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    built = encode_train(EXAMPLES, byte_level(), _data(), 512)
    assert cached("key", lambda: built, tmp_path / "file") is built
    assert "cannot write the token cache" in caplog.text


def test_oldest_files_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its size the cache forgets what was used longest ago."""
    built = encode_train(EXAMPLES, byte_level(), _data(), 512)
    for key in ("old", "used", "new"):
        cached(key, lambda: built, tmp_path)
    size = (tmp_path / "old.safetensors").stat().st_size
    monkeypatch.setattr(token_cache, "KEPT_BYTES", 2 * size + size // 2)
    cached("used", _refuse, tmp_path)
    cached("newest", lambda: built, tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == {"used", "newest"}


def test_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On Linux $XDG_CACHE_HOME decides."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sweeper" / "tokens"


def test_tokenizer_digest_does_not_depend_on_where_it_was_loaded(tmp_path: Path) -> None:
    """Saved and loaded again, a tokenizer is the same."""
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(type(tokenizer).from_pretrained(tmp_path)) == tokenizer_digest(
        tokenizer
    )
