"""Measure a trial's adapter in every form in which it is served, GGUF files of llama.cpp included.

    make llama-cpp
    python -m tools.served_winner "$(python -m sweeper best STUDY --adapter)" --out served/STUDY

The forms that transformers loads are judged by sweeper's own judge on the trial's test split. The merged
model is then converted to float16 and quantized by llama.cpp. Each file is served on 127.0.0.1 and asked
the same prompts through the chat endpoint, greedily.

Knows trials, sweeper's judge, merging and templates, and the calls of `tools.llama_cpp`. Statistics and
table are those of `tools.served_table`.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from gguf import GGUFReader

from sweeper.commands.generate import StoredAdapter, find_adapter
from sweeper.commands.ollama_export import context, modelfile, trained_texts
from sweeper.config.settings import TrialSettings
from sweeper.core.errors import DataError
from sweeper.core.outcome import ExampleLosses, ExampleScores, ServeForm
from sweeper.core.paths import TrialFolder, write_atomic
from sweeper.core.trained_form import TrainedForm, read_trained_form
from sweeper.data.encode import encode_prompts
from sweeper.data.ollama_template import ASKED, TALK, TurnTexts
from sweeper.data.tokens import EncodedPrompt
from sweeper.evaluation.judge import HeldOutPrompts, ModelJudge, draw_rows
from sweeper.evaluation.judgement_readers import JudgementReader
from sweeper.evaluation.rouge import rouge
from sweeper.modeling.adapter import load_adapter
from sweeper.modeling.base_model import LoadedBase, load_base
from sweeper.tracking.provenance import provenance
from sweeper.training.export import load_merged
from sweeper.training.prepared_data import PreparedData, prepare
from tools.guarded_build import CARD, built_folder, errors_as_sentences, require_space
from tools.llama_cpp import FOLDER, ChatServer, LlamaCpp, Quantization
from tools.pinned_wheel import sha256
from tools.served_table import ROUGE, FormJudgement, FormRow, as_markdown, form_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

REBUILD_COMMAND = "python -m tools.served_winner"
QUANTIZATIONS: tuple[Quantization, ...] = ("Q8_0", "Q4_K_M")
TURNS = {"asked": ASKED, "talk": TALK}
"""Conversations for which the Modelfile's template and the server's are compared."""


@dataclass(frozen=True)
class AskedPrompt:
    """A held-out prompt as the training tokenizes it, and as a client of the server sends it."""

    encoded: EncodedPrompt
    messages: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class HeldOutTask:
    """The rows and prompts that every form is judged on.

    Attributes:
        judge: Sweeper's judge of the rows and prompts.
        prompts: The prompts of the judge, in its order.
        settings: Settings of the trial.
    """

    judge: ModelJudge
    prompts: Sequence[AskedPrompt]
    settings: TrialSettings

    @property
    def references(self) -> list[str]:
        """Expected answers."""
        return [prompt.encoded.reference for prompt in self.prompts]

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        longest = max(len(prompt.encoded.input_ids) for prompt in self.prompts)
        return longest + self.settings.evaluation.generation.max_new_tokens


@dataclass(frozen=True)
class ServedPrompts:
    """The server's prompts beside those of the training.

    Attributes:
        equal: Number of prompts whose token ids equal those of the training.
        counted: Number of prompts of which the chat endpoint counted as many tokens.
        total: Number of prompts.
        first_difference: The trained and the served ids of the first prompt that differs, or None.
    """

    equal: int
    counted: int
    total: int
    first_difference: tuple[Sequence[int], Sequence[int]] | None


@dataclass(frozen=True)
class ServedModelfile:
    """The Modelfile's template and stops beside those of the GGUF file.

    Attributes:
        templates: True for each conversation that Modelfile and server print alike. Empty if the
            Modelfile has no template.
        stops: Stop words of the Modelfile.
        end_token: End token of the GGUF file.
    """

    templates: dict[str, bool]
    stops: tuple[str, ...]
    end_token: str


def measure(
    trial: Path, out: Path, llama: LlamaCpp, rows: int | None = None, prompts: int | None = None
) -> list[FormRow]:
    """Write models, table, answers and figures of a trial's forms into `out`, and return the table.

    Args:
        trial: Folder of a trial with an adapter, or its adapter/.
        out: Folder to write. An earlier one is replaced once the new one is complete.
        llama: Where llama.cpp is.
        rows: Number of rows of the test split. None: all.
        prompts: Number of prompts. None: evaluation.generation.num_examples of the trial.

    Raises:
        SweeperError: There is no adapter, the data have no test split or no prompts, the disk is too
            small, `out` holds something else, or llama.cpp fails.
    """
    adapter = find_adapter(trial)
    folder = TrialFolder(adapter.path.parent)
    with built_folder(out, "the served forms", REBUILD_COMMAND) as fresh:
        base = load_base(adapter.settings.model, adapter.settings.quantization, trained=False)
        # float32, its half, and two smaller files
        require_space(out, 8 * base.model.num_parameters())
        task = held_out_task(adapter.settings, base, rows, prompts)
        del base
        judged = [_by_product(form, task, folder, fresh) for form in adapter.settings.serve_forms]
        form = _form(fresh / "merged")
        write_atomic(fresh / "Modelfile", _modelfile(out.name, form, fresh / "merged"))
        prompted: dict[str, ServedPrompts] = {}
        for kind, file in _gguf_files(llama, fresh, out.name):
            with llama.served(file, task.most_tokens + 1) as server:
                found, prompted[kind] = _by_llama(kind, file, task, llama, server)
                written = _compared(server, file, form, fresh / "merged")
            judged.append(found)
        table = form_rows(judged)
        facts = {
            "trial": _trial_facts(adapter, form),
            "llama_cpp": llama.sources,
            "threads": llama.threads,
            "load": os.getloadavg()[0],
            "files": {path.name: sha256(path) for path in sorted(fresh.glob("*.gguf"))},
            "max_new_tokens": task.settings.evaluation.generation.max_new_tokens,
            "prompt_ids": {kind: vars(each) for kind, each in prompted.items()},
            "modelfile": vars(written),
            "forms": [row.figures for row in table],
        }
        _write(fresh, facts, table, task, judged)
    return table


def held_out_task(
    settings: TrialSettings, base: LoadedBase, rows: int | None, prompts: int | None
) -> HeldOutTask:
    """Return rows and prompts of the test split, which are the first ones that sweeper would draw.

    Raises:
        DataError: The data have no test split, or plain text without prompts.
    """
    prepared = prepare(settings.data, base, settings.evaluation.over_length)
    judge = prepared.test_judge(settings, base)
    kept = draw_rows(len(judge.rows), judge.groups, rows, judge.seed)
    judge = replace(
        judge,
        rows=[judge.rows[index] for index in kept],
        row_bytes=[judge.row_bytes[index] for index in kept],
        groups=[judge.groups[index] for index in kept] if judge.groups else (),
    )
    asked = _prompts(prepared, base, prompts or settings.evaluation.generation.num_examples)
    held_out = HeldOutPrompts.of([prompt.encoded for prompt in asked])
    return HeldOutTask(replace(judge, held_out=held_out), asked, settings)


def _prompts(prepared: PreparedData, base: LoadedBase, count: int) -> list[AskedPrompt]:
    examples = prepared.splits.examples["test"]
    encoded = encode_prompts(examples, base.tokenizer, prepared.settings)
    if not count or len(encoded) != len(examples):
        raise DataError(
            "the test split has no prompts to ask: it is plain text, or evaluation.generation."
            "num_examples is 0 (give --prompts)"
        )
    kept = draw_rows(len(examples), (), count, prepared.settings.split_seed)
    return [
        AskedPrompt(
            encoded[index],
            tuple(
                {"role": turn.role, "content": turn.content}
                for turn in examples[index].messages[:-1]
            ),
        )
        for index in kept
    ]


def _by_product(
    form: ServeForm, task: HeldOutTask, folder: TrialFolder, out: Path
) -> FormJudgement:
    """Judge a form that transformers loads. The merged one stays in `out`."""
    started, settings = time.perf_counter(), task.settings.served_as(form)
    model: PreTrainedModel | PeftModel
    if form == "merged":
        base = load_merged(settings, folder, out / "merged")
        model = base.model
    else:
        base = load_base(settings.model, settings.quantization, trained=False)
        model = load_adapter(base.model, folder.adapter)
    judge = replace(task.judge, compute_dtype=base.compute_dtype)
    judgement = judge(model, JudgementReader.VERDICT)
    scores = judgement.scores_of(ROUGE)
    assert scores is not None
    return FormJudgement(
        form,
        _losses([loss.nll for loss in judgement.examples], task),
        tuple(answer.text for answer in judgement.answers),
        tuple(answer.ended for answer in judgement.answers),
        scores,
        time.perf_counter() - started,
    )


def _gguf_files(llama: LlamaCpp, out: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Yield the merged model's GGUF files by form, made one after the other by llama.cpp."""
    whole = out / f"{name}.F16.gguf"
    llama.convert(out / "merged", whole)
    yield "F16", whole
    for kind in QUANTIZATIONS:
        file = out / f"{name}.{kind}.gguf"
        llama.quantize(whole, file, kind)
        yield kind, file


def _by_llama(
    kind: str, file: Path, task: HeldOutTask, llama: LlamaCpp, server: ChatServer
) -> tuple[FormJudgement, ServedPrompts]:
    """Judge a GGUF file: its losses by llama.cpp's library, its answers by the server."""
    started, limit = time.perf_counter(), task.settings.evaluation.generation.max_new_tokens
    replies = [server.answer(prompt.messages, limit) for prompt in task.prompts]
    nll = llama.losses(file, [dict(row) for row in task.judge.rows])
    texts = [reply.text for reply in replies]
    tokenizer = task.settings.evaluation.rouge_tokenizer
    values = tuple(rouge(texts, task.references, tokenizer).examples[ROUGE.removeprefix("eval/")])
    judged = FormJudgement(
        kind,
        _losses(nll, task),
        tuple(texts),
        tuple(reply.finish_reason == "stop" for reply in replies),
        ExampleScores(metric=ROUGE, values=values, weights=(1.0,) * len(values)),
        time.perf_counter() - started,
        file.stat().st_size / 2**20,
    )
    trained = [list(prompt.encoded.input_ids) for prompt in task.prompts]
    served = [server.token_ids(server.prompt(prompt.messages)) for prompt in task.prompts]
    pairs = list(zip(trained, served, strict=True))
    return judged, ServedPrompts(
        equal=sum(own == found for own, found in pairs),
        counted=sum(
            reply.prompt_tokens == len(own) for reply, own in zip(replies, trained, strict=True)
        ),
        total=len(pairs),
        first_difference=next((pair for pair in pairs if pair[0] != pair[1]), None),
    )


def _losses(nll: Sequence[float], task: HeldOutTask) -> ExampleLosses:
    tokens = tuple(sum(label >= 0 for label in row["labels"][1:]) for row in task.judge.rows)
    return ExampleLosses(nll=tuple(nll), tokens=tokens, groups=tuple(task.judge.groups))


def _form(merged: Path) -> TrainedForm:
    form = read_trained_form(merged)
    if form is None:
        raise DataError("an earlier version stored this adapter without its form. Train it again")
    return form


def _modelfile(name: str, form: TrainedForm, merged: Path) -> str:
    return modelfile(name, form, _texts(form, merged), context(merged))


def _texts(form: TrainedForm, merged: Path) -> TurnTexts | None:
    return trained_texts(merged) if form.template is not None else None


def _compared(server: ChatServer, file: Path, form: TrainedForm, merged: Path) -> ServedModelfile:
    """Compare what the Modelfile says with what the GGUF file makes llama.cpp do."""
    texts = _texts(form, merged)
    facts = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    templates = {}
    if texts is not None:
        templates = {
            name: texts.render(turns)
            == server.prompt([{"role": role, "content": content} for role, content in turns])
            for name, turns in TURNS.items()
        }
    end = facts["tokenizer.ggml.tokens"][facts["tokenizer.ggml.eos_token_id"]]
    return ServedModelfile(templates, form.end_tokens, end)


def _trial_facts(adapter: StoredAdapter, form: TrainedForm) -> dict[str, Any]:
    return {
        "adapter_sha256": sha256(adapter.path / "adapter_model.safetensors"),
        "base_model": adapter.settings.model.base_model,
        "base_digest": form.base_digest,
        "data_digest": form.data_digest,
        "template": form.template,
        "quantization": form.quantization,
        "dtype": form.dtype,
        "seed": adapter.settings.seed,
    }


def _write(
    out: Path,
    facts: Mapping[str, Any],
    table: Sequence[FormRow],
    task: HeldOutTask,
    judged: Sequence[FormJudgement],
) -> None:
    """Write served.json, answers.jsonl and README.md."""
    origin = {**provenance(""), "command": shlex.join(["python", "-m", *_command()])}
    document = {"provenance": origin, **facts}
    write_atomic(out / "served.json", json.dumps(document, indent=2) + "\n")
    answers = [
        {
            "messages": prompt.messages,
            "reference": prompt.encoded.reference,
            **{each.form: each.answers[index] for each in judged},
        }
        for index, prompt in enumerate(task.prompts)
    ]
    lines = [json.dumps(answer, ensure_ascii=False) for answer in answers]
    write_atomic(out / "answers.jsonl", "\n".join(lines) + "\n")
    write_atomic(out / CARD, _card(facts, table))


def _command() -> list[str]:
    return ["tools.served_winner", *sys.argv[1:]]


def _card(facts: Mapping[str, Any], table: Sequence[FormRow]) -> str:
    """Return README.md of the folder: the table, what it compares, and the files."""
    same = all(each["equal"] == each["total"] for each in facts["prompt_ids"].values())
    written = facts["modelfile"]
    alike = all(written["templates"].values()) and written["end_token"] in written["stops"]
    return "\n".join(
        [
            "# The forms of a tuned model",
            "",
            as_markdown(table),
            "",
            f"Losses in nats per target token of {table[0].rows} rows of the test split. Answers to "
            f"{table[0].answers} of its prompts, greedy, of at most {facts['max_new_tokens']} tokens. "
            f"Differences to the first line with 95 % intervals of paired rows.",
            "",
            f"Token ids of the served prompts {'equal' if same else 'DO NOT equal'} those of the "
            "training. Template and stops of the Modelfile "
            f"{'equal' if alike else 'DO NOT equal'} the server's. Details in served.json, all answers "
            "in answers.jsonl.",
            "",
            f"Rebuild: `{REBUILD_COMMAND} TRIAL --out FOLDER`, in a checkout of sweeper.",
            "",
        ]
    )


def main(
    trial: Annotated[Path, typer.Argument(help="Folder of a trial, or its adapter/.")],
    out: Annotated[Path, typer.Option(help="Folder to write models and figures to.")],
    llama_cpp: Annotated[Path, typer.Option(help="Folder of `make llama-cpp`.")] = FOLDER,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of the loss. Default: all.")] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts to ask. Default: the trial's number.")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of llama.cpp: at most the cores that are free.")
    ] = 1,
) -> None:
    """Merge, convert, quantize and serve a trial's adapter, and compare the forms."""
    with errors_as_sentences():
        table = measure(trial, out, LlamaCpp.found(llama_cpp, threads), rows, prompts)
    print(as_markdown(table))
    print(f"\n{out / 'served.json'}")


if __name__ == "__main__":
    typer.run(main)
