"""The morning's page: what ran, what is new, what got worse, what failed, and what it cost.

From a night's record and those before it; trains nothing, and asks the disk only how full it is.
"""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

from sweeper.config.settings import metric_words
from sweeper.config.space import Scalar
from sweeper.core.paths import StudyFolder, size_mib
from sweeper.nightly.night_record import (
    BestTrial,
    EntryRecord,
    NightRecord,
    comparable,
    last_of,
    regressed,
)
from sweeper.nightly.nightly_set import NightlySet
from sweeper.reporting.text_table import DASH, TextTable, duration, number

UNFINISHED = "not finished"
"""Of a night that was stopped; the next firing within its window goes on."""
FINE = frozenset({"finished", "early_stopped", "pruned", "duplicate"})
"""Ends of trials that are no failures."""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ padding: .25rem .75rem; border-bottom: 1px solid #ccc }}
code {{ background: #f4f4f4; padding: .1rem .3rem }}
</style></head><body>
{body}</body></html>
"""


def digest(record: NightRecord, nightly: NightlySet, history: Sequence[NightRecord]) -> str:
    """The page as Markdown."""
    head = f"# Nightly {record.set_name}, {record.date}: {record.result or UNFINISHED}"
    sections = (
        ("What ran", [_ran(record, nightly, history)]),
        ("What is new", list(_new(record, history))),
        ("Regressions", list(_regressions(record, nightly, history))),
        ("Failures", list(_failures(record))),
        ("Champions", list(_champions(record, history))),
        ("Cost", list(_cost(record, nightly))),
        ("Deleted", [f"- {line}" for line in record.tidied]),
        ("Not done", [f"- {problem}" for problem in record.problems]),
        ("Look closer", list(_commands(record, nightly))),
    )
    parts = [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections if lines]
    return "\n\n".join([head, _in_short(record), *parts]) + "\n"


def page(markdown: str, title: str) -> str:
    """The Markdown as a web page on its own; what others wrote into it stays text."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    return PAGE.format(title=escape(title), body=body)


def _in_short(record: NightRecord) -> str:
    statuses = Counter(entry.status.replace("_", " ") for entry in record.entries.values())
    words = ", ".join(f"{count} {status}" for status, count in statuses.items()) or "nothing ran"
    again = f"; started {record.starts} times" if record.starts > 1 else ""
    return f"Experiments: {words}{again}."


def _ran(record: NightRecord, nightly: NightlySet, history: Sequence[NightRecord]) -> str:
    columns = (
        "experiment",
        "tonight",
        "trials",
        "metric",
        "best",
        "last night",
        "untuned",
        "time",
        "ended",
    )
    rows = [
        _row(record.entries.get(entry.label), entry.label, history) for entry in nightly.experiments
    ]
    words = frozenset({"experiment", "tonight", "metric", "ended"})
    return TextTable("", columns, tuple(rows), words).markdown()


def _row(entry: EntryRecord | None, name: str, history: Sequence[NightRecord]) -> tuple[str, ...]:
    if entry is None:
        return (name, *[DASH] * 7, "not reached")
    last = last_of(name, history)
    before = last.best if last and last.best and comparable(entry, last) else None
    best = entry.best
    return (
        name,
        entry.decided.choice if entry.decided else DASH,
        str(sum(entry.causes.values())),
        metric_words(best.objective.metric) if best else DASH,
        _value(best),
        _value(before),
        number(best.base_value if best else None, "{:.4f}"),
        duration(entry.seconds),
        entry.status.replace("_", " "),
    )


def _value(best: BestTrial | None) -> str:
    return number(best.value if best else None, "{:.4f}")


def _new(record: NightRecord, history: Sequence[NightRecord]) -> Iterator[str]:
    for entry in record.entries.values():
        if entry.decided is not None:
            yield f"- {entry.name}: {entry.decided.choice}, {_one_line(entry.decided.reason)}"
        last = last_of(entry.name, history)
        before = last.best if last and comparable(entry, last) else None
        if entry.best is None or entry.status == "skipped":
            continue
        if before is None or entry.best.gain(over=before) > 0:
            point = ", ".join(f"{key}={_short(value)}" for key, value in entry.best.point.items())
            gain = (
                ""
                if before is None
                else f", {entry.best.gain(over=before):.4f} better than the last"
            )
            yield (
                f"- {entry.name}: best {entry.best.value:.4f}{gain} "
                f"(trial {entry.best.number}: `{point}`)"
            )
        if last is not None and before is None:
            yield (
                f"- {entry.name}: last night's value does not compare, it was measured on other "
                "data, another base model or by another metric"
            )


def _short(value: Scalar) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _regressions(
    record: NightRecord, nightly: NightlySet, history: Sequence[NightRecord]
) -> Iterator[str]:
    for entry in record.entries.values():
        last = last_of(entry.name, history)
        if regressed(entry, last, nightly.regression) and entry.best and last and last.best:
            yield (
                f"- {entry.name}: best {entry.best.value:.4f}, "
                f"{-entry.best.gain(over=last.best):.4f} worse than the last one "
                f"({last.best.value:.4f}; tolerance {nightly.regression:g})"
            )


def _failures(record: NightRecord) -> Iterator[str]:
    for entry in record.entries.values():
        if entry.message is not None:
            yield f"- {entry.name}: {_one_line(entry.message)}"
        for cause, count in sorted(entry.causes.items()):
            if cause not in FINE:
                yield f"- {entry.name}: {count} trials ended as {cause}"


def _champions(record: NightRecord, history: Sequence[NightRecord]) -> Iterator[str]:
    for entry in record.entries.values():
        if entry.champion is not None:
            found = entry.champion
            yield f"- {found.model}: {found.verdict} ({found.challenger}): {_one_line(found.reason)}"
            looks = sum(_looked(night.entries.get(entry.name)) for night in (record, *history))
            if looks:
                times = "once" if looks == 1 else f"{looks} times"
                yield (
                    f"- {found.model}: these nights looked at the gate {times}; every look makes "
                    "its verdicts a little less honest, so renew it now and then"
                )


def _looked(entry: EntryRecord | None) -> bool:
    return bool(entry and entry.champion and entry.champion.contrast)


def _cost(record: NightRecord, nightly: NightlySet) -> Iterator[str]:
    if record.ended is not None:
        limit = nightly.budget.wall_clock
        of_limit = "" if limit is None else f" of {duration(limit)}"
        took = (record.ended - record.began).total_seconds()
        yield f"- From the first start to the end: {duration(took)}{of_limit}"
    hours = sum(entry.seconds for entry in record.entries.values()) / 3600
    whole = nightly.budget.device_hours
    of_whole = "" if whole is None else f" of {whole:g}"
    yield f"- Device-hours of tonight's trials: {hours:.2f}{of_whole}"
    output = Path(nightly.output_dir)
    names = {entry.decided.study_name for entry in record.entries.values() if entry.decided}
    used = sum(size_mib(StudyFolder(output / name).path) for name in names)
    free = shutil.disk_usage(output if output.exists() else Path.cwd()).free / 2**30
    yield f"- Disk: these studies hold {used:.0f} MiB; {free:.1f} GiB are free"


def _commands(record: NightRecord, nightly: NightlySet) -> Iterator[str]:
    elsewhere = nightly.output_dir != "outputs"
    where = f" --output-dir {shlex.quote(nightly.output_dir)}" if elsewhere else ""
    names = {entry.decided.study_name for entry in record.entries.values() if entry.decided}
    for name in sorted(names):
        if StudyFolder(Path(nightly.output_dir) / name).results.exists():
            yield f"- `python -m sweeper report {name}{where}`"


def _one_line(words: str) -> str:
    """Others' messages, without what Markdown would take for its own."""
    return " ".join(words.split())[:500]
