"""A winner is judged again in the forms in which it is served."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from sweeper.commands import winner_cards
from sweeper.commands.winner_cards import add_served_losses
from sweeper.config.compose import read_yaml
from sweeper.config.settings import TrialSettings, stored_settings
from sweeper.core.errors import ArtifactError
from sweeper.core.manifest import verify_manifest, write_manifest
from sweeper.core.outcome import ExampleLosses, HeldOutLosses
from sweeper.core.paths import StudyFolder, TrialFolder
from sweeper.reporting.finalist_results import FinalistRanking
from sweeper.reporting.results import StudyResults
from sweeper.reporting.served_forms import served_contrasts, served_sentences, served_warning
from sweeper.reporting.verdict import judge
from sweeper.training.artifact import write_zip
from sweeper.training.trial_runner import TransformersRunner
from tests.reporting.studies import make_arm, make_results, make_trial
from tests.reporting.test_html_page import render
from tests.training.conftest import RunTiny

TRAINED = ExampleLosses(nll=tuple(float(n) for n in range(40, 60)), tokens=(10,) * 20)


def _shifted(shift: float, noise: float = 0.0) -> HeldOutLosses:
    nll = (n + 10 * (shift + noise * (-1) ** k) for k, n in enumerate(TRAINED.nll))
    return HeldOutLosses(test=ExampleLosses(nll=tuple(nll), tokens=TRAINED.tokens))


def _judged(runner: TransformersRunner, settings: TrialSettings, folder: TrialFolder) -> float:
    losses = runner.test(settings, folder, ("test",)).test
    assert losses is not None
    return losses.loss


def test_each_form_is_another_model(run_tiny: RunTiny) -> None:
    """On 4 bits the adapter alone is what was trained, and merged is the adapter on the full base."""
    runner = TransformersRunner(threads=1)
    _, _, folder = run_tiny("t", "quantization=nf4", "training.learning_rate=0.05", runner=runner)
    settings = stored_settings(read_yaml(folder.config))
    before = {path.name for path in folder.path.iterdir()}
    found = {
        form: _judged(runner, settings.served_as(form), folder) for form in settings.serve_forms
    }
    assert list(found) == ["trained", "unquantized", "merged"]
    assert found["merged"] == pytest.approx(found["unquantized"], abs=1e-4)
    assert abs(found["unquantized"] - found["trained"]) > 1e-4
    assert {path.name for path in folder.path.iterdir()} == before, (
        "nothing of the merged model stays"
    )
    assert _judged(runner, settings, folder) == pytest.approx(found["trained"], abs=1e-6)


def test_an_unquantized_base_leaves_two_forms_and_full_weights_none(run_tiny: RunTiny) -> None:
    """There is nothing to judge again where a form is the trained one."""
    from tests.conftest import make_settings

    assert make_settings("quantization=none").trial.serve_forms == ("trained", "merged")
    whole = make_settings("adapter=none", "quantization=none").trial
    assert whole.serve_forms == ()
    assert whole.served_as("merged") is whole


def test_a_difference_beyond_zero_is_a_warning() -> None:
    """The interval of paired rows decides: a constant shift is found, noise around zero is none."""
    served = {"trained": HeldOutLosses(test=TRAINED), "unquantized": _shifted(0.02, 0.01)}
    (worse,) = served_contrasts("lora", served)  # type: ignore[arg-type]
    assert worse.is_worse
    assert worse.difference.value == pytest.approx(0.02)
    words = served_warning([worse, worse], {"lora": "QLoRA"})
    assert words.startswith("WARNING: QLoRA is worse as it is served than as it was trained: ")
    assert words.count("WARNING") == 1
    assert words.endswith(
        "+0.0200 nats, a factor of 1.020 in perplexity (unquantized, unquantized)."
    )
    served["unquantized"] = _shifted(0.0, 0.01)
    (same,) = served_contrasts("lora", served)  # type: ignore[arg-type]
    assert not same.differs
    assert served_warning([same], {}) == ""
    (words,) = served_sentences([same], {"lora": "QLoRA"})
    assert words.startswith("Test loss of QLoRA as it is served: 4.95")


def test_without_the_trained_form_there_is_no_contrast() -> None:
    """A judgement that failed leaves nothing to compare with."""
    assert served_contrasts("lora", {"merged": _shifted(0.1)}) == []


CARD = "# Mine\n\n## Use\n\nLoad it.\n"


def _stored_winner(folder: StudyFolder) -> tuple[TrialFolder, StudyResults]:
    trial = folder.trial("lora", 0)
    trial.adapter.mkdir(parents=True)
    (trial.adapter / "adapter_config.json").write_text("{}")
    (trial.adapter / "README.md").write_text(CARD)
    write_manifest(trial.adapter)
    served = {"trained": HeldOutLosses(test=TRAINED), "merged": _shifted(0.02, 0.01)}
    final = FinalistRanking(finalists=(), winner=0)
    arm = make_arm("lora", [make_trial("lora", 0, "finished", 4.0)])
    contrasts = tuple(served_contrasts("lora", served))  # type: ignore[arg-type]
    return trial, make_results(arm.model_copy(update={"final": final}), served=contrasts)


def _holds_the_card(trial: TrialFolder) -> bool:
    """Return True if archive and manifest hold the card that names the losses as it is served."""
    verify_manifest(trial.adapter)
    with zipfile.ZipFile(trial.archive) as archive:
        same = (
            archive.read(name) == (trial.adapter / name).read_bytes()
            for name in ("README.md", "manifest.json")
        )
        return all(same) and b"as it is served" in archive.read("README.md")


def test_the_archive_has_the_card_with_the_served_losses(tmp_path: Path) -> None:
    """artifacts.zip is written before the winner is known, and again with the losses as it is served."""
    folder = StudyFolder(tmp_path)
    trial, results = _stored_winner(folder)
    add_served_losses(results, folder)
    assert not trial.archive.exists(), "without artifacts.zip there is none"
    write_zip(trial.adapter, trial.archive)
    (trial.adapter / "README.md").write_text(CARD)
    add_served_losses(results, folder)
    assert _holds_the_card(trial)


@pytest.mark.parametrize("after", ["write_atomic", "renew_entry"])
def test_a_kill_between_card_and_archive_is_mended_by_the_next_start(
    after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that dies after the card or after the manifest leaves them to be written again."""
    folder = StudyFolder(tmp_path)
    trial, results = _stored_winner(folder)
    write_zip(trial.adapter, trial.archive)
    real = getattr(winner_cards, after)

    def killed(*args: object) -> None:
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(winner_cards, after, killed)
        with pytest.raises(KeyboardInterrupt):
            add_served_losses(results, folder)
    add_served_losses(results, folder)
    assert _holds_the_card(trial)
    written = trial.archive.stat().st_mtime_ns
    add_served_losses(results, folder)
    assert trial.archive.stat().st_mtime_ns == written, "a whole archive is left as it is"


def test_a_new_card_hides_no_damage(tmp_path: Path) -> None:
    """Only the card's line of the manifest is new: a weight that was changed since is still found."""
    folder = StudyFolder(tmp_path)
    trial, results = _stored_winner(folder)
    (trial.adapter / "adapter_config.json").write_text("{1}")
    add_served_losses(results, folder)
    with pytest.raises(ArtifactError, match=r"adapter_config\.json: changed"):
        verify_manifest(trial.adapter)


def test_a_verdict_with_served_forms_is_json() -> None:
    """The forms are in the verdict's document, its headline, its sentences and on the page."""
    served = {"trained": HeldOutLosses(test=TRAINED), "merged": _shifted(0.02, 0.01)}
    results = make_results(make_arm("lora", [make_trial("lora", 0, "finished", 4.0)]))
    contrasts = tuple(served_contrasts("lora", served))  # type: ignore[arg-type]
    verdict = judge(results.model_copy(update={"served": contrasts}))
    document = json.loads(json.dumps(verdict.document()))
    assert document["served"][0]["form"] == "merged"
    assert verdict.served_line in render(results.model_copy(update={"served": contrasts}))
    assert "is worse as it is served than as it was trained" in verdict.headline
    assert "as it is served" in document["words"]
