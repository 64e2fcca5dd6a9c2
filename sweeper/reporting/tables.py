"""The answer in tables and one sentence: leaderboard, LoRA against full fine-tuning against the base.

A sheet is plain text cells; it is drawn for a terminal by rich, or written as Markdown.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.table import Table

from sweeper.outcome import Facts
from sweeper.reporting.results import ArmResult, Results, TrialResult
from sweeper.search.board import short_names

DASH = "–"


@dataclass(frozen=True)
class Sheet:
    """A table of text; `left` names the columns that are words rather than numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[str] = frozenset()

    def draw(self) -> Table:
        """For a terminal."""
        table = Table(
            title=self.title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for column in self.columns:
            left = column in self.left
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a file."""
        marks = [":--" if column in self.left else "--:" for column in self.columns]
        lines = [self.columns, tuple(marks), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison(results: Results) -> Sheet:
    """One row per untuned base and one per arm's best trial."""
    rows = [*_base_rows(results), *(_arm_row(arm) for arm in results.arms)]
    columns = (
        *("method", "best of", "trainable", "% of all", "eval loss", "vs base", "perplexity"),
        *("time/trial", "memory", "artifact"),
    )
    return Sheet("LoRA against full fine-tuning", columns, tuple(rows), frozenset({"method"}))


def leaderboard(arm: ArmResult, limit: int | None = None) -> Sheet:
    """An arm's trials, the best first."""
    keys = list(dict.fromkeys(key for trial in arm.trials for key in trial.point))
    columns = ("#", "trial", *(key.rsplit(".", 1)[-1] for key in keys))
    columns += ("eval loss", "time", "ended")
    rows = [_trial_row(place, trial, keys) for place, trial in enumerate(arm.trials, start=1)]
    title = f"{arm.name}: {arm.tried} trials, {_duration(arm.seconds)} in all"
    return Sheet(title, columns, tuple(rows[:limit]), frozenset({"ended", "target_modules"}))


def pareto_front(arm: ArmResult) -> Sheet:
    """The trials that no other beats in the loss and in every cost, the best loss first."""
    front = [trial for trial in arm.trials if trial.number in arm.front]
    keys = list(dict.fromkeys(key for trial in front for key in trial.point))
    columns = ("trial", *(key.rsplit(".", 1)[-1] for key in keys), "eval loss", *arm.costs)
    rows = [
        (
            str(trial.number),
            *(short_names(trial.point).get(key.rsplit(".", 1)[-1], DASH) for key in keys),
            _number(trial.loss, "{:.4f}"),
            *(_number(trial.metric(cost), "{:,.4g}") for cost in arm.costs),
        )
        for trial in front
    ]
    title = f"{arm.name}: Pareto front of eval loss and {', '.join(arm.costs)}"
    return Sheet(title, columns, tuple(rows), frozenset({"target_modules"}))


def verdict(results: Results) -> str:
    """The answer in words, as far as the numbers carry it."""
    lora, full = results.arm("lora"), results.arm("full")
    if lora is None or lora.best is None:
        return "No LoRA trial has finished yet."
    name = f"The best {lora.method} ({_point(lora.best)})"
    gain = lora.facts.base_loss - (lora.best.loss or 0.0)
    if gain <= 0:
        return f"{name} is no better than the untuned base."
    if full is None or full.best is None:
        return f"{name} lowers the eval loss by {gain:.3f} nats; there is no full fine-tune to compare."
    return (
        f"{name} {_against_full(lora, full, gain)} One seed each: small differences may be chance."
    )


def markdown_report(results: Results) -> str:
    """report.md: the verdict, the comparison, every arm's leaderboard."""
    parts = [
        f"# {results.study_name}",
        verdict(results),
        f"`python -m sweeper {results.command}`",
        "## " + comparison(results).title,
        comparison(results).markdown(),
    ]
    for arm in results.arms:
        if arm.front:
            front = pareto_front(arm)
            parts += [f"## {front.title}", front.markdown()]
        sheet = leaderboard(arm)
        parts += [f"## {sheet.title}", sheet.markdown(), f"Data: {describe_data(arm.facts)}"]
        parts += [] if arm.audit is None else [f"{arm.name}: {arm.audit}."]
    return "\n\n".join(parts) + "\n"


def describe_data(facts: Facts) -> str:
    """Where the data came from, how much of it, and its digest."""
    counts = " / ".join(f"{count:,} {name}" for name, count in facts.rows.items())
    dropped = sum(facts.dropped.values())
    reasons = ", ".join(f"{count} {why}" for why, count in facts.dropped.items() if count)
    lost = f", dropped {dropped} ({reasons})" if dropped else ""
    return (
        f"{facts.data_source} ({facts.data_format}): {counts} rows{lost}; "
        f"{facts.target_tokens:,} validation tokens; digest {facts.data_digest[:12]}"
    )


def _against_full(lora: ArmResult, full: ArmResult, gain: float) -> str:
    assert lora.best is not None
    assert full.best is not None
    base = full.facts.base_loss  # one zero line for both: the base as full fine-tuning finds it
    full_gain = base - (full.best.loss or 0.0)
    if full_gain <= 0:
        return (
            f"lowers the eval loss by {gain:.3f} nats; full fine-tuning does not lower it at all."
        )
    share = 100 * (base - (lora.best.loss or 0.0)) / full_gain
    parts = [
        f"reaches {share:.1f} % of full fine-tuning's improvement "
        f"(eval loss {lora.best.loss:.4f} against {full.best.loss:.4f})"
    ]
    trained = _ratio(
        lora.best.metric("parameters/trainable"), full.best.metric("parameters/trainable")
    )
    if trained is not None:
        parts.append(f"with {100 * trained:.1f} % of the trainable parameters")
    time = _ratio(lora.seconds_per_trial, full.seconds_per_trial)
    if time is not None:
        parts.append(f"in {time:.1f}× the time a trial")
    return " ".join(parts) + "."


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _base_rows(results: Results) -> list[tuple[str, ...]]:
    """The untuned base, once per way it is held in memory."""
    bases = {arm.base: arm.facts for arm in results.arms}
    return [
        (
            *(f"untuned, {base}", DASH, "0", DASH),
            *(f"{facts.base_loss:.4f}", DASH, f"{facts.base_perplexity:.2f}"),
            *(DASH, DASH, DASH),
        )
        for base, facts in bases.items()
    ]


def _arm_row(arm: ArmResult) -> tuple[str, ...]:
    best = arm.best
    if best is None:
        return (_label(arm), str(arm.tried), *([DASH] * 8))
    assert best.loss is not None
    return (
        _label(arm),
        str(arm.tried),
        _number(best.metric("parameters/trainable")),
        _number(best.metric("parameters/trainable_percent"), "{:.2f} %"),
        f"{best.loss:.4f}",
        f"{best.loss - arm.facts.base_loss:+.4f}",
        _number(best.metric("best/eval_perplexity"), "{:.2f}"),
        _duration(arm.seconds_per_trial),
        _number(best.metric("cost/peak_memory_mib"), "{:,.0f} MiB"),
        _number(best.metric("cost/artifact_mib"), "{:.2f} MiB"),
    )


def _label(arm: ArmResult) -> str:
    """The method, and the arm's name where that says more."""
    return arm.method if arm.name in ("lora", "full") else f"{arm.method} ({arm.name})"


def _trial_row(place: int, trial: TrialResult, keys: list[str]) -> tuple[str, ...]:
    shown = short_names(trial.point)
    loss = DASH if trial.loss is None else f"{trial.loss:.4f}"
    return (
        str(place),
        str(trial.number),
        *(shown.get(key.rsplit(".", 1)[-1], DASH) for key in keys),
        loss,
        _duration(trial.metric("cost/seconds")),
        trial.outcome.cause,
    )


def _point(trial: TrialResult) -> str:
    return ", ".join(f"{name}={value}" for name, value in short_names(trial.point).items())


def _number(value: float | None, form: str = "{:,.0f}") -> str:
    return DASH if value is None else form.format(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
