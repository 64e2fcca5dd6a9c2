"""The one-file report: complete, self-contained, honest and safe, whatever became of the study."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import optuna
import pytest

from sweeper.core.paths import StudyFolder, read_json, write_atomic
from sweeper.evaluation.sample_answers import SampleAnswer
from sweeper.reporting import report_evidence
from sweeper.reporting.figures import importance_figure
from sweeper.reporting.html_page import ASSETS, PageStudy, page
from sweeper.reporting.report_evidence import ReportEvidence, gather, importances, read_curve
from sweeper.reporting.results import StudyResults, TrialResult
from tests.conftest import run_program
from tests.reporting.pages import Page
from tests.reporting.studies import (
    FULL_COSTS,
    LORA_COSTS,
    make_arm,
    make_results,
    make_trial,
    two_arms,
)

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
MIB = 2**20


def render(results: StudyResults, evidence: ReportEvidence | None = None) -> str:
    """The page of one study whose folder is not there."""
    return page(
        [PageStudy(results, StudyFolder(Path("outputs/mine")), evidence or ReportEvidence())]
    )


def many(count: int) -> StudyResults:
    """Trials over rates and ranks, a third of them pruned."""
    trials = []
    for number in range(count):
        pruned = number % 3 == 2
        trial = make_trial(
            *("lora", number, "pruned" if pruned else "finished", 4.0 + (number * 37 % 100) / 200),
            {**LORA_COSTS, "parameters/trainable": 50.0 * (1 + number % 4)},
            learning_rate=10 ** (-4 + (number * 13 % 200) / 100),
            r=2 ** (1 + number % 4),
        )
        outcome = trial.outcome.model_copy(update={"steps": 32 if pruned else 64})
        more = {
            "adapter.alpha_over_r": 2 ** (number % 3),
            "adapter.target_modules": ("attention", "mlp", "all-linear")[number % 3],
            "training.warmup_ratio": number * 7 % 100 / 1000,
            "adapter.lora_dropout": number * 11 % 10 / 100,
        }
        trials.append(
            trial.model_copy(update={"outcome": outcome, "params": {**trial.params, **more}})
        )
    full = [make_trial("full", 0, "finished", 4.0, FULL_COSTS)]
    arms = [make_arm("lora", trials), make_arm("full", full, "full fine-tuning", "float32")]
    return make_results(*arms)


def curves(results: StudyResults, points: int = 16) -> ReportEvidence:
    """A falling curve for every trial, answers and a data card."""
    found = {
        (arm.name, trial.number): tuple((4 * n, 4.5 - 0.02 * n) for n in range(1, points))
        for arm in results.arms
        for trial in arm.trials
    }
    samples = (SampleAnswer("haiku", "Write a haiku.", "sea sea", "The sea is <b>calm</b>."),)
    card = "# Data card\n\nSource: x\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    return ReportEvidence(found, {"lora": samples}, card, {"lora": {"adapter.r": 0.7, "lr": 0.3}})


def all_failed() -> StudyResults:
    """Every trial of the only arm failed."""
    trials: list[TrialResult] = [make_trial("lora", n, "oom", None) for n in range(3)]
    return make_results(make_arm("lora", trials))


STUDIES = {
    "two arms": two_arms(4.05, 4.0),
    "no baseline": two_arms(4.05, None),
    "all failed": all_failed(),
    "no trial": make_results(make_arm("lora", [])),
    "many": many(60),
}


@pytest.fixture(params=STUDIES, name="study")
def _study(request: pytest.FixtureRequest) -> StudyResults:
    return STUDIES[request.param]


@pytest.fixture(params=["bare", "complete"], name="evidence")
def _evidence(request: pytest.FixtureRequest, study: StudyResults) -> ReportEvidence:
    return ReportEvidence() if request.param == "bare" else curves(study)


def test_every_study_gives_a_sound_page(study: StudyResults, evidence: ReportEvidence) -> None:
    """Tags match, headings descend one level at a time, tables and pictures say what they are."""
    found = Page.read(render(study, evidence))
    assert found.elements[0].attrs["lang"] == "en"
    assert [len(found.all(tag)) for tag in ("h1", "main", "html", "body")] == [1, 1, 1, 1]
    levels = [int(e.tag[1]) for e in found.elements if re.fullmatch(r"h\d", e.tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(head.attrs.get("scope") == "col" for head in found.all("th"))
    for picture in found.all("svg"):
        assert picture.attrs["role"] == "img"
        assert picture.attrs["aria-label"]
    described = [e for e in found.all("desc") if e.text]
    assert len(described) == len(found.all("svg"))


def test_page_fetches_nothing(study: StudyResults, evidence: ReportEvidence) -> None:
    """No attribute and no style names anything outside the file."""
    text = render(study, evidence)
    outward = [
        (e.tag, name, value)
        for e in Page.read(text).elements
        for name, value in e.attrs.items()
        if name in ("src", "href", "srcset", "action", "data") and not (value or "").startswith("#")
    ]
    assert outward == [("link", "href", "data:,")]
    assert "@import" not in text
    assert "url(" not in text


def test_hostile_strings_stay_text() -> None:
    """A name, a prompt, an answer, a message or a data card with HTML in it runs nothing."""
    results = all_failed()
    failed = make_trial("lora", 9, "crash", None)
    outcome = failed.outcome.model_copy(update={"message": HOSTILE})
    arm = make_arm(
        "lora",
        [failed.model_copy(update={"outcome": outcome}), make_trial("lora", 1, "finished", 4)],
    )
    results = make_results(arm).model_copy(
        update={"study_name": HOSTILE, "command": HOSTILE, "provenance": {HOSTILE: HOSTILE}}
    )
    card = f"# {HOSTILE}\n\n{HOSTILE}\n\n[x](http://evil) ![y](http://evil/z.png)\n"
    evidence = ReportEvidence({}, {"lora": (SampleAnswer("c", HOSTILE, HOSTILE, HOSTILE),)}, card)
    found = Page.read(render(results, evidence))
    assert len(found.all("script")) == 1
    assert not found.all("img")
    assert not [e for e in found.elements if any(name.startswith("on") for name in e.attrs)]
    assert all((e.attrs["href"] or "").startswith("#") for e in found.all("a"))
    assert HOSTILE in found.all("h1")[0].text


@pytest.mark.slow
def test_headline_is_the_verdict_of_results_json(tmp_path: Path) -> None:
    """The page's words and figures are those that the study wrote down as its verdict."""
    arguments = ["+experiment=lr_rank_sweep", "workers=fake", "tracking=none", "-m"]
    quick = ["hydra.sweeper.n_trials=4", "workers.fake.step_seconds=0"]
    result = run_program([*arguments, *quick], tmp_path)
    assert result.returncode == 0, result.stderr
    folder = StudyFolder(tmp_path / "outputs" / "lr_rank_sweep")
    verdict = read_json(folder.results)["verdict"]
    found = Page.read(folder.page.read_text(encoding="utf-8"))
    assert found.all("p", "words")[0].text == verdict["words"]
    duel = verdict["duels"][0]
    tiles = [tile.text for tile in found.all("strong")]
    assert tiles[0] == f"{duel['difference']['value']:+.4f} nats"
    trained = duel["side"]["trainable"] / duel["reference"]["trainable"]
    assert f"{100 * trained:.3g} %" in tiles
    best = min(
        trial["best_value"]
        for trial in read_json(folder.results)["arms"]["lora"]["trials"]
        if trial["cause"] == "finished"
    )
    assert f"{best:.4f}" in found.all("table")[0].text
    assert any("Loss curves" in figure.text for figure in found.all("figure"))
    assert len(found.all("polyline")) >= 4


def test_a_thousand_trials_stay_below_two_megabytes() -> None:
    """1,000 trials with curves give one page below 2 MB; 3,000 say what was left out."""
    for count in (1000, 3000):
        results = many(count)
        text = render(results, curves(results))
        assert len(text.encode()) < 2 * MIB
        assert ("more trials are in results.json" in text) == (count > 1000)


def test_rows_carry_the_command_that_trains_them_again() -> None:
    """A finished one is held against its record; a pruned one has no figure to hold it against."""
    codes = [e.text for e in Page.read(render(many(6))).all("code")]
    for number in range(6):
        folder = f"outputs/mine/lora/trial_{number:04d}"
        pruned = number % 3 == 2
        command = (
            f"sweeper trial {folder} --into again" if pruned else f"sweeper reproduce {folder}"
        )
        assert command in codes


def test_several_studies_share_a_page() -> None:
    """Each has its own part, under a table of all; ids are unique."""
    first, second = two_arms(4.05, 4.0), many(5).model_copy(update={"study_name": "other"})
    folder = StudyFolder(Path("outputs/mine"))
    text = page([PageStudy(results, folder, ReportEvidence()) for results in (first, second)])
    found = Page.read(text)
    assert [e.text for e in found.all("h2")] == ["mine", "other", "Terms"]
    assert found.all("caption")[0].text == "All studies"
    ids = [e.attrs["id"] for e in found.elements if "id" in e.attrs]
    assert len(set(ids)) == len(ids) > 8


def test_curve_of_a_running_trial_leaves_out_its_torn_line(tmp_path: Path) -> None:
    """A line that is still being written is no error, and lines without an evaluation are no points."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "train/loss": 5.0}\n{"step": 2, "eval/loss": 4.5}\n{"step": 4, "eval/lo'
    )
    assert read_curve(path) == ((2, 4.5),)
    assert read_curve(tmp_path / "none.jsonl") == ()


def _quadratic(count: int, **options: object) -> optuna.Study:
    study = optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=0),
        **options,  # type: ignore[arg-type]
    )
    sign = -1.0 if study.directions[0] is optuna.study.StudyDirection.MAXIMIZE else 1.0

    def value(trial: optuna.Trial) -> float | tuple[float, float]:
        x, y = trial.suggest_float("x", -1, 1), trial.suggest_float("y", -1, 1)
        loss = sign * (x**2 + 0.01 * y**2)
        return loss if len(study.directions) == 1 else (loss, 1.0)

    study.optimize(value, n_trials=count)
    return study


@pytest.mark.parametrize(
    "options",
    [{}, {"direction": "maximize"}, {"directions": ["minimize", "minimize"]}],
    ids=["minimize", "maximize", "with a cost"],
)
def test_the_setting_that_decides_matters_most(options: dict[str, object]) -> None:
    """Importances are found for either direction, and beside a cost; not from five trials."""
    shares = importances(_quadratic(40, **options))
    assert shares is not None
    assert list(shares) == ["x"]
    assert 0.8 < shares["x"] <= 1
    assert importances(_quadratic(5, **options)) is None


def _chances(count: int, trials: int = 20) -> int:
    """In how many of so many studies without any effect a setting is said to matter."""
    random = np.random.default_rng(0)
    found = 0
    for seed in range(count):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        for _ in range(trials):
            trial = study.ask()
            trial.suggest_float("rate", 1e-5, 1e-2, log=True)
            trial.suggest_categorical("rank", [2, 8, 32])
            trial.suggest_float("warmup", 0.0, 0.1)
            study.tell(trial, float(random.normal()))
        found += bool(importances(study))
    return found


@pytest.mark.slow
def test_a_setting_without_effect_is_rarely_said_to_matter() -> None:
    """Shares of noise sum to one too: of 200 studies without any effect at most 6 % name a setting."""
    assert _chances(200) <= 12


def test_importances_are_compared_setting_by_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna orders each answer by importance, and a setting is compared with itself all the same."""
    answers = itertools.chain(
        [{"decisive": 1.0, "always": 0.5}], itertools.repeat({"always": 0.5, "decisive": 0.1})
    )
    monkeypatch.setattr(report_evidence, "_divergences", lambda *_: next(answers))
    assert importances(_quadratic(6)) == {"decisive": pytest.approx(2 / 3)}


def test_a_trial_that_ends_during_the_report_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that still runs has more trials at each look than the report began with."""
    expected, inner = importances(_quadratic(40)), report_evidence._divergences

    def meanwhile(study: optuna.Study, values: Mapping[int, float]) -> dict[str, float]:
        one = {"params": {"x": 0.0, "y": 0.0}, "distributions": study.trials[0].distributions}
        study.add_trial(optuna.trial.create_trial(**one, value=0.0))
        return inner(study, values)

    monkeypatch.setattr(report_evidence, "_divergences", meanwhile)
    assert importances(_quadratic(40)) == expected


def test_chance_has_no_picture() -> None:
    """An arm whose importances may all be chance says so, and shows no bar."""
    arm = make_arm("lora", [make_trial("lora", 0, "finished", 4.0, LORA_COSTS)])
    figure = importance_figure(arm, ReportEvidence(importances={"lora": {}}))
    assert figure.svg is None
    assert "No setting is shown to matter" in figure.caption


def test_evidence_is_read_from_the_folders(tmp_path: Path) -> None:
    """Curves, samples of the best trial and a data card are found where the trials left them."""
    results, folder = two_arms(4.05, 4.0), StudyFolder(tmp_path)
    trial = folder.trial("lora", 0)
    write_atomic(trial.metrics, '{"step": 2, "eval/loss": 4.5}\n')
    write_atomic(trial.data_card, "# Data card\n")
    rows = [{"category": "c", "prompt": "p", "base": "b", "tuned": "t"}]
    write_atomic(trial.samples.with_suffix(".json"), json.dumps(rows))
    evidence = gather(results, folder)
    assert evidence.curves == {("lora", 0): ((2, 4.5),)}
    assert evidence.samples == {"lora": (SampleAnswer("c", "p", "b", "t"),), "full": ()}
    assert evidence.data_card == "# Data card\n"
    assert evidence.importances == {}


def _luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    """Every text and every series has a contrast of 4.5 or more, on the paper and on a panel."""
    blocks = re.findall(r":root \{(.*?)\}", (ASSETS / "picture.css").read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))
    for name in ("ink", "quiet", "accent", *(f"c{series}" for series in range(6))):
        for ground in ("paper", "panel"):
            assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    assert _contrast(colours["warn"], colours["warn-paper"]) >= 4.5
