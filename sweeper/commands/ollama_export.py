"""`sweeper best --ollama DIR`: the merged model, a Modelfile, and llama.cpp's own commands.

Converting and quantizing are llama.cpp's work. Nothing of it is done or judged here.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import jinja2

from sweeper.config.settings import LoraAdapter
from sweeper.core.errors import ModelError
from sweeper.core.paths import write_atomic
from sweeper.core.trained_form import TrainedForm, read_trained_form
from sweeper.data.ollama_template import Turns, TurnTexts, turn_texts
from sweeper.reporting.winner import WinningTrial

KIND = "Q4_K_M"
MAX_CONTEXT = 8192
"""Tokens of context beyond which Ollama's memory would surprise. Raise num_ctx where it is at hand."""


def export_ollama(winner: WinningTrial, out: Path) -> str:
    """Write the merged model and a Modelfile into a new folder, and return the commands that follow.

    Raises:
        ModelError: `out` is in use, or the model was stored without its form by an earlier version.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} is in use. Give a new folder, or remove this one first")
    form = read_trained_form(winner.artifact)
    if form is None:
        raise ModelError(
            f"{winner.artifact}: an earlier version stored this model without its prompt template and "
            f"end tokens. Train it again: sweeper trial {winner.folder.path} --into FOLDER"
        )
    model = winner.artifact.resolve()
    if isinstance(winner.settings.adapter, LoraAdapter):
        from sweeper.training.export import merge_trial  # torch, which other verbs do without

        merge_trial(winner.settings, winner.folder, model := out / "merged")
    name = winner.study_name
    texts = trained_texts(model) if form.template is not None else None
    write_atomic(out / "Modelfile", modelfile(name, form, texts, context(model)))
    return "\n".join(_commands(name, model, out, form, texts))


def modelfile(name: str, form: TrainedForm, texts: TurnTexts | None, tokens: int | None) -> str:
    """Return the Modelfile of the quantized file.

    Args:
        name: name of the GGUF file.
        form: form that the model was trained in.
        texts: the template, or None if Ollama's language cannot express it.
        tokens: context in tokens, or None for Ollama's own.
    """
    lines = [f"FROM ./{name}.{KIND}.gguf"]
    if texts is not None:
        lines.append(f'TEMPLATE """{texts.go}"""')
    elif form.template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in form.end_tokens]
    lines += [] if tokens is None else [f"PARAMETER num_ctx {min(tokens, MAX_CONTEXT)}"]
    # greedy, as every answer of the study was judged
    lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"


def context(model: Path) -> int | None:
    """Return the positions that a model's configuration names, or None."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    # n_positions is GPT-2's name
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return None if found is None else int(found)


def trained_texts(model: Path) -> TurnTexts | None:
    """Return the texts that the stored chat template prints around the turns, or None if irregular."""
    from sweeper.modeling.model_source import load_tokenizer  # transformers, as above

    tokenizer = load_tokenizer(model, str(model))
    # A GGUF file tells Ollama to begin with this token where the tokenizer does
    opens = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = tokenizer.bos_token or ""

    def render(turns: Turns) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(str(error)) from error
        return text.removeprefix(bos) if opens else text

    return turn_texts(render)


def _commands(
    name: str, model: Path, out: Path, form: TrainedForm, texts: TurnTexts | None
) -> list[str]:
    full, small = (shlex.quote(str(out / f"{name}.{kind}.gguf")) for kind in ("F16", KIND))
    lines = [
        f"{out / 'Modelfile'} is for {small}, which llama.cpp makes of {model}:",
        "",
        "    git clone https://github.com/ggml-org/llama.cpp",
        "    pip install -r llama.cpp/requirements.txt",
        "    cmake -S llama.cpp -B llama.cpp/build",
        "    cmake --build llama.cpp/build --target llama-quantize",
        f"    python llama.cpp/convert_hf_to_gguf.py {shlex.quote(str(model))} "
        f"--outtype f16 --outfile {full}",
        f"    llama.cpp/build/bin/llama-quantize {full} {small} {KIND}",
        f"    ollama create {name} -f {shlex.quote(str(out / 'Modelfile'))}",
        f"    ollama run {name}",
        "",
        f"The quantized file was not judged: no loss of this study is one of {KIND}.",
    ]
    if form.template is not None and texts is None:
        lines.append(
            "WARNING: the Modelfile has no TEMPLATE, because the trained template cannot be written in "
            "Ollama's language. Serve the model with vLLM instead, as `sweeper best` says"
        )
    return lines
