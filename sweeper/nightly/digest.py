"""The morning digest: experiments, changes, regressions, failures, champions and costs of a night.

The digest is computed from the records of this night and of earlier ones.
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
from sweeper.core.plain_text import in_code, in_markdown
from sweeper.nightly.night_record import (
    BestTrial,
    EntryRecord,
    NightRecord,
    comparable,
    latest_entry,
    regressed,
)
from sweeper.nightly.nightly_set import NightlySet
from sweeper.reporting.glossary import terms_in
from sweeper.reporting.text_table import DASH, TextTable, counted, duration, number
from sweeper.search.states import STATES

CHOICES = {"new": "new study", "continue": "study continued", "skip": "skipped"}
"""Text for each choice of an entry."""
UNFINISHED = "not finished"
"""Result of a night that was stopped. The next start within its window continues the night."""
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
    """Return the digest as Markdown."""
    head = f"# Nightly {record.set_name}, {record.date}: {record.result or UNFINISHED}"
    sections = (
        ("Experiments", [_experiments(record, nightly, history)]),
        ("Changes", list(_changes(record, history))),
        ("Regressions", list(_regressions(record, nightly, history))),
        ("Failures", list(_failures(record))),
        ("Champions", list(_champions(record, history))),
        ("Cost", list(_cost(record, nightly))),
        ("Deleted", [f"- {in_markdown(line)}" for line in record.tidied]),
        ("Problems", [f"- {_one_line(problem)}" for problem in record.problems]),
        ("Reports", list(_commands(record, nightly))),
    )
    parts = [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections if lines]
    text = "\n\n".join([head, _summary(record), *parts])
    terms = "\n".join(f"- **{term}**: {meaning}" for term, meaning in terms_in(text))
    return f"{text}\n\n## Terms\n\n{terms}\n"


def page(markdown: str, title: str) -> str:
    """Return the digest as a web page. Raw HTML in the Markdown stays text."""
    # Messages of other programs may contain HTML.
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    # A picture in a message would tell its server who reads the page, and when.
    parser.disable(["link", "image", "autolink", "html_inline", "html_block", "reference"])
    body = parser.render(markdown)
    return PAGE.format(title=escape(title), body=body)


def _summary(record: NightRecord) -> str:
    statuses = Counter(entry.status.replace("_", " ") for entry in record.entries.values())
    words = ", ".join(f"{count} {status}" for status, count in statuses.items()) or "nothing ran"
    again = f" The night was started {record.starts} times." if record.starts > 1 else ""
    return f"Experiments: {words}.{again}"


def _experiments(record: NightRecord, nightly: NightlySet, history: Sequence[NightRecord]) -> str:
    columns = (
        "experiment",
        "study",
        "trials",
        "metric",
        "best",
        "previous night",
        "untuned base",
        "time",
        "status",
    )
    rows = [
        _row(record.entries.get(entry.label), entry.label, history) for entry in nightly.experiments
    ]
    words = frozenset({"experiment", "study", "metric", "status"})
    return TextTable("", columns, tuple(rows), words).markdown()


def _row(entry: EntryRecord | None, name: str, history: Sequence[NightRecord]) -> tuple[str, ...]:
    if entry is None:
        return (name, *[DASH] * 7, "not reached")
    last = latest_entry(name, history)
    # A value on other data must not stand in the same row.
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


def _changes(record: NightRecord, history: Sequence[NightRecord]) -> Iterator[str]:
    for entry in record.entries.values():
        if entry.decided is not None:
            choice = CHOICES[entry.decided.choice]
            yield f"- {entry.name}: {choice} ({_one_line(entry.decided.reason)})"
        last = latest_entry(entry.name, history)
        before = last.best if last and comparable(entry, last) else None
        if entry.best is None or entry.status == "skipped":
            continue
        # An unchanged best is in the table and is no news.
        if before is None or entry.best.gain(over=before) > 0:
            point = ", ".join(f"{key}={_short(value)}" for key, value in entry.best.point.items())
            # A difference of two single values has no interval, so none is claimed
            earlier = (
                ""
                if before is None
                else f", after {before.value:.4f} on the previous night (one validation value each)"
            )
            yield (
                f"- {entry.name}: best {entry.best.value:.4f} "
                f"(trial {entry.best.number}: {in_code(point)}){earlier}"
            )
        if last is not None and before is None:
            yield (
                f"- {entry.name}: not comparable with the previous night, because the data, the base "
                "model or the metric changed"
            )


def _short(value: Scalar) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _regressions(
    record: NightRecord, nightly: NightlySet, history: Sequence[NightRecord]
) -> Iterator[str]:
    for entry in record.entries.values():
        last = latest_entry(entry.name, history)
        if regressed(entry, last, nightly.regression) and entry.best and last and last.best:
            yield (
                f"- {entry.name}: best {entry.best.value:.4f}, "
                f"{-entry.best.gain(over=last.best):.4f} worse than on the previous night "
                f"({last.best.value:.4f}, tolerance {nightly.regression:g})"
            )


def _failures(record: NightRecord) -> Iterator[str]:
    for entry in record.entries.values():
        if entry.message is not None:
            yield f"- {entry.name}: {_one_line(entry.message)}"
        for cause, count in sorted(entry.causes.items()):
            if cause not in STATES or not STATES[cause].comparable:
                yield f"- {entry.name}: {counted(count, 'trial')} ended as {cause}"


def _champions(record: NightRecord, history: Sequence[NightRecord]) -> Iterator[str]:
    for entry in record.entries.values():
        if entry.champion is not None:
            found = entry.champion
            yield f"- {found.model}: {found.verdict} ({found.challenger}): {_one_line(found.reason)}"
            uses = sum(_used_gate(night.entries.get(entry.name)) for night in (record, *history))
            if uses:
                times = "once" if uses == 1 else f"{uses} times"
                yield (
                    f"- {found.model}: the gate split has been evaluated {times}. Each evaluation "
                    "makes decisions on it more optimistic, so replace its examples now and then."
                )


def _used_gate(entry: EntryRecord | None) -> bool:
    return bool(entry and entry.champion and entry.champion.contrast)


def _cost(record: NightRecord, nightly: NightlySet) -> Iterator[str]:
    if record.ended is not None:
        limit = nightly.budget.wall_clock
        of_limit = "" if limit is None else f" of {duration(limit)}"
        took = (record.ended - record.began).total_seconds()
        yield f"- From the first start to the end: {duration(took)}{of_limit}"
    hours = sum(entry.seconds for entry in record.entries.values()) / 3600
    limit_hours = nightly.budget.device_hours
    of_hours = "" if limit_hours is None else f" of {limit_hours:g}"
    yield f"- Device-hours of tonight's trials: {hours:.2f}{of_hours}"
    output = Path(nightly.output_dir)
    names = {entry.decided.study_name for entry in record.entries.values() if entry.decided}
    # Sizes are read at the end, after the cleanup.
    used = sum(size_mib(StudyFolder(output / name).path) for name in names)
    # The folder does not exist if every entry failed before its study began.
    free = shutil.disk_usage(output if output.exists() else Path.cwd()).free / 2**30
    yield f"- Disk: these studies use {used:.0f} MiB, and {free:.1f} GiB are free"


def _commands(record: NightRecord, nightly: NightlySet) -> Iterator[str]:
    elsewhere = nightly.output_dir != "outputs"
    where = f" --output-dir {shlex.quote(nightly.output_dir)}" if elsewhere else ""
    names = {entry.decided.study_name for entry in record.entries.values() if entry.decided}
    for name in sorted(names):
        if StudyFolder(Path(nightly.output_dir) / name).results.exists():
            yield f"- {in_code(f'python -m sweeper report {name}{where}')}"


def _one_line(words: str) -> str:
    """Return a message on one line, because line breaks would end a Markdown list item."""
    # A traceback would make the page unreadable. night.json holds the whole message.
    return in_markdown(" ".join(words.split())[:500])
