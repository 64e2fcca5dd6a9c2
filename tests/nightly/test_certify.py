"""The last word on a champion: judged on the test split, recorded, and every look counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from sweeper.core.errors import DataError, TrackingError
from sweeper.core.outcome import ExampleLosses, HeldOutLosses
from sweeper.core.paths import TrialFolder, read_json, write_json
from sweeper.data.splits import load_splits
from sweeper.nightly.certify import CERTIFIED_TAG, certify
from sweeper.tracking.registry import ModelVersion
from tests.conftest import make_settings

TOKENS = (10,) * 40


def _unseen(loss: float, general: float | None) -> HeldOutLosses:
    """Examples of different difficulty, the same for every model."""
    nll = tuple(count * (loss + 0.1 * (place % 5)) for place, count in enumerate(TOKENS))
    plain = None if general is None else ExampleLosses(nll=(10 * general,), tokens=(10,))
    return HeldOutLosses(test=ExampleLosses(nll=nll, tokens=TOKENS), general=plain)


class Models:
    """A registry of one model in memory."""

    def __init__(self, *versions: ModelVersion) -> None:
        self.all = list(versions)

    def champion(self, model: str) -> ModelVersion | None:
        """The newest."""
        return self.all[-1] if self.all else None

    def versions(self, model: str) -> list[ModelVersion]:
        """All of them."""
        return self.all

    def tag(self, version: ModelVersion, key: str, value: str) -> None:
        """Write it into the version."""
        place = self.all.index(version)
        tags = {**version.tags, key: value}
        self.all[place] = ModelVersion(**{**vars(version), "tags": tags})


def _trained_on(trial: TrialFolder) -> str:
    """Data that did not change since."""
    return str(read_json(trial.provenance)["data.digest"])


def _version(folder: Path, number: str, digest: str) -> ModelVersion:
    trial = TrialFolder(folder / number)
    trial.path.mkdir()
    trial.config.write_text("{}")
    write_json(trial.provenance, {"data.digest": digest})
    return ModelVersion("mine", number, "s", "lora/0000", trial.path, None, {})


def test_every_look_is_recorded_and_counted(tmp_path: Path) -> None:
    """Two looks at one version, one at its successor: 1, 2, 3; on other data counting begins anew."""
    models = Models(_version(tmp_path, "1", "a"))

    def judge(trial: TrialFolder) -> tuple[HeldOutLosses, HeldOutLosses]:
        assert trial.config.exists()
        return _unseen(4.0, 3.62), _unseen(4.5, 3.6)

    first, second = (certify("mine", models, judge, _trained_on) for _ in range(2))  # type: ignore[arg-type]
    models.all.append(_version(tmp_path, "2", "a"))
    third = certify("mine", models, judge, _trained_on)  # type: ignore[arg-type]
    models.all.append(_version(tmp_path, "3", "b"))
    fourth = certify("mine", models, judge, _trained_on)  # type: ignore[arg-type]
    assert [each.look for each in (first, second, third, fourth)] == [1, 2, 3, 1]
    assert (first.test_loss, first.untuned_test_loss) == (pytest.approx(4.2), pytest.approx(4.7))
    assert first.difference.value == pytest.approx(-0.5)
    assert first.forgetting == pytest.approx(0.02)
    assert "The champion is better (difference -0.5000 nats" in first.words
    assert "Forgetting: +0.0200 nats. This was the first evaluation" in first.words
    assert "This was evaluation 3 on this test split." in third.words
    stored = json.loads(models.all[0].tags[f"{CERTIFIED_TAG}2"])
    assert (stored["version"], stored["data_digest"]) == ("1", "a")


def test_worse_than_the_base_is_said(tmp_path: Path) -> None:
    """A champion by the gate may still lose on the test split."""
    models = Models(_version(tmp_path, "1", "a"))
    figures = _unseen(4.6, None), _unseen(4.5, None)
    found = certify("mine", models, lambda _: figures, _trained_on)  # type: ignore[arg-type]
    assert "NOT certainly better" in found.words
    assert "Forgetting" not in found.words


def _write_rows(path: Path, count: int) -> None:
    rows = ({"instruction": f"Add {i}.", "output": f"Added {i} to the sum."} for i in range(count))
    path.write_text("".join(json.dumps({**row, "input": ""}) + "\n" for row in rows))


def test_data_that_changed_since_are_refused_before_anything_is_judged(tmp_path: Path) -> None:
    """Four rows more deal all rows to the splits anew: no look is taken, and none is recorded."""
    data = tmp_path / "my.jsonl"
    _write_rows(data, 40)
    settings = make_settings(f"data.train={data}").trial
    models = Models(_version(tmp_path, "1", load_splits(settings.data).digest))
    trial, judged = TrialFolder(models.all[0].folder), []
    trial.config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))

    def judge(trial: TrialFolder) -> tuple[HeldOutLosses, HeldOutLosses]:
        judged.append(trial)
        return _unseen(4.0, None), _unseen(4.5, None)

    assert certify("mine", models, judge).look == 1  # type: ignore[arg-type]
    _write_rows(data, 44)
    before = models.all[0]
    with pytest.raises(
        DataError, match=r"version 1 of 'mine'.*data\.digest is .* not .* Restore the data"
    ):
        certify("mine", models, judge)  # type: ignore[arg-type]
    assert (len(judged), models.all[0]) == (1, before)


def test_what_cannot_be_certified_is_refused(tmp_path: Path) -> None:
    """No champion; a champion whose folder is on another machine."""
    with pytest.raises(TrackingError, match="has no champion to certify"):
        certify("mine", Models())  # type: ignore[arg-type]
    away = ModelVersion("mine", "1", "s", "lora/0000", tmp_path / "gone", None, {})
    with pytest.raises(TrackingError, match=r"not on this machine\. Certify it on"):
        certify("mine", Models(away))  # type: ignore[arg-type]
