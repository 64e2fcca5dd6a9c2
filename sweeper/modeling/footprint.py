"""How large a trial would be, counted on the meta device: no weight is loaded.

Run by `dry_run=true` in a process of its own (`python -m sweeper.modeling.footprint`), because
orchestration imports no torch: a JSON list of trial settings on stdin, one of footprints on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sweeper.errors import SweeperError
from sweeper.modeling.adapter import attach, count_parameters
from sweeper.modeling.base import base_folder
from sweeper.settings import LoraAdapter, TrialSettings

BYTES_OF_FP32 = 4
MIB = 2**20


def footprint(settings: TrialSettings) -> dict[str, Any]:
    """Parameters and the size of the artifact of one trial, whose trained weights are kept in fp32.

    Raises:
        ModelError: there is no such model, or the adapter does not fit it.
    """
    config = AutoConfig.from_pretrained(base_folder(settings.model))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if isinstance(settings.adapter, LoraAdapter):
            model = attach(model, settings.adapter)
    count = count_parameters(model)
    return {
        "trainable": count.trainable,
        "total": count.total,
        "artifact_mib": count.trainable * BYTES_OF_FP32 / MIB,
        "peak_mib": None,
        "problem": None,
    }


def answer(document: Mapping[str, Any]) -> dict[str, Any]:
    """The footprint of settings, or why there is none."""
    try:
        return footprint(TrialSettings.model_validate(document))
    except SweeperError as error:
        none = dict.fromkeys(("trainable", "total", "artifact_mib", "peak_mib"))
        return {**none, "problem": str(error)}


if __name__ == "__main__":
    print(json.dumps([answer(document) for document in json.load(sys.stdin)]))
