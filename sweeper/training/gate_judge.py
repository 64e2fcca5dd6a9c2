"""Evaluate stored adapters and the untuned base on a gate split and on general text.

    python -m sweeper.training.gate_judge REQUEST.json ANSWER.json

A separate process, because the night imports no torch and the process's end frees the memory. The gate
is a separate source of rows. Rows that also occur in a split of one of the models, except for case and
white space, are left out. Independent of champions and their rules.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sweeper.config.compose import read_yaml
from sweeper.config.input_sources import describe_changes
from sweeper.config.settings import (
    DataSettings,
    GeneralTextSettings,
    TrialSettings,
    stored_settings,
)
from sweeper.core.errors import ArtifactError, DataError, SweeperError
from sweeper.core.input_digests import InputDigests
from sweeper.core.manifest import verify_manifest
from sweeper.core.outcome import GATE_BASE, GateFigures, GateRequest, Outcome
from sweeper.core.paths import TrialFolder, read_json, write_atomic
from sweeper.core.references import resolved
from sweeper.data.encode import encode_evaluation
from sweeper.data.examples import Example
from sweeper.data.general_text import general_rows
from sweeper.data.splits import load_examples, load_splits, seen_texts
from sweeper.data.tokens import Tokens
from sweeper.evaluation.judge import make_judge
from sweeper.evaluation.judgement_readers import JudgementReader
from sweeper.evaluation.token_loss import LossSum
from sweeper.modeling.adapter import load_adapter
from sweeper.modeling.base_model import LoadedBase, load_base
from sweeper.training.prepared_data import positions

MIN_EXAMPLES = 20
"""Minimum number of rows for a meaningful interval."""


def judge_on_gate(request: GateRequest) -> GateFigures:
    """Evaluate every trial's adapter, and the untuned base of the first trial.

    All models are evaluated on the general text of the first trial's settings.

    Raises:
        DataError: the gate or the general text cannot be read, too few rows of the gate are new to all
            models, or the models' tokens differ.
        ArtifactError: an adapter is missing or differs from its manifest, or its base model was changed.
    """
    settings = {
        name: stored_settings(read_yaml(TrialFolder(folder).config))
        for name, folder in request.trials.items()
    }
    first = next(iter(settings.values()))
    examples = load_examples(request.gate, first.data)
    seen = _seen(list(settings.values()))
    unseen = _unseen(examples, seen, first.data)
    if len(unseen) < MIN_EXAMPLES:
        raise DataError(
            f"gate={request.gate}: {len(unseen)} of its {len(examples)} rows occur in no other split. "
            f"At least {MIN_EXAMPLES} are needed"
        )
    texts = GateTexts(unseen, seen, first.evaluation.general_text)
    losses, general = {}, {}
    losses[GATE_BASE], general[GATE_BASE] = _losses(first, None, texts)
    for name, folder in request.trials.items():
        losses[name], general[name] = _losses(settings[name], TrialFolder(folder), texts)
    tokens, general_tokens = _tokens(losses), _tokens(general)
    if tokens is None or general_tokens is None:
        raise DataError(
            f"{', '.join(request.trials)}: their templates or tokenizers differ, so their losses are "
            "means over different tokens and cannot be compared"
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
    """The texts that every model is evaluated on."""

    examples: Sequence[Example]
    """Examples of the gate that occur in no split of the models."""
    task: Sequence[Example]
    """Examples of all splits of the models, which do not count as general text."""
    general: GeneralTextSettings


def _tokens(losses: Mapping[str, Sequence[LossSum]]) -> list[int] | None:
    """Return the number of target tokens of each text, or None if the numbers differ between models."""
    counts = {tuple(loss.tokens for loss in found) for found in losses.values()}
    return list(counts.pop()) if len(counts) == 1 else None


def _seen(settings: Sequence[TrialSettings]) -> list[Example]:
    """Return the examples of every split of the models."""
    sections = {each.data.model_dump_json(): each.data for each in settings}
    splits = [load_splits(data) for data in sections.values()]
    return [example for each in splits for found in each.examples.values() for example in found]


def _unseen(
    examples: Sequence[Example], seen: Sequence[Example], data: DataSettings
) -> list[Example]:
    """Return the examples that occur in no split, by the same comparison as between splits."""
    # A model was trained or chosen on these rows, or they are reserved for the test split
    met = seen_texts(data)
    for example in seen:
        met.add(example.text)
    return [example for example in examples if met.kind(example.text) is None]


def _losses(
    settings: TrialSettings, trial: TrialFolder | None, texts: GateTexts
) -> tuple[Sequence[LossSum], Sequence[LossSum]]:
    """Return a model's losses on each example of the gate and on each window of general text.

    Args:
        settings: the trial's settings, which also name the base.
        trial: the trial's folder, or None for the untuned base.
        texts: the texts to evaluate on.
    """
    # Loaded for each model, because some adapters change the base's weights
    base = load_base(settings.model, settings.quantization, trained=False)
    model = base.model
    if trial is not None:
        if not trial.adapter.is_dir():
            raise ArtifactError(f"{trial.adapter} is missing (deleted by `sweeper clean`?)")
        verify_manifest(trial.adapter)
        _require_own_base(trial, settings, base)
        model = load_adapter(base.model, trial.adapter)
    limit = positions(base.model.config)
    length = settings.data.max_length if isinstance(settings.data.max_length, int) else limit
    tokenizer, data = base.tokenizer, settings.data
    over_length = settings.evaluation.over_length
    rows = encode_evaluation(
        texts.examples, tokenizer, data, limit, length or 512, over_length
    ).rows
    windows: list[Tokens] = []
    if texts.general.source is not None:
        windows = general_rows(texts.general, texts.task, tokenizer, limit)

    def losses(tokenized: list[Tokens]) -> Sequence[LossSum]:
        judge = make_judge(
            tokenizer,
            tokenized,
            None,
            # All rows and the loss only, whatever the trial evaluated during its training
            settings.evaluation.model_copy(update={"look_rows": None, "metrics": {}}),
            data.split_seed,
            base.compute_dtype,
            settings.training.loss_chunk_size,
        )
        return judge(model, JudgementReader.CHAMPION).examples

    return losses(rows), losses(windows) if windows else []


def _require_own_base(trial: TrialFolder, settings: TrialSettings, base: LoadedBase) -> None:
    """Refuse an adapter whose base model was replaced since its training."""
    # Its weights would be added to others, and it would lose against any challenger
    found = InputDigests(base=base.digest, config=base.config_digest)
    if lines := describe_changes(_trained_on(trial), found, settings):
        raise ArtifactError(
            "\n".join([f"{trial.adapter}: its base model has changed since its training:", *lines])
        )


def _trained_on(trial: TrialFolder) -> InputDigests:
    """Return the digests of what a trial has read, as far as its version stored them."""
    if trial.outcome.exists():
        outcome = Outcome.model_validate_json(trial.outcome.read_text(encoding="utf-8"))
        if outcome.inputs is not None:
            return outcome.inputs
    stored = read_json(trial.provenance) if trial.provenance.exists() else {}
    return InputDigests(base=stored.get("base.digest"))


def main(request: str, answer: str) -> None:
    """Read a GateRequest, and write GateFigures with the losses or the problem."""
    parsed = GateRequest.model_validate_json(Path(request).read_text(encoding="utf-8"))
    try:
        # the file holds references for what the set takes from the environment
        gate, trials = resolved(parsed.gate), parsed.trials.items()
        paths = {name: Path(resolved(str(path))) for name, path in trials}
        figures = judge_on_gate(GateRequest(gate=gate, trials=paths))
    except SweeperError as error:
        figures = GateFigures(problem=str(error))
    write_atomic(Path(answer), figures.model_dump_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
