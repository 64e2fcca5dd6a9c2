"""Every figure that a reader meets first is one that MLflow holds: none is made up by the page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from sweeper.commands.run_study import run_study
from sweeper.core.paths import StudyFolder, read_json
from sweeper.reporting.study_progress import short_names
from sweeper.search.study_plan import studies
from sweeper.tracking.tracking_server import local_uri
from tests.reporting.pages import Page

OVERRIDES = (
    *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline", "pruner=none"),
    *(
        "workers.fake.step_seconds=0.001",
        "hydra.sweeper.n_trials=5",
        "hydra.sweeper.finalists.seeds=2",
    ),
    # The fake LoRA's best point: 0.04 nats ahead of the best full fine-tune
    "hydra.sweeper.priors=[{training.learning_rate: 5e-3, adapter.r: 32}]",
)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study of two arms and finalists, recorded in MLflow."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (plan,) = studies(OVERRIDES)
        run_study(plan)
    return folder


@pytest.fixture(scope="module")
def runs(user: Path) -> dict[str, Run]:
    """All runs of the study in MLflow by trial; the parent's key is empty."""
    client = MlflowClient(local_uri(user / "mlruns"))
    experiment = client.get_experiment_by_name("lr_rank_sweep")
    found = client.search_runs([experiment.experiment_id])
    return {run.data.tags.get("sweeper.trial", ""): run for run in found}


@pytest.fixture(scope="module")
def page(user: Path) -> Page:
    """report.html."""
    path = StudyFolder(user / "outputs" / "lr_rank_sweep").page
    return Page.read(path.read_text(encoding="utf-8"))


def _best(runs: dict[str, Run], arm: str) -> Run:
    """The trial whose mean over its seeds is the lowest: of one finalist an arm, the best one."""
    trials = [run for key, run in runs.items() if re.fullmatch(rf"{arm}/\d+", key)]
    return min(trials, key=lambda run: run.data.metrics["best/eval_loss"])


def _point(run: Run, keys: list[str]) -> str:
    values: dict[str, Any] = {}
    for key in keys:
        text = run.data.params[key]
        values[key] = float(text) if re.fullmatch(r"[\d.e-]+", text) and "." in text else text
    return ", ".join(f"{name}={value}" for name, value in short_names(values).items())


def _told(runs: dict[str, Run]) -> Iterator[str]:
    """Each part of the headline that has figures, made of what MLflow holds alone."""
    parent, lora, full = runs[""].data.metrics, _best(runs, "lora"), _best(runs, "full")
    at = "verdict/lora"
    retained = [parent[f"{at}/retained_percent{end}"] for end in ("", "_low", "_high")]
    yield "retains {:.1f} % (95 % interval {:.1f} to {:.1f})".format(*retained)
    losses = parent["test/lora/loss"], parent["test/full/loss"]
    yield "test loss {:.4f} against {:.4f}".format(*losses)
    difference = losses[0] - losses[1]
    ends = parent[f"{at}/difference_low"], parent[f"{at}/difference_high"]
    # The fake trainer's arms are far apart.
    yield f"is ahead by {abs(difference):.4f} nats"
    yield "(95 % interval {:.4f} to {:.4f}; ".format(*sorted(map(abs, ends)))
    yield _factor(abs(difference))
    trainable = [run.data.metrics["parameters/trainable"] for run in (lora, full)]
    yield f"trains {100 * trainable[0] / trainable[1]:.3g} % of the parameters"
    # Told only if it exceeds its spread.
    if (time := parent.get(f"{at}/time_ratio")) is not None:
        low, high = parent[f"{at}/time_ratio_low"], parent[f"{at}/time_ratio_high"]
        yield f"takes {time:.3g}× (95 % interval {low:.3g} to {high:.3g}) the time of a training"
    for arm, name in (("lora", "QLoRA"), ("full", "full fine-tuning")):
        forgotten = [parent[f"general/{arm}/forgetting{end}"] for end in ("", "_low", "_high")]
        yield f"{name} {forgotten[0]:+.4f} (95 % interval {forgotten[1]:+.4f} to {forgotten[2]:+.4f}; "
        yield _factor(forgotten[0])
    # Seed 1 chose the winner with the trial's own, and the seeds after it are fresh.
    fresh = r"{}/\d+_seed_[2-9]"
    seeds = [
        sum(re.fullmatch(fresh.format(arm), key) is not None for key in runs)
        for arm in ("lora", "full")
    ]
    yield "Judged on {} against {} fresh seeds".format(*seeds)
    noise = parent[f"{at}/noise"], parent[f"{at}/reference_noise"]
    yield "{:.4f} (QLoRA), {:.4f} (full fine-tuning)".format(*noise)


def _factor(nats: float) -> str:
    return f"a factor of {math.exp(nats):.3f} in perplexity)"


def test_every_figure_of_the_headline_is_mlflows(runs: dict[str, Run], page: Page) -> None:
    """Sentence by sentence from MLflow's values; what is left over has no digit in it."""
    words = page.all("p", "words")[0].text
    doubts = re.match(r"PROVISIONAL: .*?\. (?=The best QLoRA )", words)
    rest = words[doubts.end() :] if doubts else words
    keys = [key.removeprefix("best.") for key in runs[""].data.tags if key.startswith("best.")]
    keys.remove("trial")
    point = re.search(r"The best QLoRA \((.*?)\)", rest)
    assert point is not None
    shown = dict(each.split("=") for each in point[1].split(", "))
    mine = dict(each.split("=") for each in _point(_best(runs, "lora"), keys).split(", "))
    assert shown == mine
    rest = rest.replace(point[1], "")
    # Ends of ranges are the experiment's, and MLflow holds none.
    edge = r"The best trial of [\w -]+ has \w+=[\d.e-]+, [^(]*? offered \([^)]*\)"
    rest = re.sub(edge + r"(, as all of its best 5 trials)?\.", "", rest)
    # Numbers of trials by how they ended, and expectations over them, are the report's own.
    rest = re.sub(
        r"Search: QLoRA .*?\)\.|The expected best eval loss of .*? fine-tuning\.", "", rest
    )
    for part in _told(runs):
        assert part in rest, (part, words)
        rest = rest.replace(part, "")
    assert not re.search(r"\d", rest), rest


def test_each_difference_in_nats_has_its_factor(page: Page) -> None:
    """A reader of the page never has to compute what a difference in nats is in perplexity."""
    text = page.all("main")[0].text
    found = list(re.finditer(r"[+-]?\d+\.\d+ nats\b", text))
    assert len(found) >= 3
    for each in found:
        after = text[each.end() : each.end() + 200]
        assert re.search(r"a factor of \d|× the perplexity", after), text[each.start() :][:220]


def test_tiles_are_mlflows(runs: dict[str, Run], page: Page) -> None:
    """The large figures: the difference, what is retained, parameters, and the time if it is told."""
    parent = runs[""].data.metrics
    tiles = [tile.text for tile in page.all("strong")]
    trainable = [_best(runs, arm).data.metrics["parameters/trainable"] for arm in ("lora", "full")]
    assert tiles[:3] == [
        f"{parent['verdict/lora/difference']:+.4f} nats",
        f"{parent['verdict/lora/retained_percent']:.1f} %",
        f"{100 * trainable[0] / trainable[1]:.3g} %",
    ]
    time = parent.get("verdict/lora/time_ratio")
    assert tiles[3:] == ([] if time is None else [f"{time:.2g}×"])


def test_the_answer_is_one_sentence_before_all_figures(page: Page) -> None:
    """The outcome, and the forgetting whose intervals do not overlap, without a figure of the task."""
    (headline,) = page.all("p", "headline")
    assert headline.text.startswith("QLoRA is ahead.")
    assert "Full fine-tuning forgets more: +0.20 against +0.02 nats of QLoRA" in headline.text


def test_the_verdict_is_that_of_results_json(user: Path, runs: dict[str, Run], page: Page) -> None:
    """What MLflow, the file and the page say is one verdict."""
    verdict = read_json(StudyFolder(user / "outputs" / "lr_rank_sweep").results)["verdict"]
    assert page.all("p", "words")[0].text == verdict["words"]
    (duel,) = verdict["duels"]
    parent = runs[""].data.metrics
    assert parent["verdict/lora/difference"] == duel["difference"]["value"]
    assert parent["verdict/lora/retained_percent_low"] == duel["retained"]["low"]
    assert runs[""].data.tags["mlflow.note.content"].find(verdict["words"][:200]) > 0
