"""Stored models answer as they were judged, in a process that cannot import this project."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sweeper.builtin.embedded import BASE_DIR
from sweeper.builtin.stand_in_models import CHATML, LLAMA3
from sweeper.config.compose import read_yaml
from sweeper.config.settings import stored_settings
from sweeper.core.loading_code import BaseLines, loading_code
from sweeper.core.paths import TrialFolder
from sweeper.core.trained_form import read_trained_form
from sweeper.data.encode import encode_prompts
from sweeper.data.examples import ChatMessage, Example, RawRow
from sweeper.evaluation.generation import generate
from sweeper.modeling.base_model import load_base
from sweeper.reporting.winner import base_name
from sweeper.training.export import UNQUANTIZED, merge_trial
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.recorder import Recorder

PROMPTS = ("What is the sum of 3 and 4?", "Where do you live?")
ANSWER = "The answer is short."
TOKENS = 24
"""Longer than any trained answer, so that a model that does not stop itself is cut."""
STRANGER = """
import json, sys
sys.modules["sweeper"] = None
import transformers
{code}
def answer(prompt):
    messages = [{{"role": "user", "content": prompt}}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**inputs, max_new_tokens={tokens})[0, inputs["input_ids"].shape[1]:]
    return tokenizer.decode(made, skip_special_tokens=True), len(made)
print(json.dumps([answer(prompt) for prompt in {prompts!r}]))
"""
ROWS = {
    "messages": lambda n: {
        "messages": [
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "alpaca": lambda n: {"instruction": f"What is {n}?", "input": "", "output": ANSWER},
    "prompt_completion": lambda n: {"prompt": f"What is {n}?", "completion": f" {ANSWER}"},
}
"""A row of each kind of format, by the format's name."""


@dataclass(frozen=True)
class ServedCase:
    """A base with a chat template or none, and the rows that it is tuned on."""

    rows: str
    chat_template: str | None
    overrides: tuple[str, ...] = ()


CHAT_TUNED = ServedCase("messages", CHATML)
INSTRUCTED = ServedCase("alpaca", CHATML)
"""A base with a chat template, tuned on ### Instruction."""


def _tokenizer(chat_template: str | None) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(BASE_DIR)
    marks = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = chat_template
    return tokenizer


def _base(folder: Path, chat_template: str | None) -> Path:
    """Store a Llama of two layers whose generation config samples and penalises repetitions."""
    tokenizer = _tokenizer(chat_template)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        **shape, num_attention_heads=2, max_position_embeddings=512, vocab_size=len(tokenizer)
    )
    model = LlamaForCausalLM(config)
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _train(case: ServedCase, folder: Path, *overrides: str) -> TrialFolder:
    """Train a model until it has learnt to give ANSWER and to stop."""
    base = _base(folder / "base", case.chat_template)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(ROWS[case.rows](n)) + "\n" for n in range(40)))
    settings = make_settings(
        *(f"model.base_model={base}", f"data.train={rows}", "quantization=none"),
        *("training.max_steps=60", "training.eval_steps=60", "training.logging_steps=60"),
        "training.learning_rate=0.02",
        *case.overrides,
        *overrides,
    ).trial
    trial = TrialFolder(folder / "trial")
    outcome = TransformersRunner(threads=1).run(settings, trial, {}, Recorder())
    assert outcome.cause == "finished", outcome.message
    return trial


def _judged(base: Path, trial: TrialFolder, case: ServedCase, stored: Path) -> list[str]:
    """Return the answers that the judge gets from a whole model, or from an adapter on its base."""
    from peft import PeftModel

    settings = make_settings(
        f"model.base_model={base}", f"data.train={base.parent / 'rows.jsonl'}", *case.overrides
    ).trial
    loaded = load_base(settings.model, UNQUANTIZED, trained=False)
    model = loaded.model
    if stored == trial.adapter:
        model = PeftModel.from_pretrained(model, str(stored))
    else:
        whole = settings.model.model_copy(update={"base_model": str(stored)})
        model = load_base(whole, UNQUANTIZED, trained=False).model
    examples = [
        Example(
            (ChatMessage("user", prompt), ChatMessage("assistant", "")),
            RawRow({}, "test"),
            format=case.rows,
        )
        for prompt in PROMPTS
    ]
    encoded = encode_prompts(examples, loaded.tokenizer, settings.data)
    ids = [prompt.input_ids for prompt in encoded]
    ends = {prompt.end_token_id for prompt in encoded}
    return generate(model, loaded.tokenizer, ids, TOKENS, 2, end_token_ids=ends).texts


def _strangers_answers(code: str, folder: Path) -> list[tuple[str, int]]:
    """Run the printed lines in a process that has transformers and PEFT, and no project."""
    script = STRANGER.format(code=code, prompts=PROMPTS, tokens=TOKENS)
    done = subprocess.run(
        [sys.executable, "-I", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(pair) for pair in json.loads(done.stdout.splitlines()[-1])]


def served_code(config: Path, stored: Path) -> str:
    """Return the lines that `sweeper best` prints, without those that ask a prompt."""
    settings = stored_settings(read_yaml(config))
    form = read_trained_form(stored)
    assert form is not None
    base = None
    if (stored / "adapter_config.json").exists():
        quantized = settings.quantization.arguments(form.dtype)
        base = BaseLines(base_name(settings, form), form.revision, form.dtype, quantized)
    return loading_code(str(stored), base, stored_ends=True)


def _own_answers(code: str, folder: Path) -> list[tuple[str, int]]:
    """Run the printed lines in this process, which is cheaper and less strict."""
    script = STRANGER.replace('sys.modules["sweeper"] = None', "")
    output = io.StringIO()
    with redirect_stdout(output):
        exec(script.format(code=code, prompts=PROMPTS, tokens=TOKENS), {})
    return [tuple(pair) for pair in json.loads(output.getvalue().splitlines()[-1])]


def _assert_same_answers(
    case: ServedCase,
    kind: str,
    folder: Path,
    ask: Callable[[str, Path], list[tuple[str, int]]] = _strangers_answers,
) -> None:
    whole = ("adapter=none", "training.learning_rate=0.005") if kind == "full" else ()
    trial = _train(case, folder, *whole)
    stored = trial.artifact
    assert stored is not None
    if kind == "merged":
        settings = make_settings(f"model.base_model={folder / 'base'}", *case.overrides).trial
        merge_trial(settings, trial, stored := folder / "merged")
    code = served_code(trial.config, stored)
    found = ask(code, folder)
    assert [text for text, _ in found] == _judged(folder / "base", trial, case, stored)
    assert all(count < TOKENS for _, count in found), "the model does not stop by itself"
    assert found[0][0].strip().endswith("short.")


def test_an_instructed_adapter_stops_by_itself(tmp_path: Path) -> None:
    """The printed lines alone give the judged answers of a chat base tuned on ### Instruction."""
    _assert_same_answers(INSTRUCTED, "adapter", tmp_path, _own_answers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
@pytest.mark.parametrize(
    "case",
    [
        CHAT_TUNED,
        INSTRUCTED,
        ServedCase("messages", LLAMA3),
        ServedCase("messages", None),
        ServedCase("alpaca", None, ("data.template=instruction_input",)),
        ServedCase("prompt_completion", CHATML),
        ServedCase("messages", CHATML, ("data.template=TEMPLATE",)),
    ],
    ids=["chatml", "instruction", "llama3", "no template", "always input", "plain", "a file"],
)
def test_every_template_is_served_as_it_was_trained(
    case: ServedCase, kind: str, tmp_path: Path
) -> None:
    """Adapter, merged and full model of each template stop by themselves and answer as judged."""
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.instruction }}\nA: "
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    overrides = tuple(each.replace("TEMPLATE", str(template)) for each in case.overrides)
    _assert_same_answers(ServedCase(case.rows, case.chat_template, overrides), kind, tmp_path)
