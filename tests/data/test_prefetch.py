"""Prefetch and hub data sets against a hub on localhost, then without any network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sweeper.data.prefetch import prefetch
from tests.conftest import make_settings
from tests.data.fake_hub import COMMIT, fake_hub
from tests.data.samples import make_data, pairs, write_rows

Sweeper = Callable[..., subprocess.CompletedProcess[str]]


def write_card(repo: Path) -> None:
    """What every data set on the hub has."""
    repo.mkdir(parents=True, exist_ok=True)
    (repo / "README.md").write_text("---\nlicense: mit\n---\n# Pairs\n")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """The files of a hub; its endpoint is in `endpoint`."""
    root = tmp_path / "hub"
    data = root / "datasets" / "org" / "pairs"
    write_card(data)
    write_rows(data / "data" / "train.jsonl", pairs(range(30)))
    model = root / "models" / "org" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"x" * 2**20)
    (model / "pytorch_model.bin").write_bytes(b"x" * 2**20)
    with fake_hub(root) as endpoint:
        (tmp_path / "endpoint").write_text(endpoint)
        yield root


@pytest.fixture
def python(tmp_path: Path, hub: Path) -> Sweeper:
    """Run Python with a cache of its own and that hub."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {
            "HF_ENDPOINT": (tmp_path / "endpoint").read_text(),
            "HF_HOME": str(tmp_path / "home"),
        }
        own |= {"PYTHONPATH": os.pathsep.join(sys.path)}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        return subprocess.run(
            [sys.executable, *arguments],
            env={**inherited, **own, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=tmp_path,
        )

    return run


LOAD = """
import json, sys
from sweeper.config.settings import DataSettings
from sweeper.data.splits import load_splits
splits = load_splits(DataSettings.model_validate_json(sys.argv[1]))
print(json.dumps([splits.counts, splits.examples["test"][0].row.where[:9]]))
"""


@pytest.mark.slow
def test_what_was_prefetched_is_used_without_a_network(tmp_path: Path, python: Sweeper) -> None:
    """Model and data land in the cache, without second copies of weights; offline the rows are there."""
    fetched = python(
        "-m", "sweeper", "prefetch", "model.base_model=org/tiny", "data.train=org/pairs"
    )
    assert fetched.returncode == 0, fetched.stderr
    model, data = fetched.stdout.splitlines()
    folder = tmp_path / "home" / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert model == f"model org/tiny: {folder}  1.0 MiB"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert data.startswith(f"data.train org/pairs [train]: {tmp_path}/home/datasets/org___pairs/")
    offline = python("-c", LOAD, make_data(train="org/pairs").model_dump_json(), HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout) == [{"train": 24, "validation": 3, "test": 3}, "org/pairs"]


REFUSED = {
    "org/gated-7b: access is gated. Accept the licence at https://huggingface.co/org/gated-7b": {
        "model": {"base_model": "org/gated-7b"}
    },
    "org/none: not a local folder, and not a public model on the hub": {
        "model": {"base_model": "org/none"}
    },
    "org/tiny: no revision 'v9'. See https://huggingface.co/org/tiny/commits/main": {
        "model": {"base_model": "org/tiny", "revision": "v9"}
    },
    "Accept the terms at https://huggingface.co/datasets/org/gated": {
        "data": {"train": "org/gated"}
    },
    "org/none: not a local path, and not a public data set on the hub": {
        "data": {"train": "org/none"}
    },
    "Should be one of ['train']": {"data": {"train": {"path": "org/pairs", "split": "dev"}}},
}

FETCH = """
import json, sys
from sweeper.data.prefetch import prefetch
from sweeper.core.errors import SweeperError
from sweeper.config.settings import TrialSettings
said = []
for document in json.loads(sys.argv[1]):
    try:
        said.append(" ".join(map(str, prefetch([TrialSettings.model_validate(document)]))))
    except SweeperError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_what_cannot_be_fetched_says_why(python: Sweeper) -> None:
    """Gated, missing, wrong revision, wrong split: one line with the page to visit or the choices."""
    trial = make_settings().trial.model_dump(mode="json")
    documents = [
        {**trial, **{part: {**trial[part], **values} for part, values in wrong.items()}}
        for wrong in REFUSED.values()
    ]
    result = python("-c", FETCH, json.dumps(documents))
    assert result.returncode == 0, result.stderr
    for said, expected in zip(json.loads(result.stdout), REFUSED, strict=True):
        assert expected in said
        assert "\n" not in said


def test_local_things_are_named(tmp_path: Path) -> None:
    """The embedded model and data, local files and URLs need no fetching, and that is said."""
    path = write_rows(tmp_path / "rows.jsonl", pairs(range(3)))
    settings = make_settings(f"data.train=[{path},'s3://bucket/rows.jsonl']").trial
    assert [str(item) for item in prefetch([settings, settings])] == [
        "model embedded: local, nothing to fetch",
        f"data.train {path}: local, nothing to fetch",
        "data.train s3://bucket/rows.jsonl: read from its URL at every start, nothing to fetch",
        "evaluation.general_text.source embedded: local, nothing to fetch",
    ]
    [_, data, general] = prefetch([make_settings().trial])
    assert str(data) == "data.train embedded: local, nothing to fetch"
    assert "general_text" in str(general)
