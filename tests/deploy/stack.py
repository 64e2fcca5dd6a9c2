"""PostgreSQL and the MLflow server as deploy/servers.sh starts them, in a folder of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "canary5f1e7c0de"
NEEDS_POSTGRES = pytest.mark.skipif(
    shutil.which("initdb") is None and not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
    reason="PostgreSQL is not installed",
)
STORAGE = "hydra.sweeper.storage=${oc.env:SWEEPER_STORAGE}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass(frozen=True)
class Stack:
    """Servers that deploy/servers.sh started, and how to reach them."""

    folder: Path
    postgres: int
    mlflow: int

    @property
    def uri(self) -> str:
        """The MLflow server."""
        return f"http://127.0.0.1:{self.mlflow}"

    @property
    def storage(self) -> str:
        """Optuna's database."""
        return f"postgresql+psycopg://sweeper:{PASSWORD}@127.0.0.1:{self.postgres}/optuna"

    def script(self, verb: str) -> None:
        """Run deploy/servers.sh to its end."""
        assert self.begin(verb).wait(300) == 0, (self.folder / "script.log").read_text()

    def begin(self, verb: str) -> subprocess.Popen[bytes]:
        """Run deploy/servers.sh."""
        return subprocess.Popen(
            [str(ROOT / "deploy" / "servers.sh"), verb],
            cwd=self.folder,
            env={**os.environ, "PYTHON": sys.executable},
            stdout=(self.folder / "script.log").open("a"),
            stderr=subprocess.STDOUT,
        )

    def crash_postgres(self) -> None:
        """End it at once, as a crash would; `script("start")` brings it back."""
        pid_file = self.folder / "servers" / "postgres" / "postmaster.pid"
        postmaster = psutil.Process(int(pid_file.read_text().split()[0]))
        postmaster.send_signal(signal.SIGQUIT)
        postmaster.wait(60)

    @contextmanager
    def frozen_mlflow(self) -> Iterator[None]:
        """A server that takes connections and never answers."""
        server = psutil.Process(int((self.folder / "servers" / "mlflow.pid").read_text()))
        family = [server, *server.children(recursive=True)]
        for process in family:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in family:
                process.send_signal(signal.SIGCONT)

    def check_recorded(self, name: str, storage: str, n_trials: int) -> None:
        """Optuna has n_trials, each finished once; MLflow a finished run for each, with all points."""
        import optuna
        from mlflow import MlflowClient

        trials = optuna.load_study(study_name=f"{name}/lora", storage=storage).trials
        assert [trial.number for trial in trials] == list(range(n_trials))
        assert {trial.user_attrs["cause"] for trial in trials} == {"finished"}
        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("lr_rank_sweep")
        runs = client.search_runs([experiment.experiment_id], f"tags.`sweeper.study` = '{name}'")
        children = {r.info.run_name: r for r in runs if "mlflow.parentRunId" in r.data.tags}
        assert sorted(children) == [f"lora/{number:04d}" for number in range(n_trials)]
        assert len(runs) == n_trials + 1
        assert {run.info.status for run in runs} == {"FINISHED"}
        for run in children.values():
            points = client.get_metric_history(run.info.run_id, "eval/loss")
            assert [point.step for point in points] == [4, 8, 12, 16, 20]
            names = {item.path for item in client.list_artifacts(run.info.run_id)}
            assert {"config.yaml", "outcome.json"} <= names

    def sweep(self, folder: Path, *overrides: str) -> subprocess.Popen[str]:
        """A study with two fake workers on these servers."""
        environment = {
            **os.environ,
            "SWEEPER_STORAGE": self.storage,
            "MLFLOW_TRACKING_URI": self.uri,
        }
        environment |= {"HF_TOKEN": f"hf_{PASSWORD}", "MLFLOW_TRACKING_PASSWORD": f"m{PASSWORD}"}
        arguments = ["+experiment=lr_rank_sweep", "workers=fake", "pruner=none", "finalists=none"]
        arguments.append(STORAGE)
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "sweeper", *arguments, "hydra.sweeper.n_jobs=2"),
                *("~hydra.sweeper.arms.full", *overrides, "-m"),
            ],
            *(-1, None, None, subprocess.PIPE, subprocess.STDOUT),
            cwd=folder,
            env=environment,
            text=True,
        )


@contextmanager
def running_stack() -> Iterator[Stack]:
    """Started as the documentation says, in a folder that the user postgres may enter."""
    folder = Path(tempfile.mkdtemp(prefix="sweeper-servers-"))
    folder.chmod(0o755)
    stack = Stack(folder, _free_port(), _free_port())
    (folder / ".env").write_text(
        f"POSTGRES_PASSWORD={PASSWORD}\nPOSTGRES_PORT={stack.postgres}\n"
        f"MLFLOW_PORT={stack.mlflow}\nSERVERS_DIR={folder / 'servers'}\n"
    )
    try:
        stack.script("start")
        yield stack
    finally:
        stack.script("stop")
        shutil.rmtree(folder, ignore_errors=True)
