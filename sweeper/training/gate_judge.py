"""Judge stored adapters and the untuned base on a gate split and on general text, in an own process.

    python -m sweeper.training.gate_judge REQUEST.json ANSWER.json

The gate is a source of its own. Rows that stand in a model's other splits, but for case and white space,
are left out: it was trained or chosen on them, or they are kept for the last word (test). Knows
adapters, not champions.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from sweeper.config.compose import read_yaml
from sweeper.config.settings import DataSettings, GeneralTextSettings, TrialSettings, trial_settings
from sweeper.core.errors import ArtifactError, DataError, SweeperError
from sweeper.core.manifest import verify_manifest
from sweeper.core.outcome import GATE_BASE, GateFigures, GateRequest
from sweeper.core.paths import TrialFolder, write_atomic
from sweeper.data.encode import encode_evaluation
from sweeper.data.examples import Example
from sweeper.data.general_text import general_rows
from sweeper.data.splits import load_examples, load_splits, seen_texts
from sweeper.data.tokens import Tokens
from sweeper.evaluation.judge import make_judge
from sweeper.evaluation.token_loss import LossSum
from sweeper.modeling.base_model import load_base
from sweeper.training.prepared_data import positions

MIN_EXAMPLES = 20
"""Of fewer no interval is worth its name."""


def judge_on_gate(request: GateRequest) -> GateFigures:
    """Judge every trial's adapter, and the first one's untuned base.

    General text is what the first trial's settings name, for all of them.

    Raises:
        DataError: the gate or the general text cannot be read, or too little of the gate is unseen.
        ArtifactError: an adapter is missing or not what was stored.
    """
    settings = {
        name: trial_settings(read_yaml(TrialFolder(folder).config))
        for name, folder in request.trials.items()
    }
    first = next(iter(settings.values()))
    examples = load_examples(request.gate, first.data)
    seen = _seen(list(settings.values()))
    unseen = _unseen(examples, seen, first.data)
    if len(unseen) < MIN_EXAMPLES:
        raise DataError(
            f"gate={request.gate}: {len(unseen)} of its {len(examples)} rows stand in no other split; "
            f"at least {MIN_EXAMPLES} are needed"
        )
    texts = GateTexts(unseen, seen, first.evaluation.general_text)
    losses, general = {}, {}
    losses[GATE_BASE], general[GATE_BASE] = _losses(first, None, texts)
    for name, folder in request.trials.items():
        losses[name], general[name] = _losses(settings[name], TrialFolder(folder), texts)
    tokens, general_tokens = _tokens(losses), _tokens(general)
    if tokens is None or general_tokens is None:
        raise DataError(
            f"{', '.join(request.trials)}: their templates or tokenizers differ, so that their losses "
            "are means over other tokens and do not compare"
        )
    return GateFigures(
        tokens=tokens,
        nll={name: [loss.nll for loss in found] for name, found in losses.items()},
        left_out=len(examples) - len(unseen),
        general_tokens=general_tokens,
        general={name: [loss.nll for loss in found] for name, found in general.items() if found},
    )


@dataclass(frozen=True)
class GateTexts:
    """What every model is judged on."""

    examples: Sequence[Example]
    """Of the gate, seen by none of the models."""
    task: Sequence[Example]
    """Of all their splits: no general text."""
    general: GeneralTextSettings


def _tokens(losses: Mapping[str, Sequence[LossSum]]) -> list[int] | None:
    """Target tokens of each text; None if they differ from model to model."""
    counts = {tuple(loss.tokens for loss in found) for found in losses.values()}
    return list(counts.pop()) if len(counts) == 1 else None


def _seen(settings: Sequence[TrialSettings]) -> list[Example]:
    """The examples of every split of the models."""
    sections = {each.data.model_dump_json(): each.data for each in settings}
    splits = [load_splits(data) for data in sections.values()]
    return [example for each in splits for found in each.examples.values() for example in found]


def _unseen(
    examples: Sequence[Example], seen: Sequence[Example], data: DataSettings
) -> list[Example]:
    """Examples that stand in no split, compared as the splits are with each other."""
    met = seen_texts(data)
    for example in seen:
        met.add(example.text)
    return [example for example in examples if met.kind(example.text) is None]


def _losses(
    settings: TrialSettings, trial: TrialFolder | None, texts: GateTexts
) -> tuple[Sequence[LossSum], Sequence[LossSum]]:
    """On each example and each window; every model gets its own base, for some adapters change it."""
    base = load_base(settings.model, settings.quantization, trained=False)
    model = base.model
    if trial is not None:
        if not trial.adapter.is_dir():
            raise ArtifactError(f"{trial.adapter}: is not there (deleted by `sweeper clean`?)")
        verify_manifest(trial.adapter)
        model = PeftModel.from_pretrained(base.model, str(trial.adapter))
    limit = positions(base.model)
    length = settings.data.max_length if isinstance(settings.data.max_length, int) else limit
    tokenizer, data = base.tokenizer, settings.data
    rows = encode_evaluation(texts.examples, tokenizer, data, limit, length or 512).rows
    windows: list[Tokens] = []
    if texts.general.source is not None:
        windows = general_rows(texts.general, texts.task, tokenizer, limit)

    def losses(of: list[Tokens]) -> Sequence[LossSum]:
        judge = make_judge(
            tokenizer,
            of,
            None,
            settings.evaluation.model_copy(update={"max_samples": None, "metrics": {}}),
            data.split_seed,
            base.compute_dtype,
            settings.training.loss_chunk_size,
        )
        return judge(model).examples

    return losses(rows), losses(windows) if windows else []


def main(request: str, answer: str) -> None:
    """Answer one request; a problem is an answer too."""
    asked = GateRequest.model_validate_json(Path(request).read_text(encoding="utf-8"))
    try:
        found = judge_on_gate(asked)
    except SweeperError as error:
        found = GateFigures(problem=str(error))
    write_atomic(Path(answer), found.model_dump_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
