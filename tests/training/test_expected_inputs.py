"""A worker loads what the study has probed, or refuses the work: data, template, tokenizer and base."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import InputsChanged
from sweeper.core.input_digests import InputDigests
from sweeper.core.outcome import Outcome
from sweeper.core.paths import TrialFolder
from sweeper.modeling.model_source import config_digest, weights_digest
from sweeper.training import trial_runner as runner_module
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.recorder import Recorder

TEMPLATE = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
SHORT = "{% for turn in messages %}{{ turn.content }}\n{% endfor %}"
Change = Callable[[Path], None]


def _copied(tiny_base: Path, rows_file: Path, folder: Path) -> Path:
    shutil.copytree(tiny_base, folder / "base")
    shutil.copy(rows_file, folder / "rows.jsonl")
    (folder / "template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def files(tiny_base: Path, rows_file: Path, tmp_path: Path) -> Path:
    """A folder with a base model, rows and a template that a test may change."""
    return _copied(tiny_base, rows_file, tmp_path)


@pytest.fixture(scope="module")
def expected(
    tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> InputDigests:
    """The digests of `files`, which lie elsewhere: no digest depends on a path."""
    return _found(_settings(_copied(tiny_base, rows_file, tmp_path_factory.mktemp("probed"))))


def _settings(files: Path, *overrides: str) -> TrialSettings:
    return make_settings(
        *(f"model.base_model={files / 'base'}", f"data.train={files / 'rows.jsonl'}"),
        *(f"data.template={files / 'template.jinja'}", "quantization=none", "data.test_ratio=0.2"),
        *("training.max_steps=2", "training.eval_steps=2", "training.logging_steps=1"),
        *overrides,
    ).trial


def _new_worker() -> TransformersRunner:
    return TransformersRunner(threads=1)


def _found(settings: TrialSettings) -> InputDigests:
    return _new_worker().probe(settings).inputs


def _run(
    runner: TransformersRunner, files: Path, settings: TrialSettings, *expected: Any
) -> Outcome:
    return runner.run(settings, TrialFolder(files / "trial"), {}, Recorder(), *expected)


def _drop_a_row(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def _shorten(path: Path) -> None:
    path.write_text(SHORT)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _remove(path: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path)


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _other_weights(path: Path) -> None:
    """Other weights in a file of the same size and time, as `rsync -t` and `cp -p` leave one."""
    stat = path.stat()
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, path, metadata={"format": "pt"})
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _set(name: str, value: Any) -> Change:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


def _forget_a_merge(path: Path) -> None:
    """Another tokenizer with the same vocabulary: fewer pairs of pieces are joined."""
    rules = json.loads(path.read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:200]
    path.write_text(json.dumps(rules))


WEIGHTS, CONFIG = "base/model.safetensors", "base/config.json"
TOKENIZER = "base/tokenizer.json"
CHANGES = [
    pytest.param("rows.jsonl", _drop_a_row, "data digest", id="rows"),
    pytest.param("rows.jsonl", _remove, "data digest", id="rows removed"),
    pytest.param("rows.jsonl", _empty, "data digest", id="rows emptied"),
    pytest.param(
        "rows.jsonl", _make_folder, "data digest", id="rows a folder", marks=pytest.mark.slow
    ),
    pytest.param("template.jinja", _shorten, "judged rows digest", id="template"),
    pytest.param(
        "template.jinja",
        _remove,
        "judged rows digest",
        id="template removed",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "template.jinja",
        _make_folder,
        "judged rows digest",
        id="template a folder",
        marks=pytest.mark.slow,
    ),
    pytest.param(TOKENIZER, _forget_a_merge, "judged rows digest", id="tokenizer"),
    pytest.param(TOKENIZER, _empty, "base model digest", id="tokenizer emptied"),
    pytest.param(CONFIG, _set("rms_norm_eps", 0.1), "base configuration digest", id="config"),
    pytest.param(CONFIG, _remove, "base model digest", id="config removed"),
    pytest.param(CONFIG, _empty, "base model digest", id="config emptied", marks=pytest.mark.slow),
    pytest.param(WEIGHTS, _other_weights, "base model digest", id="weights"),
    pytest.param(WEIGHTS, _empty, "base model digest", id="weights emptied"),
    pytest.param(
        WEIGHTS, _make_folder, "base model digest", id="weights a folder", marks=pytest.mark.slow
    ),
    pytest.param("base", _remove, "base model digest", id="base removed"),
]


@pytest.mark.parametrize(("name", "change", "words"), CHANGES)
def test_a_new_worker_refuses_changed_files(
    files: Path, expected: InputDigests, name: str, change: Change, words: str
) -> None:
    """It names the digests and the setting, and leaves an earlier attempt's files alone."""
    settings = _settings(files)
    kept = files / "trial" / "outcome.json"
    kept.parent.mkdir()
    kept.write_text("kept")
    change(files / name)
    with pytest.raises(InputsChanged) as refused:
        _run(_new_worker(), files, settings, expected)
    assert f"{words}: " in str(refused.value)
    setting = {"rows": "data.train", "temp": "data.template", "base": "model.base_model"}[name[:4]]
    assert f"{setting}={files}" in str(refused.value)
    assert [path.name for path in kept.parent.iterdir() if path.suffix == ".json"] == [kept.name]
    assert kept.read_text() == "kept"


@pytest.mark.parametrize("name", ["_name_or_path", "transformers_version", "torch_dtype", "dtype"])
def test_a_copy_of_a_base_is_the_same_base(files: Path, name: str) -> None:
    """Keys that transformers writes into every copy of a model are no difference."""
    before = config_digest(files / "base")
    _set(name, "float32" if "dtype" in name else "x")(files / CONFIG)
    assert config_digest(files / "base") == before
    _set("text_config", {name: "x"})(files / CONFIG)
    within = config_digest(files / "base")
    _set("text_config", {})(files / CONFIG)
    assert config_digest(files / "base") == within != before


def test_an_outcome_tells_what_was_read(files: Path, expected: InputDigests) -> None:
    """Every digest of the probe is found again by the trial, and a judgement compares them too."""
    settings = _settings(files)
    runner = _new_worker()
    outcome = _run(runner, files, settings, expected)
    assert outcome.inputs == expected.model_copy(update={"general": None})
    assert None not in (expected.judged, expected.trained, expected.test, expected.config)
    folder = TrialFolder(files / "trial")
    assert runner.test(settings, folder, ["test"], expected).test is not None
    other = expected.model_copy(update={"test": "0" * 64})
    with pytest.raises(InputsChanged, match="test rows digest: 0000"):
        runner.test(settings, folder, ["test"], other)


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (("evaluation.look_rows=3",), {"judged"}),
        (("evaluation.per_device_eval_batch_size=2", "training.learning_rate=0.01"), set()),
        pytest.param(
            ("data.max_length=32", "data.over_length=truncate"),
            {"trained"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("data.train_on=everything",), {"judged", "trained", "test"}, marks=pytest.mark.slow
        ),
        pytest.param(("data.packing=true",), {"trained"}, marks=pytest.mark.slow),
        pytest.param(
            ("data.split_seed=5",), {"data", "judged", "trained", "test"}, marks=pytest.mark.slow
        ),
        pytest.param(
            ("evaluation.generation.num_examples=2", "evaluation.generation.max_new_tokens=2"),
            {"judged"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_each_digest_is_of_what_it_names(
    files: Path, expected: InputDigests, overrides: tuple[str, ...], changed: set[str]
) -> None:
    """A setting changes the digests of what it decides, and no others."""
    assert set(expected.differences(_found(_settings(files, *overrides)))) == changed


@pytest.mark.slow
def test_a_changed_metric_is_judged_otherwise(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source of a user's metric is part of the digest of what is judged."""
    monkeypatch.syspath_prepend(files)
    module = files / "own_metric_of_the_test.py"
    module.write_text("def score(prompts, predictions, references): return 1.0")
    settings = _settings(
        files,
        *("evaluation.generation.num_examples=2", "evaluation.generation.max_new_tokens=2"),
        "evaluation.metric_modules=[own_metric_of_the_test]",
        "++evaluation.metrics.own=own_metric_of_the_test:score",
    )
    before = _found(settings)
    module.write_text("def score(prompts, predictions, references): return 0.5")
    assert set(before.differences(_found(settings))) == {"judged"}


def test_equal_weights_with_another_tokenizer_are_judged_on_their_own_tokens(files: Path) -> None:
    """One worker judges two bases of equal weights as two workers do."""
    other = files / "other"
    other.mkdir()
    shutil.copytree(files / "base", other / "base")
    _forget_a_merge(other / TOKENIZER)
    for name in ("rows.jsonl", "template.jinja"):
        shutil.copy(files / name, other / name)
    runner = _new_worker()
    first, second = runner.probe(_settings(files)), runner.probe(_settings(other))
    assert first.base_digest == second.base_digest
    assert {"judged", "trained", "test"} <= set(first.inputs.differences(second.inputs))
    alone = _new_worker().probe(_settings(other))
    assert second.base_metrics == alone.base_metrics
    assert second.base_metrics["eval/loss"] != first.base_metrics["eval/loss"]


@pytest.mark.slow
def test_a_chat_template_decides_the_tokens(files: Path) -> None:
    """It lies beside equal weights, and is part of what is judged, like a template of one's own."""
    settings = _settings(files, "data.template=chat")
    tokenizer = AutoTokenizer.from_pretrained(files / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(files / "base")
    expected = _found(settings)
    tokenizer.chat_template = SHORT
    tokenizer.save_pretrained(files / "base")
    with pytest.raises(InputsChanged, match="judged rows digest"):
        _run(_new_worker(), files, settings, expected)


def test_a_replaced_file_of_equal_size_and_time_is_hashed_again(files: Path) -> None:
    """The cached digest belongs to the file on the disk, not to its size and time."""
    before = weights_digest(files / "base")
    _other_weights(files / WEIGHTS)
    assert weights_digest(files / "base") != before


def test_a_check_does_not_blame_the_trial_for_a_removed_base(
    files: Path, expected: InputDigests
) -> None:
    """A refusal would teach the sampler that the point is impossible."""
    settings, runner = _settings(files), _new_worker()
    assert runner.check(settings, expected).total > 0
    _set("hidden_act", "gelu")(files / CONFIG)
    with pytest.raises(InputsChanged, match="base configuration digest"):
        _new_worker().check(settings, expected)
    shutil.rmtree(files / "base")
    with pytest.raises(InputsChanged, match="unreadable now"):
        _new_worker().check(settings, expected)
    assert runner.check(settings).total > 0  # as known as before, and nothing is expected


def test_a_reload_within_a_trial_is_compared(
    files: Path, expected: InputDigests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full fine-tuning loads the base again after out of memory, from files that have changed."""
    settings = _settings(files, "adapter=none")

    def exhausted(*words: Any) -> NoReturn:
        _other_weights(files / WEIGHTS)
        raise MemoryError

    monkeypatch.setattr(runner_module, "train_trial", exhausted)
    with pytest.raises(InputsChanged, match="base model digest"):
        _run(_new_worker(), files, settings, expected)


def test_a_merge_reads_the_base_that_was_trained_on(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are read after the training, whether or not a study expects a digest."""
    settings = _settings(files, "artifacts.merged=true")
    train = runner_module.train_trial

    def replacing(*words: Any) -> Any:
        _other_weights(files / WEIGHTS)
        return train(*words)

    monkeypatch.setattr(runner_module, "train_trial", replacing)
    with pytest.raises(InputsChanged, match="base model digest"):
        _run(_new_worker(), files, settings)
    assert not (files / "trial" / "outcome.json").exists()


def test_a_probe_after_a_job_expects_nothing(files: Path, expected: InputDigests) -> None:
    """The next arm may have other data, and a warm worker probes it."""
    runner = _new_worker()
    _run(runner, files, _settings(files), expected)
    assert runner.probe(_settings(files, "data.split_seed=3")).data_digest != expected.data


def test_the_files_are_read_again_when_they_are_back(files: Path, expected: InputDigests) -> None:
    """A worker that refused changed rows trains on the earlier ones."""
    settings = _settings(files)
    rows = files / "rows.jsonl"
    before = rows.read_text()
    _drop_a_row(rows)
    runner = _new_worker()
    with pytest.raises(InputsChanged):
        _run(runner, files, settings, expected)
    rows.write_text(before)
    assert _run(runner, files, settings, expected).cause == "finished"
