"""Where rows come from: files, folders in the hub's layout, URLs, and the hub."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from sweeper.config.settings import DataSource
from sweeper.core.errors import ConfigError, DataError
from sweeper.data.examples import DropCounts
from sweeper.data.sources import describe_sources, is_hub_id, path_problems, read_source
from sweeper.data.splits import load_splits
from tests.conftest import make_settings
from tests.data.fake_hub import fake_hub
from tests.data.samples import make_data, pairs, write_rows


def prompts(path: str | Path, key: str = "train", **more: Any) -> list[str]:
    """The prompts that a source gives."""
    rows = read_source(DataSource(path=str(path), **more), key, DropCounts())
    return [row.values["prompt"] for row in rows]


def asked(*numbers: int) -> list[str]:
    """The prompts of numbered pairs."""
    return [f"What is {number}?" for number in numbers]


def test_a_folder_without_splits_is_taken_whole(tmp_path: Path) -> None:
    """Files in order of their names, folders inside included, README.md and LICENSE left alone."""
    write_rows(tmp_path / "b.jsonl", pairs([2]))
    write_rows(tmp_path / "a.jsonl", pairs([1]))
    write_rows(tmp_path / "more" / "c.jsonl", pairs([3]))
    (tmp_path / "README.md").write_text("# About")
    (tmp_path / "LICENSE").write_text("free")
    for key in ("train", "validation"):
        assert prompts(tmp_path, key) == asked(1, 2, 3)


def test_a_folder_in_the_hubs_layout_has_splits(tmp_path: Path) -> None:
    """data/<split>-00000-of-00002 files: a key takes the split of its own name, or a named one."""
    for name, number in (("train-00000", 1), ("train-00001", 2), ("test-00000", 3)):
        write_rows(tmp_path / "data" / f"{name}-of-00002.jsonl", pairs([number]))
    assert prompts(tmp_path) == asked(1, 2)
    assert prompts(tmp_path, "test") == asked(3)
    assert prompts(tmp_path, "validation", split="test") == asked(3)
    with pytest.raises(
        DataError,
        match=r"no split 'validation'. Its splits are train, test. Choose one with \{path",
    ):
        prompts(tmp_path, "validation")


CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/rows.jsonl}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/*.jsonl}
---
# A data set
"""


def test_a_folders_card_names_configurations(tmp_path: Path) -> None:
    """The YAML card of README.md decides, as on the hub; what it does not name is an error."""
    (tmp_path / "README.md").write_text(CARD)
    write_rows(tmp_path / "main" / "rows.jsonl", pairs([1]))
    write_rows(tmp_path / "socratic" / "rows.jsonl", pairs([2]))
    assert prompts(tmp_path, name="main") == asked(1)
    assert prompts(tmp_path, name="socratic") == asked(2)
    with pytest.raises(DataError, match=r"needs a configuration. Its README.md names main, socra"):
        prompts(tmp_path)
    with pytest.raises(
        DataError, match=r"no configuration 'x'. Its README.md names main, socratic"
    ):
        prompts(tmp_path, name="x")


def test_a_parquet_folder_gives_the_rows_that_datasets_gives(tmp_path: Path) -> None:
    """A folder written as the hub stores it reads as datasets.load_dataset reads it."""
    import datasets

    (tmp_path / "data").mkdir()
    written = datasets.Dataset.from_list(pairs(range(5)))
    written.to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    loaded = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    rows = read_source(DataSource(path=str(tmp_path)), "train", DropCounts())
    assert [row.values for row in rows] == list(loaded)


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    """Notes beside rows must not become training text unasked."""
    write_rows(tmp_path / "rows.jsonl", pairs([1]))
    (tmp_path / "notes.txt").write_text("remember")
    with pytest.raises(DataError, match=r"several kinds \(\.jsonl, \.txt\)\. Name the files"):
        prompts(tmp_path)


def test_a_file_of_states_is_no_mark_of_save_to_disk(tmp_path: Path) -> None:
    """A folder whose rows lie in state.json is read. One of datasets has a second file beside it."""
    (tmp_path / "state.json").write_text(json.dumps(pairs([1])))
    assert prompts(tmp_path) == asked(1)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="save_to_disk"):
        prompts(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    """A folder without data files is named."""
    with pytest.raises(DataError, match=str(tmp_path)):
        prompts(tmp_path)


@pytest.fixture
def bucket() -> Iterator[str]:
    """A remote folder, in fsspec's memory file system."""
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/data/train.jsonl", b'{"prompt": "What is 1?", "completion": "x"}\n')
    system.pipe("/bucket/data/test.jsonl", b'{"prompt": "What is 2?", "completion": "x"}\n')
    yield "memory://bucket/data"
    system.rm("/bucket", recursive=True)


def test_urls_are_files_and_folders(bucket: str, tmp_path: Path) -> None:
    """What fsspec opens is read like a local file or folder."""
    assert prompts(f"{bucket}/train.jsonl") == asked(1)
    assert prompts(bucket) == asked(1)
    assert prompts(bucket, "test") == asked(2)
    local = write_rows(tmp_path / "rows.jsonl", pairs([3]))
    assert prompts(f"file://{local}") == asked(3)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_on_a_web_server_is_read_in_pieces(tmp_path: Path, zipped: bool) -> None:
    """http:// goes through ranges of bytes, line by line, gzipped or not."""
    name = "train.jsonl.gz" if zipped else "train.jsonl"
    path = tmp_path / "datasets" / "org" / "set" / name
    write_rows(path, pairs(range(2000)))
    if zipped:
        path.write_bytes(gzip.compress(path.read_bytes()))
    with fake_hub(tmp_path) as endpoint:
        url = f"{endpoint}/datasets/org/set/resolve/main/{name}"
        assert prompts(url) == asked(*range(2000))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"split": "test"}, "split cannot be given for a file"),
        ({"name": "main", "revision": "v1"}, "name and revision cannot be given for a file"),
    ],
)
def test_keys_that_mean_nothing_for_a_file_are_refused(
    tmp_path: Path, more: dict[str, str], message: str
) -> None:
    """A split of a plain file would otherwise be ignored in silence."""
    path = write_rows(tmp_path / "rows.jsonl", pairs([1]))
    with pytest.raises(DataError, match=message):
        prompts(path, **more)
    if "revision" in more:
        with pytest.raises(DataError, match="revision cannot be given for a folder"):
            prompts(tmp_path, revision="v1")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/gone.jsonl", r"memory://bucket/gone\.jsonl: not found"),
        ("abc://x/y.jsonl", r"abc://x/y\.jsonl: cannot be read \(ValueError: Protocol not known"),
        ("s3://bucket/a.jsonl", r"needs a package .*pip install 'sweeper\[remote\]'"),
        ("http://127.0.0.1:9/a.jsonl", r"http://127\.0\.0\.1:9/a\.jsonl: .*(Connect|not found)"),
    ],
)
def test_an_unreachable_url_is_one_line(url: str, message: str) -> None:
    """Whatever a file system raises comes as an error with the URL."""
    with pytest.raises(DataError, match=message) as caught:
        prompts(url)
    assert "\n" not in str(caught.value)


def test_paths_are_checked_before_anything_is_opened(tmp_path: Path) -> None:
    """Missing files come with the names close to them, unknown kinds with the known ones, by key."""
    write_rows(tmp_path / "train.jsonl", pairs([1]))
    (tmp_path / "a.xlsx").touch()
    data = make_data(
        train=[f"{tmp_path}/train.json", {"path": f"{tmp_path}/a.xlsx"}],
        validation="gone",
        test="some-org/some-set",
    )
    first, second, third = path_problems(data, make_settings().evaluation.general_text, {})
    assert first == (
        f"data.train={tmp_path}/train.json: no such file or folder. Did you mean {tmp_path}/train.jsonl?"
    )
    assert second.startswith(
        f"data.train={tmp_path}/a.xlsx: unknown file ending .xlsx. Use .jsonl, "
    )
    assert third == (
        "data.validation=gone: no such file or folder. A hub data set is named org/name."
    )


def test_what_is_no_file_is_refused_unopened(tmp_path: Path) -> None:
    """A pipe, and a link to a device, also as general text and as template: a read would never end."""
    os.mkfifo(tmp_path / "rows.jsonl")
    (tmp_path / "zeros.csv").symlink_to("/dev/zero")
    overrides = (
        *(f"data.train={tmp_path}/rows.jsonl", f"data.template={tmp_path}/rows.jsonl"),
        f"evaluation.general_text.source={tmp_path}/zeros.csv",
    )
    settings = make_settings(*overrides)
    words = [
        f"data.train={tmp_path}/rows.jsonl is a named pipe (FIFO)",
        f"evaluation.general_text.source={tmp_path}/zeros.csv is a link to /dev/zero, a device",
        f"data.template={tmp_path}/rows.jsonl is a named pipe (FIFO)",
    ]
    problems = path_problems(settings.data, settings.evaluation.general_text, {})
    assert [problem.partition(", not a regular file")[0] for problem in problems] == words
    with pytest.raises(DataError, match="is a named pipe"):
        read_source(DataSource(path=f"{tmp_path}/rows.jsonl"), "train", DropCounts())


def test_a_hub_id_is_org_and_name_that_is_nothing_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path in an existing folder, a file name and a URL are no hub ids."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert is_hub_id("mlabonne/FineTome-100k")
    assert not any(
        map(is_hub_id, ["data/gone", "org/rows.jsonl", "s3://a/b", "rows", "/a/b", "./a/b"])
    )


def test_sources_are_described_in_one_line() -> None:
    """Path, configuration, split, revision and weight, as far as they are given."""
    data = make_data(
        train=[
            {"path": "a.jsonl", "weight": 3},
            {"path": "o/n", "name": "main", "split": "train", "revision": "a" * 40, "weight": 0.5},
        ]
    )
    assert describe_sources(data) == "a.jsonl × 3 + o/n [main, train, @aaaaaaaaaaaa] × 0.5"
    assert describe_sources(make_data(train="a.jsonl")) == "a.jsonl"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "DatasetNotFoundError: Dataset 'o/n' is a gated dataset on the Hub.",
            r"Accept the terms at https://huggingface\.co/datasets/o/n, then run `hf auth login`",
        ),
        (
            "DatasetNotFoundError: Revision 'x' doesn't exist for dataset 'o/n' on the Hub.",
            r"no revision 'x'\. See .*/o/n/commits/main",
        ),
        (
            "DatasetNotFoundError: Dataset 'o/n' doesn't exist on the Hub",
            "not a local path, and not a public data set on the hub",
        ),
        (
            "ConnectionError: Couldn't reach 'o/n' on the Hub",
            r"fill the cache with `sweeper prefetch data\.train=o/n`, or use a local file",
        ),
        (
            "ValueError: Unknown split \"train\". Should be one of ['test', 'dev'].",
            r"Should be one of \['test', 'dev'\]\. \(keys of a source: name, split, rev",
        ),
        (
            "ValueError: Config name is missing.\nPlease pick one among ['main']",
            r"Please pick one among \['main'\]",
        ),
    ],
)
def test_hub_errors_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: str, message: str
) -> None:
    """What datasets raises comes as one line with the page to visit or the key to set."""
    import datasets

    kind, words = error.split(": ", 1)
    known = {"DatasetNotFoundError": datasets.exceptions.DatasetNotFoundError}
    known |= {"ConnectionError": ConnectionError, "ValueError": ValueError}

    def refuse(*_: object, **__: object) -> None:
        raise known[kind](words)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=message) as caught:
        read_source(DataSource(path="o/n", revision="x"), "train", DropCounts())
    assert "\n" not in str(caught.value)


def test_another_revision_in_the_cache_is_not_taken_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Offline, datasets loads its newest cached version; a pinned commit must be that one."""
    import datasets

    class Cached(list[Any]):
        cache_files = ({"filename": f"/cache/o___n/default/0.0.0/{'a' * 40}/n-train.arrow"},)

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Cached(pairs([1])))
    [row] = read_source(DataSource(path="o/n", revision="a" * 40), "train", DropCounts())
    assert row.where == "o/n[train]:1"
    with pytest.raises(DataError, match=f"the cache holds revision {'a' * 40}, not {'b' * 40}"):
        read_source(DataSource(path="o/n", revision="b" * 40), "train", DropCounts())


def test_embedded_stands_alone(tmp_path: Path) -> None:
    """The embedded pairs bring their own splits and cannot be mixed."""
    path = write_rows(tmp_path / "rows.jsonl", pairs(range(9)))
    with pytest.raises(DataError, match="embedded cannot be combined with other sources"):
        load_splits(make_data(train=[path, "embedded"]))
    with pytest.raises(DataError, match=r"data\.test needs data\.train=FILE"):
        load_splits(make_data(test=path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.train=[{path: a, weigth: 2}]",
            r"weigth=2: no such key\. Did you mean data\.train\.0\.weight\? Valid keys: .*weight",
        ),
        (
            "data.train=[{path: a, weight: 0}]",
            r"data\.train\.0\.weight=0: input should be greater than 0",
        ),
        ("data.train=[]", r"data\.train=\[\]: list should have at least 1 item"),
        (
            "data.train=[{path: a, weight: 2}, b]",
            r"only a has a weight. Weigh every source or none",
        ),
        ("data.validation={path: a, weight: 2}", r"weights are for train"),
        (
            "data.cleaning.completion_pattern='['",
            r"completion_pattern='\[' is no regular expression",
        ),
    ],
)
def test_wrong_sources_are_named_by_key(override: str, message: str) -> None:
    """A wrong key of a source is an error of the configuration, with the valid ones."""
    from tests.conftest import make_settings

    with pytest.raises(ConfigError, match=message):
        make_settings(override)


def test_a_missing_data_file_is_found_before_any_model_loads() -> None:
    """The plan of a study and of a trial names the key and the path."""
    from sweeper.search.study_plan import single, studies

    for plan, first in ((single, []), (studies, ["+experiment=lr_rank_sweep"])):
        with pytest.raises(ConfigError, match=r"data\.train=gone\.jsonl: no such file"):
            plan([*first, "data.train=gone.jsonl"])
