"""Fill the parts of a run that MLflow's pages show: its source, its data and its model.

Contains MLflow's names for these parts. Independent of retries and marks.
"""

from __future__ import annotations

import getpass
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper.config.settings import EMBEDDED
from sweeper.core.redaction import redact
from sweeper.tracking.tracker import DatasetRecord
from sweeper.tracking.tracking_ledger import RunEnding

if TYPE_CHECKING:
    from mlflow import MlflowClient

COMMIT = re.compile(r"[0-9a-f]{40}")
NAME_CHARS, DIGEST_CHARS = 500, 36
"""Maximum characters of a dataset's name and digest in MLflow."""
SHOWN = ("best/", "parameters/trainable")
"""Prefixes of the run's metrics that the model's own page shows."""


VIEW = "sweeper"
"""Name of the experiment's view in MLflow's UI, as its address has it."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
DESCRIPTION_TAG = "mlflow.note.content"
VIEW_COLUMNS = (
    *("params.`training.learning_rate`", "params.`adapter.r`", "params.`adapter.target_modules`"),
    *("metrics.`parameters/trainable`", "metrics.`cost/seconds`", "tags.`cause`"),
    "attributes.`Models`",
)


def experiment_tags(experiment: str, metric: str, direction: str) -> dict[str, str]:
    """Return the tags that decide what MLflow's UI shows of an experiment.

    They make it show runs instead of traces, chart this metric first, describe the experiment, and
    offer a view of the trials by this metric. Without a view the UI shows no column of a metric.

    Args:
        experiment: the experiment's id.
        metric: the objective's metric.
        direction: minimize or maximize.
    """
    best = metric.replace("eval/", "best/eval_")
    order = f"metrics.`{best}`"
    view = {
        "selectedColumns": [order, *VIEW_COLUMNS],
        "orderByKey": order,
        "orderByAsc": direction == "minimize",
    }
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": best,
        "mlflow.experiment.primaryMetric.greaterIsBetter": str(direction == "maximize").lower(),
        VIEW_TAG: json.dumps(view),
        DESCRIPTION_TAG: (
            f"Studies of sweeper. Each study is a run, and each of its trials a run below that one. "
            f"[The trials by {best}](#/experiments/{experiment}/runs?viewStateShareKey={VIEW}). The "
            "page of a study's run has its verdict."
        ),
    }


def source_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return MLflow's own tags for a run's source, which its UI shows and searches."""
    found = {"mlflow.source.name": tags.get("command"), "mlflow.source.type": "LOCAL"}
    if COMMIT.fullmatch(tags.get("git.commit", "")):
        found["mlflow.source.git.commit"] = tags["git.commit"]
    try:
        found["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        pass
    return {name: value for name, value in found.items() if value is not None}


def log_dataset(client: MlflowClient, run: str, data: DatasetRecord) -> None:
    """Record the data as the run's input."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # The entity directly, because mlflow.data's constructors need the data in memory
    kind, source = dataset_source(data.sources)
    entity = Dataset(
        name=data.name[:NAME_CHARS],
        digest=data.digest[:DIGEST_CHARS],
        source_type=kind,
        source=json.dumps(source),
        profile=json.dumps(data.profile),
    )
    client.log_inputs(run, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])


def dataset_source(paths: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return a dataset source's type and content in the format of mlflow.data.get_source."""
    if len(paths) > 1:
        # mlflow.data has no type for several sources
        return "external", {"uris": [redact(path) for path in paths]}
    (path,) = paths
    if path == EMBEDDED:
        return "code", {"tags": {"mlflow.source.name": "sweeper.embedded"}}
    if path.startswith(("http://", "https://")):
        return "http", {"url": redact(path)}
    if "://" in path or Path(path).exists():
        return "local", {"uri": redact(path)}
    return "hugging_face", {"path": path}


def show_model(client: MlflowClient, run: str, model: str, ending: RunEnding) -> None:
    """Make a model an output of its run, with some of the run's metrics."""
    # The points equal the run's own in time and step, so the store holds each of them once
    from mlflow.entities import LoggedModelOutput, Metric

    client.log_outputs(run, [LoggedModelOutput(model, 0)])
    points = [
        Metric(name, value, ending.time_ms, 0, model_id=model)
        for name, value in ending.metrics.items()
        if name.startswith(SHOWN)
    ]
    client.log_batch(run, metrics=points)
