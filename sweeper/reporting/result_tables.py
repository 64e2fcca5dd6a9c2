"""Tables of a study's results: the arms compared, their training conditions, and leaderboards."""

from __future__ import annotations

from sweeper.config.settings import metric_words
from sweeper.core.outcome import ArmBaseline
from sweeper.core.plain_text import in_code, in_markdown
from sweeper.reporting.glossary import terms_in
from sweeper.reporting.rank_ladder import rank_ladders, rank_sheet
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult, equal_size
from sweeper.reporting.study_progress import format_scalar
from sweeper.reporting.text_table import DASH, TextTable, counted, duration, number
from sweeper.reporting.verdict import Verdict
from sweeper.reporting.verdict_doubts import label


def comparison(results: StudyResults) -> TextTable:
    """Return one row per untuned base and one per arm's best trial, with values and costs.

    `change` is the value minus the untuned base's: a loss that fell is negative, a ROUGE that rose is
    positive. `forgetting` is the same difference for the loss on general text in nats per token.
    """
    tested = {
        name: loss
        for found in results.contrasts
        for name, loss in zip((found.arm, found.reference), found.losses, strict=True)
    }
    for arm in results.arms:
        if arm.final is not None and arm.final.test_loss is not None:
            tested[arm.name] = arm.final.test_loss
    trained = float(results.arms[0].facts.base_parameters)  # full fine-tuning trains all of them
    forgot = {found.arm: found.difference.value for found in results.forgetting}
    rows = [*_base_rows(results), *(_arm_row(arm, trained, tested, forgot) for arm in results.arms)]
    columns = (
        *("method", "trainable", "of base", "of total", "fewer"),
        *(metric_words(results.objective.metric), "change", "perplexity"),
        *("test loss", "forgetting", "time/trial", "memory", "artifact"),
    )
    dropped_first = (
        *("of total", "of base", "fewer", "perplexity", "artifact", "memory", "change"),
        *("trainable", "time/trial"),
    )
    sheet = TextTable(
        "Arms side by side", columns, tuple(rows), frozenset({"method"}), dropped_first
    )
    # Columns without a single value are left out.
    sheet = sheet if tested else sheet.without("test loss")
    return sheet if results.forgetting else sheet.without("forgetting")


def conditions(results: StudyResults) -> TextTable:
    """Return one row per arm with the conditions under which its best trial was found."""
    columns = (
        *("method", "trials", "seeds", "weights", "compute", "optimiser", "batch"),
        *("learning rate", "rates searched", "device time"),
    )
    words = frozenset({"method", "weights", "compute", "optimiser"})
    rows = [_condition_row(results, arm) for arm in results.arms]
    dropped_first = ("compute", "batch", "optimiser", "weights", "device time", "rates searched")
    return TextTable("Training conditions", columns, tuple(rows), words, dropped_first)


def finalists(results: StudyResults) -> TextTable | None:
    """Return one row per configuration that was trained with several seeds, or None without any."""
    rows = [
        (
            label(arm),
            str(finalist.number),
            f"{len(finalist.values)} of {len(finalist.repeats)}",
            " ".join(number(repeat.value, "{:.4f}") for repeat in finalist.repeats),
            f"{finalist.mean:.4f}",
            number(finalist.spread, "{:.4f}"),
            "won" if finalist.number == arm.final.winner else "",
        )
        for arm in results.arms
        if arm.final is not None
        for finalist in arm.final.finalists
    ]
    columns = ("method", "trial", "seeds", "validation by seed", "mean", "sd", "chosen")
    left = frozenset({"method", "validation by seed", "chosen"})
    if not rows:
        return None
    return TextTable("Finalists over seeds", columns, tuple(rows), left, ("trial", "sd", "seeds"))


def leaderboard(arm: ArmResult, limit: int | None = None) -> TextTable:
    """Return an arm's trials, the best first, and no more than `limit` of them."""
    # Conditional keys are missing from some trials, so all trials are asked.
    keys = list(dict.fromkeys(key for trial in arm.trials for key in trial.params))
    columns = ("#", "trial", *_short(keys), "trainable")
    columns += (metric_words(arm.objective.metric), "time", "ended")
    rows = [_trial_row(place, trial, keys) for place, trial in enumerate(arm.trials, start=1)]
    title = f"{arm.name}: {counted(arm.tried, 'trial')}, {duration(arm.seconds)} in total"
    if limit is not None and len(rows) > limit:
        title += f", the best {limit}"
    # The learning rate and the rank are what most readers look for.
    minor = [name for name in reversed(_short(keys)) if name not in ("learning_rate", "r")]
    dropped_first = ("#", "time", "trainable", *minor, "ended", "r", "learning_rate")
    left = frozenset({"ended", "target_modules"})
    sheet = TextTable(title, columns, tuple(rows[:limit]), left, dropped_first)
    # With adapter.trainable_parameters the count may differ from the request by up to 10 %.
    return sheet if equal_size(arm) else sheet.without("trainable")


def pareto_front(arm: ArmResult) -> TextTable:
    """Return the trials that no other trial beats in value and in every cost, the best value first."""
    front = [trial for trial in arm.trials if trial.number in arm.front]
    keys = list(dict.fromkeys(key for trial in front for key in trial.params))
    metric = metric_words(arm.objective.metric)
    columns = ("trial", *_short(keys), metric, *arm.costs)
    rows = [
        (
            str(trial.number),
            *_point_cells(trial, keys),
            number(trial.value, "{:.4f}"),
            *(number(trial.metric(cost), "{:,.4g}") for cost in arm.costs),
        )
        for trial in front
    ]
    title = f"{arm.name}: Pareto front of {metric} and {', '.join(arm.costs)}"
    return TextTable(
        title, columns, tuple(rows), frozenset({"target_modules"}), tuple(_short(keys))
    )


def markdown_report(results: StudyResults, verdict: Verdict) -> str:
    """Return the text of report.md: the verdict, all tables, and the terms that they use."""
    parts = [
        f"# {results.study_name}",
        verdict.text,
        in_code(f"python -m sweeper {results.command}"),
    ]
    sheets = (comparison(results), conditions(results), finalists(results))
    for sheet in filter(None, sheets):
        parts += [f"## {sheet.title}", sheet.markdown()]
    for ladder in rank_ladders(results):
        sheet = rank_sheet(ladder)
        parts += [f"## {sheet.title}", sheet.markdown(), ladder.words]
    for arm in results.arms:
        if arm.front:
            front = pareto_front(arm)
            parts += [f"## {front.title}", front.markdown()]
        sheet = leaderboard(arm)
        parts += [
            f"## {sheet.title}",
            sheet.markdown(),
            f"Data: {in_markdown(describe_data(arm.facts))}",
            *(f"Base: {in_markdown(remark)}." for remark in arm.facts.base_remarks),
        ]
        parts += [] if arm.audit is None else [f"{arm.name}: {arm.audit}."]
    terms = terms_in("\n".join(parts))
    parts += ["## Terms", "\n".join(f"- **{term}**: {meaning}" for term, meaning in terms)]
    return "\n\n".join(parts) + "\n"


def describe_data(facts: ArmBaseline) -> str:
    """Return the data's source, row counts, dropped rows and digest as text."""
    counts = " / ".join(f"{count:,} {name}" for name, count in facts.rows.items())
    dropped = sum(facts.dropped.values())
    reasons = ", ".join(f"{count} {why}" for why, count in facts.dropped.items() if count)
    lost = f", dropped {dropped} ({reasons})" if dropped else ""
    changes = "; ".join(f"{count} × {what}" for what, count in facts.changed.items())
    lost += f", changed: {changes}" if changes else ""
    unread = ", ".join(name or repr(name) for name in facts.unread)
    lost += f", unread columns: {unread}" if unread else ""
    return (
        f"{facts.data_source} ({facts.data_format}): {counts} rows{lost}, "
        f"{facts.target_tokens:,} target tokens in validation, digest {facts.data_digest[:12]}"
    )


def _base_rows(results: StudyResults) -> list[tuple[str, ...]]:
    """Return one row per precision of the untuned base: quantization changes its loss."""
    # Arms in the same precision share their untuned base.
    bases = {arm.base: arm for arm in results.arms}
    tested = {
        arm.base: arm.final.untuned_test_loss for arm in results.arms if arm.final is not None
    }
    return [
        (
            *(f"untuned, {base}", "0", DASH, DASH, DASH, f"{arm.base_value:.4f}", DASH),
            number(arm.facts.base_metrics.get("eval/perplexity"), "{:.2f}"),
            *(number(tested.get(base), "{:.4f}"), DASH, DASH, DASH, DASH),
        )
        for base, arm in bases.items()
    ]


def _arm_row(
    arm: ArmResult, trained: float, tested: dict[str, float], forgot: dict[str, float]
) -> tuple[str, ...]:
    best = arm.best
    if best is None:
        return (label(arm), *([DASH] * 12))
    assert best.value is not None
    trainable = best.metric("parameters/trainable")
    # Measured against the base without its adapter, which is what full fine-tuning trains.
    fewer = None if trainable is None or not trained else 100 * (1 - trainable / trained)
    return (
        label(arm),
        number(trainable),
        number(best.metric("parameters/trainable_percent_of_base"), "{:.4g} %"),
        number(best.metric("parameters/trainable_percent"), "{:.4g} %"),
        number(fewer, "{:.2f} %"),
        f"{best.value:.4f}",
        f"{best.value - arm.base_value:+.4f}",
        number(best.metric("best/eval_perplexity"), "{:.2f}"),
        number(tested.get(arm.name), "{:.4f}"),
        number(forgot.get(arm.name), "{:+.4f}"),
        duration(arm.seconds_per_trial),
        number(best.metric("cost/peak_memory_mib"), "{:,.0f} MiB"),
        number(best.metric("cost/artifact_mib"), "{:.2f} MiB"),
    )


def _condition_row(results: StudyResults, arm: ArmResult) -> tuple[str, ...]:
    if arm.best is None:
        return (label(arm), str(arm.tried), *([DASH] * 7), duration(arm.device_seconds))
    micro = arm.setting("training.per_device_train_batch_size")
    accumulated = arm.setting("training.gradient_accumulation_steps")
    searched = arm.ranges.get("training.learning_rate")
    # An adopted arm was searched by an earlier study, whose rates are shown.
    rates = searched.values if searched is not None else arm.adopted.rates if arm.adopted else ()
    return (
        label(arm),
        str(arm.tried) if arm.adopted is None else f"{arm.adopted.trials} in that run's search",
        str(results.seeds(arm.name)),
        _weights(arm),
        arm.facts.dtype,
        arm.setting("training.optim") or DASH,
        str(micro * accumulated) if micro and accumulated else DASH,
        number(arm.setting("training.learning_rate"), "{:.3g}"),
        f"{rates[0]:.2g}…{rates[-1]:.2g}" if rates else DASH,
        duration(arm.device_seconds),
    )


def _weights(arm: ArmResult) -> str:
    """Return the precision of the base and of the trained weights, which are fp32 in every arm."""
    if arm.setting("adapter.method") == "none":
        # Full fine-tuning trains all weights, which are kept in fp32 under autocast.
        return "float32"
    return f"{arm.base} + float32"


def _short(keys: list[str]) -> list[str]:
    return [key.rsplit(".", 1)[-1] for key in keys]


def _point_cells(trial: TrialResult, keys: list[str]) -> list[str]:
    point = trial.params
    return [format_scalar(point[key]) if key in point else DASH for key in keys]


def _trial_row(place: int, trial: TrialResult, keys: list[str]) -> tuple[str, ...]:
    return (
        str(place),
        str(trial.number),
        *_point_cells(trial, keys),
        number(trial.metric("parameters/trainable")),
        number(trial.value, "{:.4f}"),
        duration(trial.metric("cost/seconds")),
        trial.outcome.ending,
    )
