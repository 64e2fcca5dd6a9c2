"""Studies and nights that earlier versions wrote: what was run, how it is kept, how it is unpacked.

Each archive is named after the commit whose code wrote what it holds, and is never made again. In an
archive a database is its SQL, and HERE stands for the folder in which everything was made: both keep
it small and free of one machine's paths.
"""

from __future__ import annotations

import gzip
import io
import json
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

HERE = "@HERE@"
DATABASE, DUMP = ".db", ".sql"
C705442 = Path(__file__).with_name("c705442.tar.gz")

NOWHERE = "http://127.0.0.1:9"
"""A tracking server that is away: everything to be recorded stays in the study's folder."""
FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline"),
    "++workers.fake.plan={1:oom,3:diverge}",
)
SMALL, WHOLE = (
    ("hydra.sweeper.n_trials=8", "hydra.sweeper.arms.full.n_trials=2"),
    ("hydra.sweeper.n_trials=12", "hydra.sweeper.arms.full.n_trials=4"),
)
UNFINISHED = (*FAKE, "hydra.sweeper.study_name=unfinished", f"tracking.uri={NOWHERE}")
"""Killed on its way from the totals SMALL to WHOLE; `study extend` had added one to the first arm's."""
FINISHED = (*FAKE, "hydra.sweeper.study_name=finished", *SMALL, "workers.fake.step_seconds=0.0")
QUEUED = "adapter.r=16"
"""The point that waits in the inbox of the unfinished study."""

SET, MODEL = "mine", "lr_rank_sweep"
"""The nightly set, and its entry's model in the registry."""
FIRST_NIGHT = datetime(2026, 5, 1, 22, 30, tzinfo=UTC)
GATE_LOSSES = {"base": 4.5, "challenger": 4.0, "champion": 4.0}
"""Losses that the judge of nights gives, in nats: the first challenger beats the untuned base, and no
later one beats the first."""


def unpack(into: Path, archive: Path = C705442) -> None:
    """Write the files of an archive into a folder, as they lay where they were made."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            file = tar.extractfile(member)
            assert file is not None
            text = file.read().decode().replace(HERE, str(into))
            path = into / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == DUMP:
                with closing(sqlite3.connect(path.with_suffix(DATABASE))) as database:
                    database.executescript(text)
            else:
                path.write_text(text, encoding="utf-8")


def pack(made: Path, archive: Path, host: str) -> None:
    """Write everything under a folder into an archive, without this machine's name and paths."""
    packed = gzip.GzipFile("", "wb", fileobj=archive.open("wb"), mtime=0)
    with packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted(path for path in made.rglob("*") if path.is_file()):
            kept = path.relative_to(made)
            if _is_left_out(kept):
                continue
            if path.suffix == DATABASE:
                kept, text = kept.with_suffix(DUMP), "".join(_dump(path))
            else:
                text = path.read_text(encoding="utf-8")
            content = (
                text.replace(str(made), HERE).replace(json.dumps(host), '"localhost"').encode()
            )
            entry = tarfile.TarInfo(kept.as_posix())
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _dump(path: Path) -> Iterator[str]:
    with closing(sqlite3.connect(path)) as database:
        yield from (f"{statement}\n" for statement in database.iterdump())


def _is_left_out(path: Path) -> bool:
    """Locks and logs, SQLite's journals, pages and pictures, the copies that MLflow keeps of files."""
    copied = {"figures", "artifacts"} & set(path.parts) or path.suffix == ".html"
    passing = path.suffix in (".lock", ".pid", ".log", ".db-journal")
    return bool(copied) or passing or path.name in (".lock", "lock")
