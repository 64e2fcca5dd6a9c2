"""Judge stored adapters, and the untuned base, on a gate split; a process of its own.

    python -m sweeper.training.gate REQUEST.json ANSWER.json

The gate is a source of its own. Rows that stand in a model's other splits are left out: it was trained
or chosen on them, or they are kept for the last word (test). Knows adapters, not champions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from pydantic import Field

from sweeper.compose import read_yaml
from sweeper.data.encode import encode_evaluation
from sweeper.data.examples import Example
from sweeper.data.splits import load_examples, load_splits
from sweeper.errors import ArtifactError, DataError, SweeperError
from sweeper.evaluation.judge import make_judge
from sweeper.evaluation.loss import Loss
from sweeper.folders import TrialFolder, write_atomic
from sweeper.manifest import verify_manifest
from sweeper.modeling.base import load_base
from sweeper.outcome import Value
from sweeper.settings import TrialSettings, validate
from sweeper.training.prepare import positions

BASE = "base"
"""Whose figures the untuned base's are."""
MIN_EXAMPLES = 20
"""Of fewer no interval is worth its name."""


class Request(Value):
    """What is judged on what."""

    gate: str
    """A file, a folder or a hub id, read as the first trial's `data` section says."""
    trials: dict[str, Path]
    """Folders of trials by name; the untuned base is the first one's."""


class Answer(Value):
    """Figures of the same examples in the same order, or why there are none."""

    tokens: list[int] = Field(default_factory=list)
    """Target tokens of each example."""
    nll: dict[str, list[float]] = Field(default_factory=dict)
    """Summed negative log-likelihood of each example in nats, by name; `base` among them."""
    left_out: int = 0
    """Rows of the gate that stand in another split of a model."""
    problem: str | None = None


def judge_on_gate(request: Request) -> Answer:
    """Judge every trial's adapter, and the first one's untuned base.

    Raises:
        DataError: the gate cannot be read, or too little of it is unseen.
        ArtifactError: an adapter is missing or not what was stored.
    """
    settings = {name: _settings(folder) for name, folder in request.trials.items()}
    first = next(iter(settings.values()))
    examples = load_examples(request.gate, first.data)
    unseen = _unseen(examples, list(settings.values()))
    if len(unseen) < MIN_EXAMPLES:
        raise DataError(
            f"gate={request.gate}: {len(unseen)} of its {len(examples)} rows stand in no other split; "
            f"at least {MIN_EXAMPLES} are needed"
        )
    losses = {BASE: _losses(first, None, unseen)}
    for name, folder in request.trials.items():
        losses[name] = _losses(settings[name], TrialFolder(folder), unseen)
    counts = {tuple(loss.tokens for loss in found) for found in losses.values()}
    if len(counts) > 1:
        raise DataError(
            f"{', '.join(request.trials)}: their templates or tokenizers differ, so that their losses "
            "are means over other tokens and do not compare"
        )
    return Answer(
        tokens=list(counts.pop()),
        nll={name: [loss.nll for loss in found] for name, found in losses.items()},
        left_out=len(examples) - len(unseen),
    )


def _settings(folder: Path) -> TrialSettings:
    fields = set(TrialSettings.model_fields)
    config = read_yaml(TrialFolder(folder).config)
    return validate(TrialSettings, {key: value for key, value in config.items() if key in fields})


def _unseen(examples: Sequence[Example], settings: Sequence[TrialSettings]) -> list[Example]:
    """Examples in no split of any of the models."""
    sections = {each.data.model_dump_json(): each.data for each in settings}
    seen = {
        example.text
        for data in sections.values()
        for found in load_splits(data).examples.values()
        for example in found
    }
    return [example for example in examples if example.text not in seen]


def _losses(
    settings: TrialSettings, trial: TrialFolder | None, examples: Sequence[Example]
) -> Sequence[Loss]:
    """Of each example; every model gets a base of its own, for some adapters change it."""
    base = load_base(settings.model, settings.quantization, trained=False)
    model = base.model
    if trial is not None:
        if not trial.adapter.is_dir():
            raise ArtifactError(f"{trial.adapter}: is not there (deleted by `sweeper clean`?)")
        verify_manifest(trial.adapter)
        model = PeftModel.from_pretrained(base.model, str(trial.adapter))
    limit = positions(base.model)
    length = settings.data.max_length if isinstance(settings.data.max_length, int) else limit
    rows = encode_evaluation(examples, base.tokenizer, settings.data, limit, length or 512).rows
    judge = make_judge(
        base.tokenizer,
        rows,
        None,
        settings.evaluation.model_copy(update={"max_samples": None, "metrics": {}}),
        settings.data.split_seed,
        base.compute_dtype,
        settings.training.loss_chunk_size,
    )
    return judge(model).examples


def main(request: str, answer: str) -> None:
    """Answer one request; a problem is an answer too."""
    asked = Request.model_validate_json(Path(request).read_text(encoding="utf-8"))
    try:
        found = judge_on_gate(asked)
    except SweeperError as error:
        found = Answer(problem=str(error))
    write_atomic(Path(answer), found.model_dump_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
