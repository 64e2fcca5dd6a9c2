"""Compute the size of trials on the meta device, without loading weights.

`dry_run=true` runs this module in a separate process (`python -m sweeper.modeling.footprint`), because
orchestration imports no torch. Reads a JSON list of trial settings from stdin and prints a list of
footprints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import SweeperError
from sweeper.core.outcome import TrialFootprint
from sweeper.core.signals import exit_with_parent
from sweeper.modeling.hardware import device
from sweeper.modeling.memory_estimate import estimate_trial
from sweeper.modeling.model_source import load_config
from sweeper.modeling.trial_check import ModelChecks

BYTES_OF_FP32 = 4
MIB = 2**20
LONGEST_ROW = 4096
"""Upper limit of `data.max_length=auto` in tokens (sweeper.data.encode)."""


def footprint(settings: TrialSettings) -> TrialFootprint:
    """Return parameters, peak memory and artifact size of one trial.

    The peak is that of a batch of the longest rows that data.max_length allows. The artifact's weights
    are fp32.

    Raises:
        ModelError: the model does not exist, or the adapter does not fit the model.
    """
    size = ModelChecks().size(settings, device())
    ranked = settings.with_rank(size.rank)
    return TrialFootprint(
        trainable=size.trainable,
        total=size.total,
        artifact_mib=size.trainable * BYTES_OF_FP32 / MIB,
        peak_mib=estimate_trial(ranked, device(), length=_longest_row(settings)).total,
    )


def footprint_or_problem(document: Mapping[str, Any]) -> TrialFootprint:
    """Return the footprint of a trial's settings, or the reason for its absence under `problem`."""
    try:
        return footprint(TrialSettings.model_validate(document))
    except SweeperError as error:
        return TrialFootprint(problem=str(error))


def _longest_row(settings: TrialSettings) -> int:
    configured = settings.data.max_length
    longest = LONGEST_ROW if configured == "auto" else configured
    text = load_config(settings.model).get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    return longest if limit is None else min(longest, int(limit))


if __name__ == "__main__":
    exit_with_parent()
    footprints = [footprint_or_problem(document) for document in json.load(sys.stdin)]
    print(json.dumps([each.model_dump() for each in footprints]))
