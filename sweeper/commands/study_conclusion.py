"""The conclusion of a study's run: the answer is written, recorded and printed."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass

from optuna.storages import BaseStorage
from rich.console import Console

from sweeper.commands.guarded_steps import GuardedSteps
from sweeper.commands.retention import delete, kept, losers
from sweeper.commands.winner_cards import add_served_losses
from sweeper.core.errors import TrackingError
from sweeper.core.paths import StudyFolder, size_mib
from sweeper.driver.results_writer import ResultsWriter
from sweeper.reporting.html_page import write_page
from sweeper.reporting.live_view import print_answer, print_results
from sweeper.reporting.result_tables import markdown_report
from sweeper.reporting.results import StudyResults
from sweeper.reporting.tracked_metrics import study_figures
from sweeper.reporting.verdict import judge
from sweeper.reporting.verdict_doubts import with_override
from sweeper.search.study_plan import StudyPlan
from sweeper.tracking.tracker import RunStatus, Tracker
from sweeper.tracking.tracker_factory import browse_command, make_registry


@dataclass
class StudyConclusion:
    """Concludes a run, whether or not the study came to its end."""

    folder: StudyFolder
    storage: BaseStorage
    tracker: Tracker
    console: Console
    writer: ResultsWriter
    steps: GuardedSteps

    def conclude(self, status: RunStatus) -> StudyResults:
        """Write, record and print the results that there are.

        Results of a run that ended early, also by its budget, replace an earlier answer only if they
        are richer. Every step is taken whatever became of the others. The first error is raised after
        the last step.
        """
        try:
            results = self.writer.collect()
            complete = status == "FINISHED" and not self.writer.state.cut_short
            surpassed = complete or self.writer.is_surpassed_by(results)
            if surpassed and results.arms:
                self._write(results, status)
        except BaseException:
            # a database that is away, or Ctrl-C: MLflow keeps what it had
            self.leave_answer("FAILED" if status == "FINISHED" else status)
            raise
        if surpassed:
            self._record(results, status)
        else:
            self.leave_answer(status)
        self.steps.raise_first()
        return results

    def leave_answer(self, status: RunStatus) -> None:
        """Leave the files and MLflow's run as an earlier run left them, and print where they are."""
        if self.writer.earlier is not None:
            self._print(f"\nAnswer     {self.writer.earlier}, from an earlier run")
        if status == "KILLED":
            self._print(f"Resume     python -m sweeper {self._plan.command}")
        self.tracker.keep_ending(status)
        self._close_shipping(status)

    def _write(self, results: StudyResults, status: RunStatus) -> None:
        """Write and print results that are the study's answer from now on."""
        take = self.steps.take
        take("results.json and report.md", lambda: self.writer.write(results))
        take("the answer", lambda: self._show(results, status))
        take("report.html", lambda: write_page(results, self.folder, self.storage))

    def _record(self, results: StudyResults, status: RunStatus) -> None:
        """Record results in MLflow, and remove the losers' weights."""
        take = self.steps.take
        answered = status == "FINISHED" and bool(results.arms)
        if answered:
            # the cards lie in the folders that are uploaded next
            take("the winners' cards", lambda: add_served_losses(results, self.folder))
            take("the kept weights in MLflow", lambda: self._keep(results))
        take("the answer in MLflow", lambda: self._close_tracker(results, status))
        if answered:
            take("the losers' weights", lambda: self._make_room(results))

    def _keep(self, results: StudyResults) -> None:
        adapters = self._plan.study.retention.adapters
        most = sys.maxsize if adapters is None else adapters
        self.tracker.keep(kept(results, self.folder, most))

    @property
    def _plan(self) -> StudyPlan:
        return self.writer.state.plan

    def _close_tracker(self, results: StudyResults, status: RunStatus) -> None:
        self.tracker.close_study(
            status,
            *study_figures(results),
            markdown_report(results, judge(results)) if results.arms else "",
            [path for path in self.folder.answers if path.exists()],
        )
        self._close_shipping(status)

    def _close_shipping(self, status: RunStatus) -> None:
        """Wait until MLflow has everything, and print what is left for `sync`."""
        left = self.tracker.close(hurry=status == "KILLED")
        for problem in left:
            self.console.print(f"not recorded in MLflow: {problem}", style="yellow")
        if left:
            command = f"python -m sweeper sync {self._plan.study.study_name}{self._elsewhere()}"
            self._print(f"Record     {command}")

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _show(self, results: StudyResults, status: RunStatus) -> None:
        if self._plan.settings.verbosity == "quiet":
            print_answer(results, self.console)
            text = f"\nResults    {self.folder.page}"
        else:
            print_results(results, self.console)
            text = self._next_commands(results, status)
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _make_room(self, results: StudyResults) -> None:
        """Remove the losers' weights (sweeper.commands.retention), and print what the study takes up."""
        adapters = self._plan.study.retention.adapters
        freed, words = 0.0, ""
        # MLflow is asked for its champions only if there is anything to remove
        if adapters is not None and losers(results, self.folder, adapters):
            try:
                registry = make_registry(self._plan.settings.tracking)
                held = [] if registry is None else [each.folder for each in registry.champions()]
                freed = delete(losers(results, self.folder, adapters, held))
                words = (
                    f"; {freed:,.1f} MiB of losers' weights freed (retention.adapters={adapters})"
                )
            except TrackingError as error:
                words = (
                    f"; nothing freed, because it is unknown which trial is a champion ({error})"
                )
        used = size_mib(self.folder.path)
        text = f"Disk       {used:,.1f} MiB in {self.folder.path}{words}"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _next_commands(self, results: StudyResults, status: RunStatus) -> str:
        plan, folder = self._plan, self.folder
        name, total = plan.study.study_name, plan.study.n_trials
        lines = ["", f"Results    {folder.page}"]
        best = results.arms[0].best
        if best is not None:
            trial = folder.trial(best.arm, best.number)
            lines.append(f"Best       {trial.artifact or trial.path}")
        if status == "FAILED":
            return "\n".join(lines)
        if status == "KILLED":
            return "\n".join([*lines, f"Resume     python -m sweeper {plan.command}"])
        extended = with_override(plan.command, "hydra.sweeper.n_trials", str(2 * total))
        new = with_override(plan.command, "hydra.sweeper.study_name", f"{name}_2")
        return "\n".join(
            [
                *lines,
                f"Read       python -m sweeper report {name}{self._elsewhere()}",
                f"Browse     {browse_command(plan.settings.tracking)}",
                f"Extend     python -m sweeper {extended}",
                f"Start new  python -m sweeper {new}",
            ]
        )

    def _elsewhere(self) -> str:
        output_dir = self._plan.settings.output_dir
        return "" if output_dir == "outputs" else f" --output-dir {shlex.quote(output_dir)}"
