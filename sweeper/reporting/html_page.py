"""The report as one HTML file: offline, for phone, desktop and paper, light and dark.

Puts together what others computed (verdict, tables, figures, ledger, next steps); computes nothing.
Every text is escaped by the template; only pictures and the rendered data card pass as HTML.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import optuna
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markdown_it import MarkdownIt
from markupsafe import Markup

from sweeper.config.settings import metric_words
from sweeper.core.paths import StudyFolder, write_atomic
from sweeper.reporting.chart import ASSETS, picture_style, standalone
from sweeper.reporting.cost_ledger import cost_sheet, failure_sheet
from sweeper.reporting.figures import ReportFigure, figures
from sweeper.reporting.next_steps import NextStep, next_steps
from sweeper.reporting.rank_ladder import rank_ladders, rank_sheet
from sweeper.reporting.report_evidence import ReportEvidence, gather
from sweeper.reporting.result_tables import (
    comparison,
    conditions,
    describe_data,
    leaderboard,
    pareto_front,
)
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult
from sweeper.reporting.setting_reasons import reason_sheet
from sweeper.reporting.text_table import DASH, TextTable, duration
from sweeper.reporting.verdict import Verdict, judge, label

MOST_ROWS = 1000
"""Of a leaderboard, so that a page stays below 2 MB; the rest is in results.json."""
CARD_CHARS = 100_000
ANSWER_CHARS = 2_000
"""Of a model's answer; a model that does not stop fills pages."""


@dataclass(frozen=True)
class PageStudy:
    """One study on the page."""

    results: StudyResults
    folder: StudyFolder
    evidence: ReportEvidence

    @cached_property
    def verdict(self) -> Verdict:
        """See reporting.verdict."""
        return judge(self.results)

    @cached_property
    def tiles(self) -> list[tuple[str, str]]:
        """The headline's figures, each with its words."""
        return list(_tiles(self.verdict))

    @cached_property
    def sheets(self) -> list[TextTable]:
        """The arms side by side, and under which conditions."""
        return [comparison(self.results), conditions(self.results)]

    @cached_property
    def reasons(self) -> list[TextTable]:
        """Why each arm's winner has its settings."""
        shares = self.evidence.importances
        sheets = (reason_sheet(arm, shares.get(arm.name, {})) for arm in self.results.arms)
        return [sheet for sheet in sheets if sheet is not None]

    @cached_property
    def figures(self) -> list[ReportFigure]:
        """See reporting.figures."""
        return figures(self.results, self.evidence)

    @cached_property
    def details(self) -> list[TextTable]:
        """The gain of each rank, and the Pareto fronts that the study itself searched for."""
        ladders = [rank_sheet(ladder) for ladder in rank_ladders(self.results)]
        return [*ladders, *(pareto_front(arm) for arm in self.results.arms if arm.front)]

    @cached_property
    def boards(self) -> list[PageLeaderboard]:
        """A leaderboard for each arm."""
        return [_board(arm, self.folder) for arm in self.results.arms]

    @cached_property
    def costs(self) -> TextTable:
        """See reporting.ledger."""
        return cost_sheet(self.results)

    @cached_property
    def failures(self) -> TextTable | None:
        """See reporting.ledger."""
        return failure_sheet(self.results)

    @cached_property
    def audits(self) -> list[str]:
        """How often the pruner was wrong, where that was measured."""
        return [f"{arm.name}: {arm.audit}" for arm in self.results.arms if arm.audit is not None]

    @cached_property
    def data(self) -> str:
        """Where the data came from."""
        return describe_data(self.results.arms[0].facts)

    @cached_property
    def card(self) -> Markup | None:
        """The data card as HTML."""
        card = self.evidence.data_card
        return None if card is None else Markup(_render(card[:CARD_CHARS]))

    @cached_property
    def answers(self) -> TextTable | None:
        """The qualitative prompts, and what the base and each arm's best trial answered."""
        return _answers(self.results, self.evidence)

    @cached_property
    def steps(self) -> list[NextStep]:
        """See reporting.next_steps."""
        return next_steps(self.results, self.evidence)


@dataclass(frozen=True)
class PageLeaderboard:
    """A leaderboard with the command that trains each row again."""

    sheet: TextTable
    seconds: tuple[float | None, ...]
    """What the column `time` is sorted by."""
    left_out: int


def page(studies: Sequence[PageStudy]) -> str:
    """The page of one study, or of several one after the other."""
    names = [study.results.study_name for study in studies]
    return _template().render(
        title=", ".join(names),
        studies=studies,
        overview=_overview(studies) if len(studies) > 1 else None,
        css=Markup(picture_style() + (ASSETS / "page.css").read_text(encoding="utf-8")),
        script=Markup((ASSETS / "page.js").read_text(encoding="utf-8")),
    )


def write_page(
    results: StudyResults, folder: StudyFolder, storage: optuna.storages.BaseStorage | None = None
) -> Path:
    """Write report.html into a study's folder, and its pictures as files of their own into figures/.

    Args:
        results: the study.
        folder: where its trials lie.
        storage: Optuna's; without one the database in the folder is read, if it is there.
    """
    study = PageStudy(results, folder, gather(results, folder, storage))
    write_atomic(folder.page, page([study]))
    write_figures(study.figures, folder.figures)
    return folder.page


def write_figures(drawn: Sequence[ReportFigure], folder: Path) -> None:
    """Write each picture as an SVG file; one of an earlier report that is no more goes."""
    names = {f"{_file_name(figure.title)}.svg": figure.svg for figure in drawn if figure.svg}
    for stale in folder.glob("*.svg"):
        if stale.name not in names:
            stale.unlink()
    for name, svg in names.items():
        write_atomic(folder / name, standalone(svg))


def _file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def _tiles(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """Of the first duel, or of the only arm."""
    for duel in verdict.duels[:1]:
        ratios = duel.cost_ratios
        if duel.retained is not None:
            yield (
                f"{duel.retained.value:.1f} %",
                f"of {duel.reference.label}'s improvement retained",
            )
        if ratios.trainable:
            yield f"{100 * ratios.trainable:.3g} %", "of the parameters trained"
        if ratios.time:
            yield f"{ratios.time:.2g}×", "the time a trial"
        if ratios.artifact:
            yield f"{ratios.artifact:.2g}×", "the disk space"
    if not verdict.duels:
        metric = metric_words(verdict.objective.metric)
        for side in verdict.sides[:1]:
            yield f"{side.value:.4f}", f"best {metric} of {side.label}"
            yield f"{side.base_value:.4f}", f"{metric} of the untuned base"


def _board(arm: ArmResult, folder: StudyFolder) -> PageLeaderboard:
    sheet = leaderboard(arm, MOST_ROWS)
    trials = arm.trials[:MOST_ROWS]
    rows = [
        (*row, _again(trial, folder.trial(arm.name, trial.number).path))
        for row, trial in zip(sheet.rows, trials, strict=True)
    ]
    left = sheet.left | {"train it again"}
    return PageLeaderboard(
        TextTable(sheet.title, (*sheet.columns, "train it again"), tuple(rows), left),
        tuple(trial.metric("cost/seconds") for trial in trials),
        len(arm.trials) - len(trials),
    )


def _again(trial: TrialResult, folder: Path) -> str:
    """Held against its record, if it has a figure of its own."""
    path = shlex.quote(folder.as_posix())
    return f"sweeper reproduce {path}" if trial.complete else f"sweeper trial {path} --into again"


def _answers(results: StudyResults, evidence: ReportEvidence) -> TextTable | None:
    """One row a prompt; the untuned answer is the first arm's that was asked."""
    asked = {label(arm): evidence.samples.get(arm.name, ()) for arm in results.arms}
    names = [name for name, samples in asked.items() if samples]
    if not names:
        return None
    answers = {(name, s.prompt): s for name in names for s in asked[name]}
    rows = []
    for prompt in dict.fromkeys(prompt for _, prompt in answers):
        found = [answers.get((name, prompt)) for name in names]
        base = next(sample.base for sample in found if sample is not None)
        tuned = [DASH if sample is None else sample.tuned for sample in found]
        rows.append((prompt, *(_cut(text) for text in (base, *tuned))))
    columns = ("prompt", "untuned", *names)
    return TextTable("The same prompts, side by side", columns, tuple(rows), frozenset(columns))


def _cut(text: str) -> str:
    return text[:ANSWER_CHARS] + "…" * (len(text) > ANSWER_CHARS)


def _overview(studies: Sequence[PageStudy]) -> TextTable:
    """One row a study and arm."""
    rows = [
        (
            *(study.results.study_name, label(arm), str(arm.tried)),
            f"{arm.base_value:.4f}",
            DASH if arm.best is None else f"{arm.best.value:.4f}",
            duration(arm.seconds),
        )
        for study in studies
        for arm in study.results.arms
    ]
    columns = ("study", "method", "trials", "untuned", "best value", "device time")
    return TextTable("All studies", columns, tuple(rows), frozenset({"study", "method"}))


def _render(markdown: str) -> str:
    """Markdown as HTML: without raw HTML, links and pictures, its headings below the page's own."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.disable(["link", "image", "autolink", "html_inline", "html_block", "reference"])
    tokens = parser.parse(markdown)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"
        elif token.type == "th_open":
            token.attrSet("scope", "col")
    return str(parser.renderer.render(tokens, parser.options, {}))
