"""results.json: one model writes and reads it, also where an earlier version wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sweeper.core.errors import StudyError
from sweeper.core.paths import StudyFolder, read_json, write_json
from sweeper.reporting.results import FORMAT, from_document, load_results, to_document
from tests.past.past import unpack
from tests.reporting.studies import make_arm, make_results, make_trial, two_arms

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "lr_rank_sweep" / "results.json"
PAST = ("finished", "unfinished", "mine_lr_rank_sweep_2026-05-01")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every results.json that an earlier version wrote, by its study."""
    folder = tmp_path_factory.mktemp("past")
    unpack(folder)
    outputs = folder / "outputs"
    return {"notebook": NOTEBOOK, **{name: StudyFolder(outputs / name).results for name in PAST}}


@pytest.mark.parametrize("name", ["notebook", *PAST])
def test_an_old_document_is_read_and_written_as_it_was(old: dict[str, Path], name: str) -> None:
    """No key and no digit is lost or renamed, and keys that were added since say nothing."""
    document = read_json(old[name])
    del document["verdict"]
    assert list(_changes(document, to_document(from_document(document)))) == []


def _changes(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """Yield the places where a document lost or changed something, or states something new."""
    if isinstance(old, dict) and isinstance(new, dict):
        # Contrasts were of losses when they named no metric.
        added = new.keys() - old.keys() - {"metric"}
        yield from (f"{place}/{key}" for key in added if new[key])
        for key, value in old.items():
            yield from _changes(value, new.get(key, "lost"), f"{place}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, now) in enumerate(zip(old, new, strict=True)):
            yield from _changes(before, now, f"{place}/{index}")
    elif old != new:
        yield place


def test_a_document_without_later_keys_is_read() -> None:
    """Keys with a default may be missing: results of a version that did not have them."""
    results = two_arms(4.05, 4.0)
    document = to_document(results)
    for key in ("contrasts", "forgetting", "untested", "misfits"):
        del document[key]
    for key in ("costs", "front", "final", "adopted", "best", "audit"):
        del document["arms"]["lora"][key]
    for key in ("audited", "message", "best_step"):
        del document["arms"]["lora"]["trials"][0][key]
    assert from_document(document) == results


def _drop(*place: Any) -> Callable[[dict[str, Any]], None]:
    def damage(document: dict[str, Any]) -> None:
        *outer, last = place
        node: Any = document
        for key in outer:
            node = node[key]
        del node[last]

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop("format"), f"is of format None, this version reads format {FORMAT}"),
        (lambda document: document.update(format=3), "is of format 3"),
        (_drop("objective"), "objective: missing"),
        (_drop("arms", "lora", "trials"), "trials: missing"),
        (_drop("arms", "lora", "n_trials"), "n_trials: Field required"),
        (_drop("arms", "lora", "trials", 0, "cause"), "outcome.cause: Field required"),
        (lambda document: document.update(unheard_of=1), "unheard_of: Extra inputs"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_command_that_keeps_it(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], words: str
) -> None:
    """One sentence names the place and the study's own command."""
    document = to_document(two_arms(4.05, 4.0))
    damage(document)
    write_json(StudyFolder(tmp_path / "old").results, document)
    with pytest.raises(StudyError) as refusal:
        load_results("old", tmp_path)
    assert words in str(refusal.value)
    assert str(refusal.value).endswith("python -m sweeper +experiment=mine -m")
    assert "\n" not in str(refusal.value)


def test_results_of_a_newer_version_are_left_to_it(tmp_path: Path) -> None:
    """Running the study with an older program would not keep the answer."""
    document = {**to_document(two_arms(4.05, 4.0)), "format": FORMAT + 1}
    write_json(StudyFolder(tmp_path / "new").results, document)
    with pytest.raises(StudyError, match=r"a newer version wrote it: read it with that version"):
        load_results("new", tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    """A file that holds no JSON object raises no error of its parser."""
    path = StudyFolder(tmp_path / "old").results
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StudyError, match=r"holds no JSON object; to keep its answer"):
        load_results("old", tmp_path)


def test_a_document_holds_each_thing_under_one_name() -> None:
    """The library's names are the document's: n_trials and params."""
    results = two_arms(4.05, 4.0)
    document = json.loads(json.dumps(to_document(results)))
    lora = document["arms"]["lora"]
    assert lora["n_trials"] == results.arms[0].n_trials
    assert lora["trials"][0]["params"] == results.arms[0].trials[0].params
    assert lora["best"] == 0


def test_a_document_holds_what_follows_from_the_trials() -> None:
    """The best trial's number and the pruner's audit stand there for programs, and are read over."""
    stopped = make_trial("lora", 1, "finished", 3.9).model_copy(update={"audited": True})
    trials = [make_trial("lora", 0, "finished", 4.0), stopped]
    results = make_results(make_arm("lora", trials))
    lora = to_document(results)["arms"]["lora"]
    assert lora["best"] == 1
    assert lora["audit"] == {"audited": 1, "wrong": 1, "costly": 1}
    assert from_document(to_document(results)) == results
