"""The Ray engine beyond the contract: shares, folders that nodes do not see, nodes that die."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

pytest.importorskip("sweeper.workers.ray_engine", reason="Ray is optional")

from sweeper.config.settings import FakeTrainer
from sweeper.core.errors import WorkerError
from sweeper.core.outcome import Outcome
from sweeper.workers.protocol import (
    EndedEvent,
    EvaluatedEvent,
    LostEvent,
    SlotsEvent,
    SubmitCommand,
)
from sweeper.workers.ray_engine import (
    ActorMailbox,
    ClusterShare,
    FolderMark,
    RayEngine,
    connect,
    pack,
    share_of,
    unpack,
)
from tests.conftest import make_settings
from tests.workers.conftest import SMALL, make_workers
from tests.workers.test_engines import submit_trial, until


def _node(cpus: int, gpus: int = 0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": float(cpus), **({"GPU": gpus} if gpus else {})}}


@pytest.mark.parametrize(
    ("nodes", "n_jobs", "devices", "share"),
    [
        ([_node(8)], 1, 1, ClusterShare(8, 0, 8)),
        ([_node(8)], 3, 1, ClusterShare(2, 0, 2)),
        ([_node(8)], 2, 2, ClusterShare(4, 0, 2)),
        ([_node(8), _node(8)], 2, 1, ClusterShare(8, 0, 8)),
        ([_node(8), _node(8)], 3, 1, ClusterShare(4, 0, 4)),  # 5 each would fit twice only
        ([_node(8), _node(64, alive=False)], 1, 1, ClusterShare(8, 0, 8)),
        ([_node(2), _node(32, gpus=4)], 4, 1, ClusterShare(1, 1, 8)),
        ([_node(32, gpus=4)], 2, 2, ClusterShare(1, 2, 8)),
    ],
)
def test_workers_share_out_what_there_is(
    nodes: list[dict[str, Any]], n_jobs: int, devices: int, share: ClusterShare
) -> None:
    """GPUs of one node each where there are any; else the most CPUs that fit n_jobs times into whole
    nodes."""
    assert share_of(nodes, n_jobs, devices) == share


@pytest.mark.parametrize(
    ("nodes", "devices", "words"),
    [
        (
            [_node(2), _node(1)],
            1,
            "room for 3 of 4 workers of 1 CPUs on one node each, 3 CPUs in all",
        ),
        (
            [_node(64, gpus=2)],
            1,
            "room for 2 of 4 workers of 1 GPUs on one node each, 2 GPUs in all",
        ),
        ([_node(64, gpus=3)] * 3, 2, "room for 3 of 4 workers of 2 GPUs on one node each, 9 GPUs"),
    ],
)
def test_a_cluster_without_room_is_an_error(
    nodes: list[dict[str, Any]], devices: int, words: str
) -> None:
    """More workers than devices: said at once, instead of waiting for a place for ever."""
    with pytest.raises(WorkerError, match=words):
        share_of(nodes, 4, devices)


def test_a_folder_travels_whole_but_for_its_checkpoints(tmp_path: Path) -> None:
    """What was packed is there byte for byte; an earlier attempt's adapter is replaced, not mixed."""
    there, here = tmp_path / "there", tmp_path / "here"
    for name in ("config.yaml", "outcome.json", "adapter/a.safetensors", "checkpoints/c/state.pt"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(os.urandom(100))
    (here / "adapter").mkdir(parents=True)
    (here / "adapter" / "of_an_earlier_attempt").write_text("old")
    unpack(here, pack(there))
    found = {p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()}
    assert found == {"config.yaml", "outcome.json", "adapter/a.safetensors"}
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in found)


def test_a_path_that_leads_out_is_refused(tmp_path: Path) -> None:
    """A node cannot write beside the trial's folder."""
    with pytest.raises(AssertionError, match="leads out"):
        unpack(tmp_path / "trial", {"../../evil": b""})
    assert not (tmp_path.parent / "evil").exists()


def test_outcomes_land_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds outcome.json finds everything else."""
    order: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (order.append(a.name), replace(a, b))[1])
    unpack(tmp_path / "trial", {"outcome.json": b"1", "provenance.json": b"2", "adapter/x": b"3"})
    assert order[-1] == "outcome.json"
    assert len(order) == 3


def test_a_mailbox_sends_the_spool_with_evaluations_and_all_at_the_end(tmp_path: Path) -> None:
    """A trial that trains out of sight: metrics on the way, the folder at the end, nothing left."""
    box = ActorMailbox(tmp_path)
    submit = SubmitCommand(
        job="lora/0003",
        attempt=1,
        folder=Path("/not/here/lora/trial_0003"),
        settings=make_settings().trial,
        provenance={},
    )
    box.order(submit.model_dump_json())
    command = box.receive()
    assert isinstance(command, SubmitCommand)
    assert command.folder == tmp_path / "lora" / "trial_0003"
    command.folder.mkdir(parents=True)
    (command.folder / "metrics.jsonl").write_text("{}\n")
    (command.folder / "outcome.json").write_text("{}")
    box.send(EvaluatedEvent(job="lora/0003", attempt=1, step=1, total_steps=2, value=1.0))
    box.send(EndedEvent(job="lora/0003", attempt=1, outcome=Outcome(cause="finished")))
    box.end()
    parcels, ended = box.take(wait_s=0)
    assert [sorted(files) for _, files in parcels] == [
        ["metrics.jsonl"],
        ["metrics.jsonl", "outcome.json"],
    ]
    assert ended
    assert not command.folder.exists()


def test_ray_without_authentication_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_AUTH_MODE=disabled is refused for a Ray that sweeper starts."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(WorkerError, match="anyone who reaches this machine's ports"):
        connect(None, 1)


def test_no_cluster_is_an_error_of_one_line() -> None:
    """An address where nothing listens: no stack trace, and what was looked for."""
    with pytest.raises(WorkerError, match=r"no Ray at workers\.address=127\.0\.0\.1:9") as caught:
        connect("127.0.0.1:9", 1)
    assert "\n" not in str(caught.value)


class FarEngine(RayEngine):
    """An engine whose actors do not see the study's folder."""

    def _leave_mark(self) -> FolderMark:
        return FolderMark(Path("/nowhere/at/all"), "unseen")


@pytest.mark.slow
def test_results_come_back_from_nodes_that_do_not_see_the_folder(
    tmp_path: Path, ray_cluster: Any
) -> None:
    """The outcome, the spool and the provenance lie in the driver's folder when Ended arrives."""
    fake = FakeTrainer(
        step_seconds=0.001,
        steps=10,
        plan={},
        finalists={},
        requests={},
        free_mib=None,
        room_mib=None,
    )
    engine = FarEngine(
        make_workers("ray", fake, ray_cluster.address), 1, 1, lambda worker: tmp_path / "log"
    )
    try:
        submit = submit_trial(engine, tmp_path)
        until(engine, EvaluatedEvent)
        assert (submit.folder / "metrics.jsonl").stat().st_size > 0
        assert not (submit.folder / "outcome.json").exists()
        until(engine, EndedEvent)
        names = {path.name for path in submit.folder.iterdir()}
        assert names == {"config.yaml", "metrics.jsonl", "outcome.json", "provenance.json"}
    finally:
        engine.close()


@pytest.mark.slow
def test_a_lost_node_is_announced_and_its_worker_replaced_where_there_is_room(
    tmp_path: Path, ray_cluster: Any
) -> None:
    """Two nodes, one worker each; one node dies: Lost names the trial; a new node gets a new worker."""
    node = ray_cluster.add_node(num_cpus=1, **SMALL)
    fake = FakeTrainer(
        step_seconds=0.05,
        steps=10_000,
        plan={},
        finalists={},
        requests={},
        free_mib=None,
        room_mib=None,
    )
    workers = make_workers("ray", fake, ray_cluster.address)
    engine = RayEngine(workers, 2, 1, lambda worker: tmp_path / f"{worker}.log")
    try:
        submits = {number: submit_trial(engine, tmp_path, number) for number in (0, 1)}
        ray_cluster.remove_node(node, allow_graceful=False)
        _, lost = until(engine, LostEvent, timeout_s=120)
        assert isinstance(lost, LostEvent)
        assert lost.job in {submit.job for submit in submits.values()}
        assert lost.cause == "crash"
        node = ray_cluster.add_node(num_cpus=1, **SMALL)
        _, slots = until(engine, SlotsEvent, timeout_s=120)
        assert isinstance(slots, SlotsEvent)
        assert slots.worker == lost.worker
    finally:
        engine.close()
        ray_cluster.remove_node(node, allow_graceful=False)


@pytest.mark.slow
def test_a_sweep_survives_a_node_killed_in_its_middle(tmp_path: Path, ray_cluster: Any) -> None:
    """Ten trials on two nodes, one killed: exit 0, every number once, one of them in two attempts."""
    node = ray_cluster.add_node(num_cpus=1, **SMALL)
    arguments = [
        *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=ray", "tracking=none"),
        *(f"workers.address={ray_cluster.address}", "workers.fake.step_seconds=0.1"),
        *("hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=10", "pruner=none"),
        *("~hydra.sweeper.arms.full", "-m"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeper", *arguments],
        *(-1, None, None, subprocess.PIPE, subprocess.STDOUT),
        cwd=tmp_path,
        text=True,
    )
    study = tmp_path / "outputs" / "lr_rank_sweep"
    try:
        while not (study / "lora" / "trial_0004" / "metrics.jsonl").exists():
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.1)
    finally:
        ray_cluster.remove_node(node, allow_graceful=False)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    storage = f"sqlite:///{study / 'study.db'}"
    trials = optuna.load_study(study_name="lr_rank_sweep/lora", storage=storage).trials
    assert [trial.number for trial in trials] == list(range(10))
    assert {trial.user_attrs["cause"] for trial in trials} == {"finished"}
    assert max(trial.user_attrs["attempt"] for trial in trials) == 2
    outcomes = sorted(study.glob("lora/trial_*/outcome.json"))
    assert len(outcomes) == 10


@pytest.mark.slow
def test_the_session_of_a_ray_started_here_is_private_and_is_not_left_behind(
    tmp_path: Path,
) -> None:
    """No other user reaches its files; after kill -9 the next start removes them, and only them."""
    program = (
        "import time\nfrom sweeper.workers import ray_engine\nray_engine.connect(None, 1)\n"
        "print(*ray_engine._PRIVATE, flush=True)\ntime.sleep(600)"
    )

    def session() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    first, killed = session()
    assert killed.name.startswith("ray-")
    assert killed.stat().st_mode & 0o077 == 0
    assert any(killed.glob("s/session_*"))
    first.kill()
    first.wait()
    second, own = session()
    third, other = session()
    try:
        assert not killed.exists()
        assert own.exists(), "a session of a process that lives is left alone"
    finally:
        for process in (second, third):
            process.terminate()
            process.wait(60)
    for folder in (own, other):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_ray_started_here_runs_a_sweep_and_is_gone_afterwards(tmp_path: Path) -> None:
    """workers=ray without an address: exit 0, and no process of Ray is left."""
    import psutil

    before = {process.pid for process in psutil.process_iter()}
    result = subprocess.run(
        [
            *(sys.executable, "-m", "sweeper", "+experiment=lr_rank_sweep", "workers=fake"),
            *("workers.engine=ray", "tracking=none", "hydra.sweeper.n_trials=3"),
            *("~hydra.sweeper.arms.full", "-m"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Token authentication" not in result.stdout + result.stderr
    time.sleep(3)
    left = [p.info["name"] or "" for p in psutil.process_iter(["name"]) if p.pid not in before]
    assert not [name for name in left if "raylet" in name or "gcs_server" in name]
