"""Export a trial as one merged model, and evaluate that model, because merging changes the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sweeper.config.settings import UNQUANTIZED, TrialSettings
from sweeper.core.manifest import write_manifest
from sweeper.core.paths import TrialFolder, write_atomic
from sweeper.core.trained_form import read_trained_form
from sweeper.evaluation.judgement_readers import JudgementReader
from sweeper.modeling.base_model import load_base
from sweeper.modeling.hardware import choose_dtype, device, dtype_name
from sweeper.modeling.merge import MergeDtype, merge
from sweeper.modeling.model_source import find_source
from sweeper.training.model_card import README, model_card
from sweeper.training.prepared_data import PreparedData

if TYPE_CHECKING:
    from sweeper.modeling.base_model import LoadedBase


def export_merged(settings: TrialSettings, folder: TrialFolder) -> LoadedBase:
    """Merge a trial's adapter into its unquantized base, store the result and load it from disk.

    Raises:
        ModelError: the base cannot be loaded, or the adapter does not fit it.
    """
    return load_merged(settings, folder, folder.merged)


def load_merged(settings: TrialSettings, folder: TrialFolder, out: Path) -> LoadedBase:
    """Merge a trial's adapter into its unquantized base in `out`, and load the result from there.

    Raises:
        ModelError: the base cannot be loaded, the adapter does not fit it, or `out` is in use.
    """
    merge_trial(settings, folder, out)
    model = settings.model.model_copy(update={"base_model": str(out), "revision": None})
    return load_base(model, UNQUANTIZED, trained=False)


def merge_trial(
    settings: TrialSettings,
    folder: TrialFolder,
    out: Path,
    figures: Mapping[str, float] | None = None,
) -> None:
    """Merge a trial's adapter into its unquantized base and store the result in `out`, with a manifest.

    Args:
        settings: settings of the trial.
        folder: folder of the trial.
        out: folder of the merged model.
        figures: metrics of the merged model for its card, if they are known.

    Raises:
        ModelError: the base cannot be found, the adapter does not fit it, or `out` is in use.
    """
    dtype = cast(MergeDtype, dtype_name(choose_dtype(settings.model.dtype, device()).dtype))
    base = find_source(settings.model).folder
    merge(base, folder.adapter, out, dtype)
    if (form := read_trained_form(out)) is not None:
        card = model_card(settings, figures or {}, base, form, merged=True)
        write_atomic(out / README, card)
    write_manifest(out)


def merged_figures(
    merged: LoadedBase, prepared: PreparedData, settings: TrialSettings
) -> dict[str, float]:
    """Evaluate the merged model on the validation split and return its metrics as merged/eval_…."""
    # After QLoRA the merged model (16-bit base + adapter) is not the one that was trained (4-bit base)
    judgement = prepared.judge(settings, merged)(merged.model, JudgementReader.MERGED)
    return {
        name.replace("eval/", "merged/eval_"): value
        for name, value in judgement.metrics.items()
        if name.startswith("eval/")
    }
