"""The study that a verb means when its command line names none."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sweeper.core.errors import StudyError
from sweeper.core.steady_output import echo

EvidenceFile = Literal["results.json", "standing.json"]


def named_or_newest(name: str | None, output_dir: Path, evidence: EvidenceFile) -> str:
    """Return the given name, or else the newest study's, which is printed on stderr.

    Args:
        name: the name on the command line, or None.
        output_dir: the folder of the studies.
        evidence: file that a study must have. The newest study is the one whose file is newest.

    Raises:
        StudyError: no name was given and there is no such study.
    """
    if name is not None:
        return name
    found = sorted(output_dir.glob(f"*/{evidence}"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise StudyError(f"there are no studies under {output_dir}/ yet")
    newest = found[-1].parent.name
    # stdout may be read by a program (--format json)
    echo(f"study {newest}, the newest under {output_dir}/", stderr=True)
    return newest
