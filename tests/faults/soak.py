"""The chaos soak: a study of hundreds of trials while workers, driver and servers are killed at random.

    python tests/faults/soak.py --minutes 30 --trials 500 --kills 200        (or: make soak)

The real program with the fake trainer and two workers on a real PostgreSQL and a real MLflow server
(deploy/servers.sh). Every kill is SIGKILL. A killed driver is started again by the same command, a
killed server comes back after up to 20 seconds. Now and then a worker is frozen for good, the data file
is replaced until a worker refuses it, or the same name is started on another storage for a moment. Or
the driver is started again with full output or damaged files, or hundreds of commands arrive.
When all faults are done the study is left alone, and then every promise is checked; exit code 0 if all
are kept. soak.json tells what was done and found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from sweeper.core.paths import StudyFolder
from sweeper.driver.command_files import ResumeStudy, send

ROOT = Path(__file__).resolve().parents[2]
STUDY = "soak"
PASSWORD = "soak3c1d9e"
VICTIMS = {
    **{"worker": 0.40, "driver": 0.18, "postgres": 0.09, "mlflow": 0.09},
    **{"frozen worker": 0.05, "data file": 0.04, "other storage": 0.03},
    **{"full output": 0.04, "damaged files": 0.05, "slow inbox": 0.03},
}
"""Which share of the faults meets whom."""
REFUSED = "found other data or another base model"
"""What the driver says where a worker refuses another data file."""
ROWS, OTHER_ROWS = ("".join(f'{{"text": "{word} {n}"}}\n' for n in range(9)) for word in "ab")
DAMAGED = (
    *("results.json", "report.md", "standing.json", "driver.pid", "identity.json"),
    *(".tracking/store.json", ".tracking/study.json", "lora/*/provenance.json"),
)
"""Files of a study, as patterns, that it can do without."""
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "zeros": lambda content: bytes(len(content)),
    "half": lambda content: content[: len(content) // 2],
    "noise": lambda _: bytes(range(256)),
    "other": lambda _: b"[]",
}
TORN_LINES = b'{"step": 3, "ti\n' + bytes(40) + b'\n{"step": '
"""What a power cut may leave at the end of metrics.jsonl."""
COMMANDS = 300
"""Commands that arrive at once, one of three of them no command."""
LIMITS = ("workers.stall_timeout_s=15", "workers.probe_timeout_s=30")
AWAY_SECONDS = 20.0
"""The longest time a killed server stays away before it is started again."""
EXTENSION = 50
"""Further trials where the study ends before the kills do."""
END_SECONDS = 900.0
"""How long the study may take to come to its end once nobody disturbs it."""
TERMINAL = {"FINISHED", "FAILED", "KILLED"}
EXCUSED = ("hydra.sweeper.storage cannot be opened", "dies before it can start")
"""With these words a driver may end: PostgreSQL was away when it started, or its workers were killed
three times in a row before they could do anything. The same command goes on; how often is counted."""


@dataclass
class Servers:
    """PostgreSQL and MLflow in a folder; each can be killed and comes back by deploy/servers.sh."""

    folder: Path
    ports: dict[str, int] = field(default_factory=lambda: {"postgres": _port(), "mlflow": _port()})
    _start: subprocess.Popen[bytes] | None = None
    _due: float | None = None

    def __post_init__(self) -> None:
        self.folder.chmod(0o755)  # the user postgres enters it
        (self.folder / ".env").write_text(
            f"POSTGRES_PASSWORD={PASSWORD}\nPOSTGRES_PORT={self.ports['postgres']}\n"
            f"MLFLOW_PORT={self.ports['mlflow']}\nSERVERS_DIR={self.folder / 'servers'}\n"
        )

    @property
    def environment(self) -> dict[str, str]:
        """Where a sweep finds them; a password is never an argument."""
        address = f"127.0.0.1:{self.ports['postgres']}/optuna"
        return {
            "SWEEPER_STORAGE": f"postgresql+psycopg://sweeper:{PASSWORD}@{address}",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.ports['mlflow']}",
        }

    @property
    def whole(self) -> bool:
        """Whether both are up and nothing is on its way."""
        return self._start is None and self._due is None

    def run(self, verb: str) -> subprocess.Popen[bytes]:
        """deploy/servers.sh."""
        log = (self.folder / "servers.log").open("ab")
        return subprocess.Popen(
            [str(ROOT / "deploy" / "servers.sh"), verb],
            cwd=self.folder,
            env={**os.environ, "PYTHON": sys.executable},
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def kill(self, name: str, away_s: float) -> bool:
        """SIGKILL to one of them; False while one is away already."""
        if not self.whole:
            return False
        if name == "postgres":
            pid = (self.folder / "servers" / "postgres" / "postmaster.pid").read_text().split()[0]
            os.kill(int(pid), signal.SIGKILL)
        else:
            group = int((self.folder / "servers" / "mlflow.pid").read_text())
            os.killpg(group, signal.SIGKILL)
        self._due = time.monotonic() + away_s
        return True

    def mend(self) -> None:
        """Start what was killed, when its time has come; until it runs."""
        if self._due is not None and time.monotonic() >= self._due:
            self._due, self._start = None, self.run("start")
        if self._start is not None and self._start.poll() is not None:
            failed = self._start.returncode != 0  # the old processes were not quite gone
            self._start = self.run("start") if failed else None


@dataclass
class Driver:
    """The program, started again whenever it was killed."""

    folder: Path
    trials: int
    environment: Mapping[str, str]
    step_seconds: float
    runs: int = 0
    unasked: list[str] = field(default_factory=list)
    """How runs ended that nobody had killed, other than well."""
    excused: Counter[str] = field(default_factory=Counter)
    """Ends that nobody can avoid, by their words."""
    process: subprocess.Popen[bytes] | None = None
    tampered_at: float | None = None
    """When the data file was replaced; None while it is the study's own."""
    refusals: int = 0
    """How often the study stopped because of it."""

    @property
    def rows(self) -> Path:
        """The data file."""
        return self.folder / "rows.jsonl"

    @property
    def study(self) -> Path:
        """The study's folder."""
        return self.folder / "outputs" / STUDY

    def start(self, *overrides: str, output: Path | None = None) -> None:
        """The same command, every time. Its output goes to its log, or to another file."""
        self.runs += 1
        if self.runs == 1:
            self.rows.write_text(ROWS)
        log_path = self.folder / f"run_{self.runs:03d}.log"
        with log_path.open("wb") as log, (output or log_path).open("ab") as sink:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "sweeper", "+experiment=lr_rank_sweep", "workers=fake"),
                    *("finalists=none", "~hydra.sweeper.arms.full", "hydra.sweeper.n_jobs=2"),
                    *(f"hydra.sweeper.study_name={STUDY}", f"hydra.sweeper.n_trials={self.trials}"),
                    f"workers.fake.step_seconds={self.step_seconds}",
                    *("data.train=rows.jsonl", "data.format=text", *LIMITS),
                    *(overrides or ["hydra.sweeper.storage=${oc.env:SWEEPER_STORAGE}"]),
                    "-m",
                ],
                cwd=self.folder,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=log,
                start_new_session=True,
            )

    def extend(self) -> None:
        """The study came to its end too early: the same command with a larger total."""
        self.trials += EXTENSION
        self.start()

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        assert self.process is not None
        try:
            children = psutil.Process(self.process.pid).children()
            return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        except psutil.Error:
            return []

    def kill(self) -> bool:
        """SIGKILL, and the same command again."""
        assert self.process is not None
        if self.process.poll() is not None:
            return False
        self.process.kill()
        self.process.wait()
        self.start()
        return True

    def kill_worker(self, draw: random.Random, number: int = signal.SIGKILL) -> bool:
        """A signal to one of the workers, whatever it is at."""
        workers = self.workers()
        if not workers:
            return False
        try:
            draw.choice(workers).send_signal(number)
        except psutil.NoSuchProcess:
            return False
        return True

    def tamper(self, draw: random.Random) -> bool:
        """Replace the data file, and kill a worker, whose successor reads it."""
        # before its first trial a study takes any file for its own
        asked = any(self.study.glob("lora/trial_*"))
        if self.tampered_at is not None or not asked or not self.kill_worker(draw):
            return False
        self.rows.write_text(OTHER_ROWS)
        self.tampered_at = time.monotonic()
        return True

    def put_back(self) -> None:
        """Put the study's own data file back, if no worker had to read the other one."""
        if self.tampered_at is not None and time.monotonic() - self.tampered_at > AWAY_SECONDS:
            self._restore()

    def _restore(self) -> None:
        self.rows.write_text(ROWS)
        self.tampered_at = None

    def mistake(self, draw: random.Random) -> bool:
        """Start the same name on another storage for a moment, then go on."""
        assert self.process is not None
        if self.tampered_at is not None or self.process.poll() is not None:
            return False
        identity = self.study / "identity.json"
        own = identity.read_bytes() if identity.exists() else None
        if own is not None and not _is_json(own):
            return False  # damaged a moment ago, and not written again yet
        self._end()
        self.start("hydra.sweeper.storage=sqlite:///other.db", "tracking=none")
        time.sleep(draw.uniform(0, AWAY_SECONDS))
        self.process.kill()
        self.process.wait()
        self.start()
        deadline = time.monotonic() + END_SECONDS
        while own is not None and not (identity.exists() and identity.read_bytes() == own):
            assert time.monotonic() < deadline, "the study's own trials never came back"
            self.revive()
            time.sleep(0.1)
        return True

    def lose_output(self) -> bool:
        """Kill it, and start it with an output that takes nothing."""
        if not self._end():
            return False
        self.start(output=Path("/dev/full"))
        return True

    def damage(self, draw: random.Random) -> bool:
        """Kill it, and damage its files as a power cut does, then start it."""
        found = sorted(path for name in DAMAGED for path in self.study.glob(name))
        if not found or not self._end():
            return False
        for path in draw.sample(found, min(5, len(found))):
            path.write_bytes(DAMAGES[draw.choice(list(DAMAGES))](path.read_bytes()))
        for path in self.study.glob("lora/*/metrics.jsonl"):
            if not (path.parent / "outcome.json").exists():
                with path.open("ab") as file:
                    file.write(TORN_LINES)
        self.start()
        return True

    def flood(self) -> bool:
        """Send hundreds of commands, which change nothing, to its inbox, and files that are none."""
        assert self.process is not None
        if self.process.poll() is not None or not self.study.exists():
            return False
        folder = StudyFolder(self.study)
        for number in range(COMMANDS):
            send(folder, ResumeStudy())
            if number % 3 == 0:
                (folder.inbox / f"{number:020d}-{number:08x}.json").write_bytes(TORN_LINES)
        return True

    def _end(self) -> bool:
        """Kill it for another start than usual; False while that would hide another fault."""
        assert self.process is not None
        if self.tampered_at is not None or self.process.poll() is not None:
            return False
        self.process.kill()
        self.process.wait()
        return True

    def revive(self) -> bool:
        """Start it again if it ended before its time; True once it came to its end."""
        assert self.process is not None
        code = self.process.poll()
        if code in (None, 0):
            return code == 0
        text = (self.folder / f"run_{self.runs:03d}.log").read_text()
        if self.tampered_at is not None and code == 1 and _refused(text):
            self._restore()
            self.refusals += 1
            self.start()
            return False
        words = next((words for words in EXCUSED if words in text), None)
        if code == 1 and words is not None:
            self.excused[words] += 1
            self.start()
            return False
        tail = text.splitlines()[-5:]
        self.unasked.append(f"run {self.runs} ended with {code}: " + " | ".join(tail))
        self.start()
        return False


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _refused(text: str) -> bool:
    """Return True if a driver ended because it, or a worker, found other data."""
    words = " ".join(text.split())
    return REFUSED in words or (
        "was started with another question" in words and "rows digest" in words
    )


@dataclass
class Outcomes:
    """What outcome.json of every trial said when it was first seen."""

    driver: Driver
    seen: dict[str, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Note new ones; one that changes was trained again."""
        for path in self.driver.study.glob("lora/*/outcome.json"):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if self.seen.setdefault(path.parent.name, digest) != digest:
                self.changed.add(path.parent.name)


def soak(
    servers: Servers,
    driver: Driver,
    minutes: float,
    kills: int,
    draw: random.Random,
    faults: Sequence[str],
) -> tuple[Counter[str], Outcomes]:
    """Kill at random moments, then let the study come to its end."""
    done: Counter[str] = Counter()
    outcomes = Outcomes(driver)
    began = time.monotonic()
    moments = sorted(draw.uniform(0, 60 * minutes) for _ in range(kills))
    driver.start()
    strike: dict[str, Callable[[], bool]] = {
        "worker": lambda: driver.kill_worker(draw),
        "driver": driver.kill,
        "postgres": lambda: servers.kill("postgres", draw.uniform(0, AWAY_SECONDS)),
        "mlflow": lambda: servers.kill("mlflow", draw.uniform(0, AWAY_SECONDS)),
        "frozen worker": lambda: driver.kill_worker(draw, signal.SIGSTOP),
        "data file": lambda: driver.tamper(draw),
        "other storage": lambda: driver.mistake(draw),
        "full output": driver.lose_output,
        "damaged files": lambda: driver.damage(draw),
        "slow inbox": driver.flood,
    }
    victims = draw.choices(faults, [VICTIMS[name] for name in faults], k=kills)
    end = None
    while True:
        servers.mend()
        driver.put_back()
        outcomes.look()
        ended = driver.revive()
        if ended and done.total() < kills:
            driver.extend()
        elif done.total() < kills and time.monotonic() - began >= moments[done.total()]:
            victim = victims[done.total()]
            done[victim] += strike[victim]()  # not there at the moment: tried again
        if (done.total() == kills or ended) and servers.whole:
            end = end or time.monotonic() + END_SECONDS
            if ended or time.monotonic() > end:
                return done, outcomes
        time.sleep(0.05)


def broken_promises(servers: Servers, driver: Driver, outcomes: Outcomes) -> list[str]:
    """What is not as it should be."""
    assert driver.process is not None
    problems = [*driver.unasked]
    if driver.process.poll() != 0:
        problems.append(f"the last run did not end well: {driver.process.poll()}")
    problems += [f"{name}: outcome.json was written twice" for name in sorted(outcomes.changed)]
    problems += _left_by_sync(driver)
    return problems + _study_problems(servers, driver) + _tracking_problems(servers, driver)


def _left_by_sync(driver: Driver) -> list[str]:
    """`sweeper sync` finds nothing that it cannot record."""
    sync = subprocess.run(
        [sys.executable, "-m", "sweeper", "sync", STUDY],
        cwd=driver.folder,
        env={**os.environ, **driver.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return [] if sync.returncode == 0 else [f"sync: {sync.stdout} {sync.stderr}"]


def _study_problems(servers: Servers, driver: Driver) -> list[str]:
    """Optuna's storage: n_trials results, each once and as its folder says; nothing stuck."""
    import optuna

    from sweeper.search.telling import counts

    url = servers.environment["SWEEPER_STORAGE"]
    trials = optuna.load_study(study_name=f"{STUDY}/lora", storage=url).get_trials()
    stuck = [trial.number for trial in trials if not trial.state.is_finished()]
    counted = [trial for trial in trials if counts(trial)]
    problems = [f"trial {number} is left unfinished in Optuna" for number in stuck]
    if len(counted) != driver.trials:
        problems.append(f"{len(counted)} of {driver.trials} trials are counted")
    for trial in counted:
        path = driver.study / "lora" / f"trial_{trial.number:04d}" / "outcome.json"
        told = trial.user_attrs["outcome"]
        if told["cause"] in ("crash", "timeout"):
            if trial.user_attrs["attempt"] < 3:
                problems.append(f"trial {trial.number} was given up before its third attempt")
        elif json.loads(path.read_text()) != told:
            problems.append(f"trial {trial.number} was told another result than its folder holds")
    listed = json.loads((driver.study / "results.json").read_text())["arms"]["lora"]["trials"]
    twice = [number for number, n in Counter(each["number"] for each in listed).items() if n > 1]
    return problems + [f"trial {number} is twice in results.json" for number in twice]


def _tracking_problems(servers: Servers, driver: Driver) -> list[str]:
    """MLflow: one run a trial that was trained, all in a final state, no point twice."""
    from mlflow import MlflowClient

    client = MlflowClient(servers.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("lr_rank_sweep")
    runs: list[Any] = []
    token: str | None = None
    while token != "":
        page = client.search_runs([experiment.experiment_id], page_token=token)
        runs, token = [*runs, *page], page.token or ""
    named = Counter(run.info.run_name for run in runs)
    problems = [f"MLflow has {count} runs of {name}" for name, count in named.items() if count > 1]
    open_ = [run.info.run_name for run in runs if run.info.status not in TERMINAL]
    problems += [f"the MLflow run of {name} is still open" for name in open_]
    for folder in sorted(driver.study.glob("lora/*/outcome.json")):
        name = f"lora/{folder.parent.name.removeprefix('trial_')}"
        if name not in named:
            problems.append(f"MLflow has no run of {name}")
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "eval/loss")
        steps = Counter(point.step for point in history)
        if any(count > 1 for count in steps.values()):
            problems.append(f"{run.info.run_name}: a point was recorded twice: {dict(steps)}")
    return problems


def _words(process: psutil.Process) -> str:
    # The interpreter's folder is this machine's, and the figures are committed
    program, *arguments = process.cmdline()
    return shlex.join([Path(program).name, *arguments])


def _left_behind(mark: str) -> list[str]:
    """Processes of the study that outlive it."""
    left = _marked(mark)
    # A worker that is frozen before its first import has no device yet, and cannot ask Linux to end it
    # with its driver. It must end as soon as it wakes up
    for process in left:
        with suppress(psutil.Error):
            process.resume()
    _, left = psutil.wait_procs(left, timeout=30)
    return [f"process {process.pid} outlives the study: {_words(process)}" for process in left]


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("SOAK_MARK") == mark:
                found.append(process)
    return found


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    """Start the servers, soak, check, write soak.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--step-seconds", type=float, default=0.25, help="20 steps a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    parser.add_argument("--output", type=Path, default=Path("soak.json"))
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sweeper-soak-"))
    servers, mark = Servers(folder), folder.name
    driver = Driver(
        folder, asked.trials, {**servers.environment, "SOAK_MARK": mark}, asked.step_seconds
    )
    began = time.monotonic()
    try:
        assert servers.run("start").wait() == 0, (folder / "servers.log").read_text()
        draw = random.Random(asked.seed)
        kills, outcomes = soak(servers, driver, asked.minutes, asked.kills, draw, asked.faults)
        problems = broken_promises(servers, driver, outcomes) + _left_behind(mark)
    finally:
        if driver.process is not None and driver.process.poll() is None:
            driver.process.kill()
        servers.run("stop").wait()
    found = {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "trials": driver.trials,
        "kills": dict(kills),
        "runs of the driver": driver.runs,
        "excused ends": dict(driver.excused),
        "refusals of another data file": driver.refusals,
        "seed": asked.seed,
        "broken promises": problems,
    }
    asked.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    if problems:
        sys.exit(f"{len(problems)} promises are broken; everything is in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
