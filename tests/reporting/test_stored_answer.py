"""When an unfinished run's results may replace an earlier answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeper.core.paths import StudyFolder, write_json
from sweeper.driver.results_writer import ResultsWriter
from sweeper.reporting.results import StudyResults, to_document
from sweeper.reporting.stored_answer import find_answer, is_richer
from tests.reporting.studies import make_arm, make_results, make_trial, two_arms
from tests.reporting.test_held_out_results import _final, _settled

SEARCHED = two_arms(4.05, 4.0)
JUDGED = _settled(lora=_final(4.1, 4.2), full=_final(4.0))


def _lora(trials: int) -> StudyResults:
    found = [make_trial("lora", number, "finished", 4.0) for number in range(trials)]
    return make_results(make_arm("lora", found))


@pytest.mark.parametrize(
    ("results", "earlier", "richer"),
    [
        (_lora(3), _lora(2), True),
        (_lora(2), _lora(2), False),
        (_lora(2), _lora(3), False),
        (JUDGED, SEARCHED, True),
        (SEARCHED, JUDGED, False),
        (JUDGED, _settled(lora=_final(4.1), full=_final(4.0)), True),
        (_lora(9), SEARCHED, False),
    ],
    ids=["trial", "equal", "fewer", "finalists", "no finalists", "seed", "no second arm"],
)
def test_richer_answer_has_all_and_more(
    results: StudyResults, earlier: StudyResults, richer: bool
) -> None:
    """No part may be smaller: more trials do not outweigh finalists, nor one arm another."""
    assert is_richer(results, earlier) is richer


def test_unreadable_answer_is_replaced_by_a_finished_run_alone(tmp_path: Path) -> None:
    """results.json of a newer version cannot be compared, so it stays while a run is unfinished."""
    folder = StudyFolder(tmp_path / "s")
    assert find_answer(folder) is None
    write_json(folder.results, {**to_document(JUDGED), "format": 99})
    found = find_answer(folder)
    assert found is not None
    assert not found.yields_to(JUDGED)
    assert str(found) == str(folder.results)


def test_writer_compares_with_the_answer_before_its_run(tmp_path: Path) -> None:
    """The writer reads that answer once, so the results it writes itself are no hindrance."""
    folder = StudyFolder(tmp_path / JUDGED.study_name)
    write_json(folder.results, to_document(_lora(2)))
    writer = ResultsWriter(None, folder, {}, print)  # type: ignore[arg-type]
    assert writer.is_surpassed_by(_lora(3))
    write_json(folder.results, to_document(_lora(3)))
    assert writer.is_surpassed_by(_lora(3))
    assert not writer.is_surpassed_by(_lora(2))
