"""The settings that decide a trial's result, as texts and as one digest.

A study's question is made of them, and a trial's folder is identified by them.
"""

from __future__ import annotations

import hashlib
import json

from sweeper.config.added_settings import ADDED_SETTINGS, RENAMED_SETTINGS, meaning
from sweeper.config.section import flatten
from sweeper.config.trial_settings import TrialSettings

DIGESTED = ("model.base_model", "model.revision", "data.train", "data.validation", "data.test")
"""Settings that name things whose content has a digest. A data source may be a mapping of its own."""
WITHOUT_EFFECT = (
    "artifacts",  # what is stored beside the kept weights
    "evaluation.per_device_eval_batch_size",  # padding and batching change no figure
    "evaluation.generation.batch_size",
    "evaluation.general_text",  # read when every search has ended
    "evaluation.serve_as",  # the form in which a winner is judged, after every search
    "evaluation.rouge_path",  # evaluate and rouge_score give the same figures
    "training.logging_steps",
    "training.save_steps",  # a new best is saved at once, whatever this says
    "training.save_total_limit",  # the best checkpoint is never among those deleted
    "training.loss_chunk_size",  # the same loss, computed in pieces
    "training.micro_batch",  # the effective batch stays
    "training.devices_per_trial",  # and devices share it
    "training.fsdp",  # or the weights as well
)
"""Settings, or sections of them, that change no trial's value."""
_LEFT_OUT = tuple(f"{name}." for name in (*DIGESTED, *WITHOUT_EFFECT))


def decisive_settings(settings: TrialSettings) -> dict[str, str]:
    """Return the settings that decide a trial's result, as JSON texts by dotted key."""
    found = flatten(settings.model_dump(mode="json"))
    return {
        key: meaning(key, json.dumps(value))
        for key, value in found.items()
        if not _is_left_out(key)
    }


def settings_digest(settings: TrialSettings) -> str:
    """Return the sha256 of the settings that decide a trial's result."""
    decided = digested_settings(settings)
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def accepted_digests(*forms: TrialSettings) -> list[str]:
    """Return the digests under which the work of a trial with one of these settings may be stored.

    Settings of SET_LATER may have had their defaults when the trial began.
    """
    unequal: list[TrialSettings] = []
    for each in (kind for form in forms for kind in (form, _as_begun(form))):
        if each not in unequal:  # a comparison costs less than a digest
            unequal.append(each)
    return [settings_digest(each) for each in unequal]


def _as_begun(settings: TrialSettings) -> TrialSettings:
    data = settings.data.model_copy(update={"ignore_columns": []})
    return settings.model_copy(update={"data": data})


def digested_settings(settings: TrialSettings) -> dict[str, str]:
    """Return the decisive settings that a digest covers, as JSON texts by dotted key."""
    # A setting that a later version adds must not change the digests of today, so a setting at the
    # value that reproduces the old behaviour is left out, and a renamed one keeps its first name.
    return {
        RENAMED_SETTINGS.get(key, key): text
        for key, text in decisive_settings(settings).items()
        if key not in ADDED_SETTINGS or text != json.dumps(ADDED_SETTINGS[key])
    }


def _is_left_out(key: str) -> bool:
    return f"{key}.".startswith(_LEFT_OUT)
