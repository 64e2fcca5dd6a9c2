"""What the search gained over the recipe, in the verdict, the terminal, the page and `best`.

Two studies of a fake trainer, whose LoRA is best at a learning rate of 5e-3 and the largest rank. In one
the recipe is this point. In the other a better point than the recipe is planted.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from sweeper.commands.run_study import run_study
from sweeper.core.manifest import write_manifest
from sweeper.core.paths import StudyFolder, write_atomic
from sweeper.core.trained_form import TRAINED_FORM
from sweeper.core.value import EquivalenceMargin
from sweeper.reporting.console import PlainConsole
from sweeper.reporting.intervals import IntervalEstimate
from sweeper.reporting.live_view import print_results
from sweeper.reporting.results import StudyResults
from sweeper.reporting.verdict import judge
from sweeper.reporting.winner import find_winner, usage
from sweeper.search.study_plan import studies
from tests.reporting.pages import Page
from tests.reporting.test_winner import FORM

FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline", "pruner=none"),
    *("workers.fake.step_seconds=0.0", "tracking=none", "hydra.sweeper.n_trials=5"),
)
BEST = "training.learning_rate: 5e-3, adapter.r: 32"
ENOUGH = "The recipe was enough: the search of QLoRA found no better point than known."
GAINED = re.compile(
    r"The search of QLoRA gained (0\.\d{4}) nats \(95 % interval (0\.\d{4}) to (0\.\d{4}); a factor of "
    r"1\.\d{3} in perplexity\) on the recipe known \(test loss 3\.\d{4} against 4\.\d{4}, 3 and 3 fresh "
    r"seeds\)\."
)


@dataclass(frozen=True)
class FinishedStudy:
    """A study that has ended, and its folder."""

    results: StudyResults
    folder: StudyFolder

    @property
    def page(self) -> Page:
        """The report as a page."""
        return Page.read(self.folder.page.read_text(encoding="utf-8"))

    @property
    def terminal(self) -> str:
        """What a terminal of 80 columns shows, without its own wrapping of long lines."""
        shown = io.StringIO()
        print_results(self.results, PlainConsole(width=80, file=shown))
        return shown.getvalue()


def _study(folder: Path, recipe: str, *plain: str) -> FinishedStudy:
    known = (
        "{name: known, source: a table, commit: abc, licence: null, conditions: one seed, "
        f"point: {{{recipe}}}}}"
    )
    points = ", ".join([known, *(f"{{{point}}}" for point in plain)])
    (plan,) = studies([*FAKE, f"hydra.sweeper.priors=[{points}]", f"output_dir={folder}"])
    return FinishedStudy(run_study(plan), StudyFolder(folder / "lr_rank_sweep"))


@pytest.fixture(scope="module")
def enough(tmp_path_factory: pytest.TempPathFactory) -> FinishedStudy:
    """The recipe is the best point of the space."""
    return _study(tmp_path_factory.mktemp("enough"), BEST)


@pytest.fixture(scope="module")
def gained(tmp_path_factory: pytest.TempPathFactory) -> FinishedStudy:
    """A point 0.08 nats better than the recipe is planted."""
    folder = tmp_path_factory.mktemp("gained")
    return _study(folder, "training.learning_rate: 1e-3, adapter.r: 32", BEST)


def test_the_verdict_says_how_much_the_search_gained(gained: FinishedStudy) -> None:
    """The figure and its interval are those of the contrast on the test split."""
    verdict = judge(gained.results)
    said = GAINED.search(verdict.words)
    assert said is not None, verdict.words
    (found,) = gained.results.recipe_contrasts
    low, high = found.difference.low, found.difference.high
    assert low is not None
    assert high is not None
    assert [float(text) for text in said.groups()] == [
        pytest.approx(abs(end), abs=1e-4) for end in (found.difference.value, high, low)
    ]
    assert "The search of QLoRA gained on its recipe." in verdict.headline
    assert "enough" not in verdict.words


def test_the_verdict_says_that_the_recipe_was_enough(enough: FinishedStudy) -> None:
    """With the origin of the recipe, and no figure, because nothing was compared."""
    verdict = judge(enough.results)
    assert f"{ENOUGH} Source of known: a table at abc." in verdict.words
    assert "The recipe was enough for QLoRA." in verdict.headline
    assert "gained" not in verdict.words


def test_a_terminal_of_80_columns_shows_it(enough: FinishedStudy, gained: FinishedStudy) -> None:
    """No table is wider, and the sentence stands in the answer's own line and below it."""
    for study, headline in (
        (enough, "The recipe was enough for QLoRA."),
        (gained, "The search of QLoRA gained on its recipe."),
    ):
        tables, _, answer = study.terminal.partition("Terms: ")
        assert max(len(row) for row in tables.splitlines() if row.startswith(" ")) <= 80
        first, full = answer.split("\n\n")[1:3]
        assert headline in first
        assert ENOUGH in full or GAINED.search(full)


def test_the_page_shows_it(enough: FinishedStudy, gained: FinishedStudy) -> None:
    """In the headline and in the full answer, with a tile where two models were compared."""
    for study, headline, tiles in (
        (enough, "The recipe was enough for QLoRA.", 0),
        (gained, "The search of QLoRA gained on its recipe.", 1),
    ):
        page = study.page
        assert headline in page.all("p", "headline")[0].text
        words = page.all("p", "words")[0].text
        assert ENOUGH in words or GAINED.search(words)
        captions = [item.text for item in page.all("li") if "minus the recipe known" in item.text]
        assert len(captions) == tiles
        for caption in captions:
            assert re.search(r"-0\.08\d\d nats test loss of QLoRA minus the recipe known", caption)
            assert re.search(r"95 % interval -0\.\d{4} to -0\.\d{4}\), a factor of 0\.\d", caption)
        (asides,) = page.all("p", "asides")
        assert "recipe: a known point with a name and an origin" in asides.text


def test_best_says_it(enough: FinishedStudy, gained: FinishedStudy) -> None:
    """Above the commands that use the winner, and for no other trial."""
    for study in (enough, gained):
        winner = find_winner(study.results, study.folder)
        winner.folder.adapter.mkdir(parents=True)
        write_atomic(winner.folder.adapter / TRAINED_FORM, FORM.model_dump_json())
        write_atomic(winner.folder.adapter / "chat_template.jinja", "{{ messages }}")
        write_manifest(winner.folder.adapter)
        said, _, commands = usage(winner).partition("Ask ")
        assert ENOUGH in said or GAINED.search(said)
        assert "Retrain" in commands
        other = find_winner(study.results, study.folder, number=winner.trial.number + 1)
        assert other.gain == ""


def _contrasted(study: FinishedStudy, **changes: object) -> StudyResults:
    """The study with another contrast of its winner with the recipe."""
    (found,) = study.results.recipe_contrasts
    changed = found.model_copy(update=changes)
    margin = EquivalenceMargin(absolute=0.05)
    update = {"recipe_contrasts": (changed,), "equivalence_margin": margin}
    return study.results.model_copy(update=update)


LEAD = IntervalEstimate(value=-0.01, low=-0.015, high=-0.005)
BEHIND = IntervalEstimate(value=0.01, low=0.005, high=0.015)
OPEN = IntervalEstimate(value=-0.01, low=-0.03, high=0.01)
CASES = {
    "a clear lead": (LEAD, {"p_value": 0.001, "equivalence_p": 0.9}, "gained"),
    "a lead that the second comparison does not allow": (
        LEAD,
        {"p_value": 0.04, "equivalence_p": 0.9},
        "undecided",
    ),
    "a recipe that leads": (BEHIND, {"p_value": 0.001, "equivalence_p": 0.9}, "enough"),
    "an interval with zero": (OPEN, {"p_value": 0.4, "equivalence_p": 0.2}, "undecided"),
    "an interval with zero within the margin": (
        OPEN,
        {"p_value": 0.4, "equivalence_p": 0.001},
        "enough",
    ),
    "a lead within the margin": (LEAD, {"p_value": 0.001, "equivalence_p": 0.001}, "enough"),
    "one seed": (LEAD, {"p_value": 0.001, "equivalence_p": 0.9, "seeds": (1, 3)}, "undecided"),
    "seeds that chose": (
        LEAD,
        {"p_value": 0.001, "equivalence_p": 0.9, "fresh": False},
        "undecided",
    ),
    "no interval": (
        IntervalEstimate(value=-0.01),
        {"p_value": 0.001, "equivalence_p": 0.001},
        "undecided",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_no_more_is_claimed_than_the_interval_shows(gained: FinishedStudy, case: str) -> None:
    """Neither "gained" nor "enough" without an interval, p value and seeds that show it."""
    difference, changes, outcome = CASES[case]
    # the arms' own comparison is undecided, so that it takes its share of the error
    results = _contrasted(gained, difference=difference, **changes)
    contrasts = [each.model_copy(update={"p_value": 0.9}) for each in results.contrasts]
    verdict = judge(results.model_copy(update={"contrasts": tuple(contrasts)}))
    assert [gain.outcome for gain in verdict.recipes] == [outcome]
    said = verdict.recipe_words("lora")
    assert said.startswith(
        {
            "gained": "The search of QLoRA gained 0.0100 nats",
            "enough": "The recipe was enough: ",
            "undecided": "Undecided whether the search of QLoRA gained on the recipe known: ",
        }[outcome]
    )
    assert ("enough" in verdict.headline) == (outcome == "enough")
    assert ("Undecided whether the search" in verdict.headline) == (outcome == "undecided")
    if difference.has(0):
        assert outcome != "gained"
