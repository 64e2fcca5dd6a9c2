"""How large a trial would be, counted on the meta device: no weight is loaded.

Run by `dry_run=true` in a process of its own (`python -m sweeper.modeling.footprint`), because
orchestration imports no torch: a JSON list of trial settings on stdin, one of footprints on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import SweeperError
from sweeper.core.outcome import TrialFootprint
from sweeper.modeling.hardware import device
from sweeper.modeling.memory_estimate import estimate_trial
from sweeper.modeling.model_source import load_config
from sweeper.modeling.trial_check import ModelChecks

BYTES_OF_FP32 = 4
MIB = 2**20
LONGEST_ROW = 4096
"""Tokens that `data.max_length=auto` never passes (sweeper.data.encode)."""


def footprint(settings: TrialSettings) -> TrialFootprint:
    """Parameters, memory and artifact of one trial, whose trained weights are kept in fp32.

    The memory is that of a batch of the longest rows that data.max_length allows.

    Raises:
        ModelError: there is no such model, or the adapter does not fit it.
    """
    size = ModelChecks().size(settings, device())
    ranked = settings.with_rank(size.rank)
    return TrialFootprint(
        trainable=size.trainable,
        total=size.total,
        artifact_mib=size.trainable * BYTES_OF_FP32 / MIB,
        peak_mib=estimate_trial(ranked, device(), length=_longest_row(settings)).total,
    )


def answer(document: Mapping[str, Any]) -> TrialFootprint:
    """The footprint of settings, or why there is none."""
    try:
        return footprint(TrialSettings.model_validate(document))
    except SweeperError as error:
        return TrialFootprint(problem=str(error))


def _longest_row(settings: TrialSettings) -> int:
    asked = settings.data.max_length
    wanted = LONGEST_ROW if asked == "auto" else asked
    limit = getattr(load_config(settings.model), "max_position_embeddings", None)
    return wanted if limit is None else min(wanted, int(limit))


if __name__ == "__main__":
    print(json.dumps([answer(document).model_dump() for document in json.load(sys.stdin)]))
