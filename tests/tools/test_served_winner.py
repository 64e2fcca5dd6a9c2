"""A tuned model as llama.cpp serves it: the trained prompts, the judged losses, answers that end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from sweeper.core.errors import ModelError
from tests.data.test_ollama_template import GoTemplate
from tools.llama_cpp import FOLDER, LlamaCpp, LlamaCppError

gguf = pytest.importorskip("gguf", reason="gguf is not installed (make setup)")

from tools import served_winner  # noqa: E402  it imports gguf

ROOT = Path(__file__).resolve().parents[2]
MODEL, DATA = (ROOT / "real_model" / name for name in ("SmolLM2-135M-Instruct", "docstrings"))
TALK = (("user", "Name a colour."), ("assistant", "Red."), ("user", "Another?"))
MOST_TOKENS = 24


def found_llama() -> LlamaCpp | None:
    """Return llama.cpp where `make llama-cpp` puts it, or None."""
    try:
        return LlamaCpp.found(ROOT / FOLDER)
    except LlamaCppError:
        return None


def trained(folder: Path, *overrides: str) -> Path:
    """Train two steps on eight rows by the ordinary command, and return the trial's folder."""
    data = []
    for split in ("train", "validation", "test"):
        path = folder / f"{split}.jsonl"
        with (DATA / path.name).open(encoding="utf-8") as rows:
            path.write_text("".join(islice(rows, 8)), encoding="utf-8")
        data.append(f"data.{split}={path}")
    command = [
        *(sys.executable, "-m", "sweeper", f"model.base_model={MODEL}", *data),
        *("training.max_steps=2", "training.learning_rate=1e-3", "training.eval_steps=2"),
        *("evaluation.generation.num_examples=2", f"hydra.run.dir={folder / 'trial'}"),
        *(f"evaluation.generation.max_new_tokens={MOST_TOKENS}", "evaluation.prompts=[]"),
        *("tracking=none", "workers=inline", *overrides),
    ]
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    return folder / "trial"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # NF4 answers slowly on a CPU: five CPU minutes, more beside other work
@pytest.mark.skipif(not DATA.exists(), reason="no real model and rows (make real-model)")
@pytest.mark.skipif(found_llama() is None, reason="no llama.cpp (make llama-cpp)")
@pytest.mark.parametrize(
    ("overrides", "opening"),
    [
        ((), "<|im_start|>system\n"),
        (("data.template=instruction", "quantization=none"), "### Instruction:\n"),
    ],
    ids=["chat", "instruction"],
)
def test_llama_cpp_serves_what_was_trained_and_judged(
    overrides: tuple[str, ...], opening: str, tmp_path: Path
) -> None:
    """Prompts have the trained ids, losses agree, Modelfile and GGUF print and stop alike."""
    llama = found_llama()
    assert llama is not None
    out = tmp_path / "tuned"
    table = served_winner.measure(trained(tmp_path, *overrides), out, llama)
    rows = {row.form: row for row in table}
    product = ("trained", "unquantized", "merged") if not overrides else ("trained", "merged")
    assert tuple(rows) == (*product, "F16", "Q8_0", "Q4_K_M")

    # float16 rounds a loss in its fourth digit, and the quantized forms are further away
    assert rows["merged"].loss == pytest.approx(rows[product[-2]].loss, abs=1e-4)
    assert rows["F16"].loss == pytest.approx(rows["merged"].loss, abs=2e-3)
    assert rows["Q8_0"].loss == pytest.approx(rows["merged"].loss, abs=0.1)
    assert rows["Q4_K_M"].loss == pytest.approx(rows["merged"].loss, abs=0.6)
    assert rows["Q4_K_M"].mib < rows["Q8_0"].mib < rows["F16"].mib  # type: ignore[operator]

    figures = json.loads((out / "served.json").read_text(encoding="utf-8"))
    for kind in ("F16", "Q8_0", "Q4_K_M"):
        asked = figures["prompt_ids"][kind]
        assert asked["equal"] == asked["counted"] == asked["total"] == 2, asked
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [answer["F16"] for answer in answers] == [answer["merged"] for answer in answers]
    assert rows["F16"].ended_share == rows["merged"].ended_share

    modelfile = (out / "Modelfile").read_text(encoding="utf-8")
    (template,) = re.findall(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)
    stops = [json.loads(stop) for stop in re.findall(r"PARAMETER stop (.*)", modelfile)]
    assert figures["modelfile"]["end_token"] in stops
    assert all(figures["modelfile"]["templates"].values())
    assert (out / modelfile.splitlines()[0].removeprefix("FROM ")).exists()
    with llama.served(out / "tuned.Q4_K_M.gguf", 256) as server:
        for turns in (TALK[:1], TALK, (("system", "Be brief."), *TALK)):
            messages = [{"role": role, "content": content} for role, content in turns]
            assert server.prompt(messages) == GoTemplate(template, turns).text()
        assert server.prompt([{"role": "user", "content": "Why?"}]).startswith(opening)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    """The message says what to give, before any model is loaded."""
    llama = LlamaCpp(tmp_path, threads=1)
    with pytest.raises(ModelError, match="holds no adapter"):
        served_winner.measure(tmp_path, tmp_path / "out", llama)
    assert not (tmp_path / "out").exists()
