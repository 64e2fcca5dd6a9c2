"""The report as one HTML file that works offline, on phone, desktop and paper, light and dark.

The module assembles what other modules computed (verdict, tables, figures, costs, next steps). The
template escapes every text, because rows, prompts and answers may hold HTML. Only pictures and the
rendered data card pass as HTML.
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
from sweeper.reporting.answer_picture import answer_picture
from sweeper.reporting.arm_comparison import ArmComparison
from sweeper.reporting.chart import ASSETS, picture_style, standalone
from sweeper.reporting.cost_ledger import cost_sheet, failure_sheet
from sweeper.reporting.figures import ReportFigure, figures
from sweeper.reporting.glossary import terms_in
from sweeper.reporting.intervals import IntervalEstimate
from sweeper.reporting.next_steps import NextStep, next_steps
from sweeper.reporting.rank_ladder import rank_ladders, rank_sheet
from sweeper.reporting.report_evidence import ReportEvidence, gather
from sweeper.reporting.result_tables import (
    comparison,
    conditions,
    describe_data,
    leaderboard,
    markdown_report,
    pareto_front,
)
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult
from sweeper.reporting.setting_reasons import reason_sheet
from sweeper.reporting.text_table import DASH, TextTable, duration
from sweeper.reporting.verdict import Verdict, judge
from sweeper.reporting.verdict_doubts import label
from sweeper.reporting.verdict_words import perplexity_words

MOST_ROWS = 1000
"""Rows of a leaderboard, which keeps a page below 2 MB. All trials are in results.json."""
CARD_CHARS = 100_000
"""Characters of the data card that are shown."""
ANSWER_CHARS = 2_000
"""Characters of a model's answer that are shown. A model that does not stop would fill pages."""
FOLDED_CHARS = 240
"""Characters of a text in the table of answers beyond which the rest is folded."""


@dataclass(frozen=True)
class PageStudy:
    """One study on the page."""

    results: StudyResults
    folder: StudyFolder
    evidence: ReportEvidence

    @cached_property
    def verdict(self) -> Verdict:
        """The verdict on the study."""
        return judge(self.results)

    @cached_property
    def tiles(self) -> list[tuple[str, str]]:
        """Large figures at the top, each with its caption."""
        return list(_tiles(self.verdict))

    @cached_property
    def picture(self) -> ReportFigure | None:
        """The picture of the answer, or None if no model was judged."""
        return answer_picture(self.results, self.verdict)

    @cached_property
    def asides(self) -> list[tuple[str, str]]:
        """The terms of the first screen with their meanings."""
        shown = [self.verdict.headline, *(caption for _, caption in self.tiles)]
        shown += [value for value, _ in self.tiles]
        return terms_in("\n".join(shown))

    @cached_property
    def sheets(self) -> list[TextTable]:
        """Tables of the arms compared and of their training conditions."""
        return [comparison(self.results), conditions(self.results)]

    @cached_property
    def reasons(self) -> list[TextTable]:
        """Tables of the settings of each arm's winner, with reasons."""
        shares = self.evidence.importances
        # An arm without a finished trial has no winner to explain.
        sheets = (reason_sheet(arm, shares.get(arm.name, {})) for arm in self.results.arms)
        return [sheet for sheet in sheets if sheet is not None]

    @cached_property
    def figures(self) -> list[ReportFigure]:
        """The study's figures in reading order."""
        return figures(self.results, self.evidence)

    @cached_property
    def details(self) -> list[TextTable]:
        """Tables of the gain by rank, and of Pareto fronts if the study has costs."""
        ladders = [rank_sheet(ladder) for ladder in rank_ladders(self.results)]
        return [*ladders, *(pareto_front(arm) for arm in self.results.arms if arm.front)]

    @cached_property
    def leaderboards(self) -> list[PageLeaderboard]:
        """One leaderboard per arm."""
        return [_page_leaderboard(arm, self.folder) for arm in self.results.arms]

    @cached_property
    def costs(self) -> TextTable:
        """Table of device time by arm."""
        return cost_sheet(self.results)

    @cached_property
    def failures(self) -> TextTable | None:
        """Table of failures by arm and cause, or None if nothing failed."""
        return failure_sheet(self.results)

    @cached_property
    def audits(self) -> list[str]:
        """Wrong decisions of the pruner per arm, if audit trials measured them."""
        return [f"{arm.name}: {arm.audit}" for arm in self.results.arms if arm.audit is not None]

    @cached_property
    def data(self) -> str:
        """Source and size of the data in one line."""
        return describe_data(self.results.arms[0].facts)

    @cached_property
    def card(self) -> Markup | None:
        """The data card as HTML, or None if none was found."""
        card = self.evidence.data_card
        return None if card is None else Markup(_render(card[:CARD_CHARS]))

    @cached_property
    def answers(self) -> TextTable | None:
        """Table of the qualitative prompts with the answers of the base and of each arm's best trial."""
        return _answers(self.results, self.evidence)

    @cached_property
    def steps(self) -> list[NextStep]:
        """Suggested next steps."""
        return next_steps(self.results, self.evidence)


@dataclass(frozen=True)
class PageLeaderboard:
    """A leaderboard with the command that trains each row's trial again."""

    sheet: TextTable
    seconds: tuple[float | None, ...]
    """Seconds by which the column `time` is sorted."""
    left_out: int
    """Number of trials beyond MOST_ROWS."""


def page(studies: Sequence[PageStudy]) -> str:
    """Return the page of one study, or of several one after the other."""
    names = [study.results.study_name for study in studies]
    return _template().render(
        title=", ".join(names),
        studies=studies,
        folded_chars=FOLDED_CHARS,
        terms=terms_in("\n".join(markdown_report(s.results, s.verdict) for s in studies)),
        overview=_overview(studies) if len(studies) > 1 else None,
        # The page must work offline and when mailed, so style and script are part of it.
        css=Markup(picture_style() + (ASSETS / "page.css").read_text(encoding="utf-8")),
        script=Markup((ASSETS / "page.js").read_text(encoding="utf-8")),
    )


def write_page(
    results: StudyResults, folder: StudyFolder, storage: optuna.storages.BaseStorage | None = None
) -> Path:
    """Write report.html into a study's folder, and its pictures as separate files into figures/.

    Args:
        results: the study.
        folder: the study's folder.
        storage: Optuna's storage. None reads the database in the folder, if there is one.
    """
    study = PageStudy(results, folder, gather(results, folder, storage))
    write_atomic(folder.page, page([study]))
    first = [] if study.picture is None else [study.picture]
    write_figures([*first, *study.figures], folder.figures)
    return folder.page


def write_figures(drawn: Sequence[ReportFigure], folder: Path) -> None:
    """Write each picture as an SVG file, and delete pictures that only an earlier report had."""
    names = {f"{_file_name(figure.title)}.svg": figure.svg for figure in drawn if figure.svg}
    # A later report may lack a figure, and its old picture would be taken for a current one.
    for stale in folder.glob("*.svg"):
        if stale.name not in names:
            stale.unlink()
    for name, svg in names.items():
        write_atomic(folder / name, standalone(svg))


def _file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


@cache
def _template() -> Template:
    # Model answers and rows may hold HTML, and StrictUndefined turns a misspelt name into an error.
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def _tiles(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """Yield the figures of the first comparison, or of the only arm, with captions."""
    for duel in verdict.duels[:1]:
        yield from _duel_tiles(duel)
    # A single arm is compared with its untuned base.
    if not verdict.duels:
        metric = metric_words(verdict.objective.metric)
        for side in verdict.sides[:1]:
            yield f"{side.value:.4f}", f"best {metric} of {side.label}"
            yield f"{side.base_value:.4f}", f"{metric} of the untuned base"
    for gain in verdict.recipes:
        if gain.comparison is not None and gain.comparison.difference.low is not None:
            yield _difference_tile(gain.comparison)


def _difference_tile(duel: ArmComparison) -> tuple[str, str]:
    """Return the difference of a comparison with its interval and its factor in perplexity."""
    unit = f" {duel.objective.unit}".rstrip()
    of_split = f"{duel.split} {metric_words(duel.objective.metric).removeprefix('eval ')}"
    names = f"{of_split} of {duel.side.label} minus {duel.reference.label}"
    ends = _interval(duel.difference, "{:+.4f}")
    factor = perplexity_words(duel.difference.value, duel.objective)
    more = f", {factor}" if factor else ""
    return f"{duel.difference.value:+.4f}{unit}", f"{names}{ends}{more}"


def _duel_tiles(duel: ArmComparison) -> Iterator[tuple[str, str]]:
    """Yield the figures of a comparison, each with its interval, and no share of what is undecided."""
    ratios = duel.cost_ratios
    yield _difference_tile(duel)
    if duel.retained is not None and duel.outcome != "undecided":
        ends = _interval(duel.retained, "{:.1f}")
        words = f"of {duel.reference.label}'s improvement retained{ends}"
        yield f"{duel.retained.value:.1f} %", words
    if ratios.trainable:
        yield f"{100 * ratios.trainable:.3g} %", "of the parameters trained"
    if ratios.time:
        what = "CPU time" if duel.on_cpu else "time"
        ends = _interval(ratios.time, "{:.3g}")
        yield f"{ratios.time.value:.2g}×", f"the {what} of a training{ends}"
    if ratios.artifact:
        yield f"{ratios.artifact:.2g}×", "the disk space"


def _interval(found: IntervalEstimate, form: str) -> str:
    if found.low is None or found.high is None:
        return ""
    return f" (95 % interval {form.format(found.low)} to {form.format(found.high)})"


def _page_leaderboard(arm: ArmResult, folder: StudyFolder) -> PageLeaderboard:
    sheet = leaderboard(arm, MOST_ROWS)
    # The sheet is cut to the same number of rows, so both stay aligned.
    trials = arm.trials[:MOST_ROWS]
    rows = [
        (*row, _retrain_command(trial, folder.trial(arm.name, trial.number).path))
        for row, trial in zip(sheet.rows, trials, strict=True)
    ]
    left = sheet.left | {"train again"}
    return PageLeaderboard(
        TextTable(sheet.title, (*sheet.columns, "train again"), tuple(rows), left),
        tuple(trial.metric("cost/seconds") for trial in trials),
        len(arm.trials) - len(trials),
    )


def _retrain_command(trial: TrialResult, folder: Path) -> str:
    """Return the command that trains a trial again, and compares it if the trial was complete."""
    path = shlex.quote(folder.as_posix())
    return f"sweeper reproduce {path}" if trial.complete else f"sweeper trial {path} --into again"


def _answers(results: StudyResults, evidence: ReportEvidence) -> TextTable | None:
    """Return one row per prompt. The untuned answer is that of the first arm with answers."""
    samples_of = {label(arm): evidence.samples.get(arm.name, ()) for arm in results.arms}
    names = [name for name, samples in samples_of.items() if samples]
    if not names:
        return None
    answers = {(name, s.prompt): s for name in names for s in samples_of[name]}
    rows = []
    for prompt in dict.fromkeys(prompt for _, prompt in answers):
        found = [answers.get((name, prompt)) for name in names]
        # The untuned base answers the same in every arm of the same precision.
        base = next(sample.base for sample in found if sample is not None)
        tuned = [DASH if sample is None else sample.tuned for sample in found]
        rows.append((prompt, *(_shorten(text) for text in (base, *tuned))))
    columns = ("prompt", "untuned", *names)
    return TextTable("The same prompts, side by side", columns, tuple(rows), frozenset(columns))


def _shorten(text: str) -> str:
    return text[:ANSWER_CHARS] + "…" * (len(text) > ANSWER_CHARS)


def _overview(studies: Sequence[PageStudy]) -> TextTable:
    """Return one row per study and arm."""
    rows = [
        (
            *(study.results.study_name, label(arm), str(arm.tried)),
            f"{arm.base_value:.4f}",
            DASH if arm.best is None else f"{arm.best.value:.4f}",
            duration(arm.device_seconds),
        )
        for study in studies
        for arm in study.results.arms
    ]
    columns = ("study", "method", "trials", "untuned", "best value", "device time")
    return TextTable("All studies", columns, tuple(rows), frozenset({"study", "method"}))


def _render(markdown: str) -> str:
    """Return Markdown as HTML, with its headings below the page's."""
    # A data card quotes training rows, so raw HTML, links and pictures stay text.
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.disable(["link", "image", "autolink", "html_inline", "html_block", "reference"])
    tokens = parser.parse(markdown)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            # A card's h1 becomes h3, below the page's headings.
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"
        elif token.type == "th_open":
            token.attrSet("scope", "col")
    return str(parser.renderer.render(tokens, parser.options, {}))
