"""The Ray engine: one actor per device, on a running cluster or on a Ray of our own.

Ray places actors and notices dead nodes. It retries nothing, because a retry is an attempt, which the
dispatcher counts. An actor holds the same worker loop as every engine. The driver keeps one open call to
each actor, which returns the events that the worker has sent.

Workers write into the study's folder if their node sees it. Otherwise they write into a folder of their
own, and the files travel with the events that announce them.
"""

from __future__ import annotations

import atexit
import os
import queue
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# a token of this process only, in no file and no argument; read once, when ray is imported. Whoever has
# set up a cluster's token has set one of these
os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray
from filelock import FileLock, Timeout
from ray.exceptions import RayError, RayTaskError

from sweeper.config.settings import WorkerSettings
from sweeper.core.device_failures import cause_of_death, last_words
from sweeper.core.errors import WorkerError
from sweeper.core.garbage import exempt_from_collection
from sweeper.core.value import FrozenValue
from sweeper.workers.hosted_engine import HostedEngine
from sweeper.workers.protocol import (
    COMMANDS,
    EVENTS,
    CloseCommand,
    EndedEvent,
    EvaluatedEvent,
    InputsChangedEvent,
    LostEvent,
    SubmitCommand,
    Work,
    WorkerCommand,
    WorkerEvent,
    lost,
)
from sweeper.workers.worker import CommandQueue, WorkerResources, make_runner, serve
from sweeper.workers.worker_log import print_into, tail_of

POLL_SECONDS = 1.0
"""Seconds of one wait for a worker's events. A stop or a command waits no longer, as in the
dispatcher."""
DRAIN_SECONDS = 5.0
"""Seconds to wait for the last events of a worker before it is killed. A judgement: one that hangs
has none."""
CLOSE_SECONDS = 5.0
"""Seconds that workers have to end by themselves, as in sweeper.workers.local_engine."""
REACH_SECONDS = 10.0
"""Time limit of the connection to a cluster's address. A judgement: Ray itself tries for minutes."""
PLACEMENT_SECONDS = 600.0
"""Time limit for the first worker to find a place."""
OBJECT_STORE_BYTES = 128 * 2**20
"""Object store of a Ray that is started here. Little but messages passes through it."""
STAYS = frozenset({"checkpoints", ".lock"})
"""Files of a trial that do not travel: an attempt on another node starts from the beginning."""

Files = dict[str, bytes]
"""Contents by path relative to the trial's folder."""
Parcel = tuple[str, Files]
"""An event as JSON, and the files it announces."""


@dataclass(frozen=True)
class FolderMark:
    """A file by which an actor finds out whether it sees the study's folder."""

    path: Path
    word: str

    def is_seen(self) -> bool:
        """Return True if this process sees the very same file."""
        return self.path.is_file() and self.path.read_text(encoding="utf-8") == self.word


@dataclass(frozen=True)
class ClusterShare:
    """The share of a cluster that one worker gets."""

    cpus: float
    gpus: int
    threads: int


class ActorMailbox:
    """The worker's end of the line, inside its actor."""

    def __init__(self, home: Path | None) -> None:
        """Use `home` as the folder of trials if the study's folder is not visible here."""
        self._home = home
        self._down: queue.Queue[str] = queue.Queue()
        self._up: queue.Queue[Parcel | None] = queue.Queue()
        self._folders: dict[str, Path] = {}

    def send(self, message: FrozenValue) -> None:
        """See WorkerChannel."""
        self._up.put((message.model_dump_json(), self._files(message)))

    def receive(self) -> WorkerCommand:
        """See WorkerChannel."""
        command = COMMANDS.validate_json(self._down.get())
        if isinstance(command, SubmitCommand) and self._home is not None:
            folder = self._home / command.folder.parent.name / command.folder.name
            self._folders[command.job] = folder
            return command.model_copy(update={"folder": folder})
        return command

    def order(self, text: str) -> None:
        """Take a command from the driver."""
        self._down.put(text)

    def end(self) -> None:
        """Mark the end of the worker's loop."""
        self._up.put(None)

    def take(self, wait_s: float) -> tuple[list[Parcel], bool]:
        """Wait for parcels and return those since the last call, and True after the very last."""
        parcels: list[Parcel] = []
        with suppress(queue.Empty):
            item = self._up.get(timeout=wait_s) if wait_s else self._up.get_nowait()
            while item is not None:
                parcels.append(item)
                item = self._up.get_nowait()
            return parcels, True
        return parcels, False

    def _files(self, message: FrozenValue) -> Files:
        folder = self._folders.get(getattr(message, "job", ""))
        answers = EvaluatedEvent | EndedEvent | InputsChangedEvent
        if folder is None or not isinstance(message, answers):
            return {}
        if isinstance(message, EvaluatedEvent):  # so that metrics can be shipped while it trains
            return {"metrics.jsonl": (folder / "metrics.jsonl").read_bytes()}
        files = pack(folder)
        shutil.rmtree(folder, ignore_errors=True)
        return files


class WorkerActor:
    """One worker, hosted by Ray: the loop in a thread, and two calls for the driver."""

    def __init__(
        self, worker: int, workers: str, threads: int, place: WorkerResources, mark: FolderMark
    ) -> None:
        home = None if mark.is_seen() else Path(tempfile.mkdtemp(prefix="sweeper-"))
        if home is not None:
            place = replace(place, log=home / place.log.name)
        print_into(place.log)
        self._mailbox = ActorMailbox(home)
        settings = WorkerSettings.model_validate_json(workers)
        served = (worker, settings, threads, place)
        threading.Thread(target=self._serve, args=served, daemon=True).start()

    def order(self, text: str) -> None:
        """Hand a command to the worker."""
        self._mailbox.order(text)

    def poll(self, wait_s: float) -> tuple[list[Parcel], bool]:
        """See Mailbox.take."""
        return self._mailbox.take(wait_s)

    def _serve(
        self, worker: int, settings: WorkerSettings, threads: int, place: WorkerResources
    ) -> None:
        try:
            orders = CommandQueue.listen(self._mailbox)
            runner = make_runner(settings, worker, threads, place)
            exempt_from_collection()
            serve(self._mailbox, orders, runner, worker)
        except BaseException:  # noqa: BLE001 - the thread is the worker: without it the actor is dead
            traceback.print_exc()
            os._exit(1)
        self._mailbox.end()


RemoteActor = ray.remote(WorkerActor)


@dataclass
class ActorHost:
    """The driver's view of one actor."""

    actor: Any
    poll: Any
    log: Path
    started: bool = False
    current: Work | None = None
    killed_for: str | None = None

    def send(self, message: FrozenValue) -> None:
        """Send a command. The death of the actor is noticed by `next_event`."""
        self.actor.order.remote(message.model_dump_json())


class RayEngine(HostedEngine[ActorHost]):
    """An engine of `n_jobs` actors. A dead one is replaced as soon as the cluster has a place.

    A trial that is judged must lie on a file system that the nodes share.
    """

    def __init__(
        self, workers: WorkerSettings, n_jobs: int, devices: int, log: Callable[[int], Path]
    ) -> None:
        super().__init__()
        connect(workers.address, n_jobs)
        self._workers = workers
        self._devices = devices
        self._log = log
        self._unplaced_s = 0.0
        self._events: deque[WorkerEvent] = deque()
        try:
            self._share = share_of(ray.nodes(), n_jobs, devices)
            # found out by a file, because a setting that says which
            # nodes share the folder could be wrong
            self._mark = self._leave_mark()
            self._hosts = {worker: self._start(worker) for worker in range(n_jobs)}
        except BaseException:
            self.close()
            raise

    def kill(self, worker: int, reason: str) -> None:
        """See Engine. The events that the actor still holds are fetched first."""
        host = self._hosts[worker]
        for _ in range(2):  # the call that is open, and one for what came since
            ready, _ = ray.wait([host.poll], timeout=DRAIN_SECONDS)
            if not ready or not self._take(worker):
                break
        if self._hosts[worker] is host:  # it did not die by itself meanwhile
            host.killed_for = reason
            ray.kill(host.actor, no_restart=True)

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        """See Engine."""
        if not self._events:
            polls = {host.poll: worker for worker, host in self._hosts.items()}
            ready, _ = ray.wait(list(polls), num_returns=1, timeout=timeout_s)
            for poll in ready:
                self._take(polls[poll])
            self._require_a_place(timeout_s)
        return self._events.popleft() if self._events else None

    def close(self) -> None:
        """See Engine."""
        for host in self._hosts.values():
            host.send(CloseCommand())
        idle = [host.poll for host in self._hosts.values() if host.started and not host.current]
        with suppress(RayError):
            ray.wait(idle, num_returns=len(idle), timeout=CLOSE_SECONDS) if idle else None
        for host in self._hosts.values():
            ray.kill(host.actor, no_restart=True)
        ray.shutdown()  # ends a Ray that was started here, leaves a running cluster alone
        _remove_private_folders()
        if self._hosts:
            self._mark.path.unlink(missing_ok=True)

    def _take(self, worker: int) -> bool:
        """Fetch the events of a finished call, and return True if the actor lives on."""
        host = self._hosts[worker]
        try:
            parcels, ended = ray.get(host.poll)
        except RayTaskError:  # an error in our own code
            raise
        except RayError as error:  # the actor, its process or its node is gone, or out of reach
            self._replace(worker, _reason(error))
            return False
        for text, files in parcels:
            self._arrived(host, EVENTS.validate_json(text), files)
        if ended:  # after out of memory: the successor starts with clean memory
            self._replace(worker, "it ended by itself")
            return False
        # polls, not a streaming generator: a last poll also
        # fetches what a worker sent before its kill
        host.poll = host.actor.poll.remote(POLL_SECONDS)
        return True

    def _arrived(self, host: ActorHost, event: WorkerEvent, files: Files) -> None:
        if files and isinstance(host.current, SubmitCommand):
            unpack(host.current.folder, files)
        self._heard(host, event)
        self._events.append(event)

    def _replace(self, worker: int, reason: str) -> None:
        host = self._hosts[worker]
        # Should it only be out of reach, it must not train on
        ray.kill(host.actor, no_restart=True)
        tail = tail_of(host.log)
        said = last_words(tail)
        message = f"worker {worker} is lost: {reason}{said and f' ({said})'}\n{tail}"
        self._died(worker, host, message)
        self._hosts[worker] = self._start(worker)
        event: LostEvent = lost(
            worker, host.current, host.killed_for, message, cause_of_death(tail)
        )
        self._events.append(event)

    def _require_a_place(self, waited_s: float) -> None:
        if self._events or any(host.started for host in self._hosts.values()):
            self._unplaced_s = 0.0
            return
        self._unplaced_s += waited_s
        if self._unplaced_s > PLACEMENT_SECONDS:
            raise WorkerError(
                f"Ray has found no place for any worker within {PLACEMENT_SECONDS:g} s; "
                "`ray status` tells what the cluster has and what is asked of it"
            )

    def _start(self, worker: int) -> ActorHost:
        log = self._log(worker).resolve()
        options = {"num_cpus": self._share.cpus, "num_gpus": self._share.gpus}
        actor = RemoteActor.options(
            **options,
            max_restarts=0,  # a new attempt is the driver's to start and to count
            max_task_retries=0,
            max_concurrency=2,  # order while a poll waits
            scheduling_strategy="SPREAD",
        ).remote(
            worker,
            self._workers.model_dump_json(),
            self._share.threads,
            WorkerResources(log, self._devices),
            self._mark,
        )
        return ActorHost(actor, actor.poll.remote(POLL_SECONDS), log)

    def _leave_mark(self) -> FolderMark:
        folder = self._log(0).resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        word = secrets.token_hex(16)
        mark = FolderMark(folder / f".seen_by_workers.{word}", word)
        mark.path.write_text(word, encoding="utf-8")
        return mark


@contextmanager
def _this_machine_only() -> Iterator[None]:
    """Have a Ray that is started inside listen on 127.0.0.1, as on macOS and Windows.

    On Linux Ray listens on every interface, and replaces a loopback address that it is given.
    """
    constants = ray._private.ray_constants
    name = constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, variable = constants.ENABLE_RAY_CLUSTER, os.environ.get(name)
    constants.ENABLE_RAY_CLUSTER, os.environ[name] = False, "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name)
        os.environ |= {} if variable is None else {name: variable}


OWNER = ".sweeper"
"""Lock file in the folder of a session, held by the process that started Ray."""

_PRIVATE: dict[Path, FileLock] = {}
"""Folders of sessions that were started here."""


def _private_folder() -> Path:
    """Return a new folder for Ray's session, inside one that no other user can enter."""
    # short, because the paths of its sockets have at most 107 characters
    place = Path("/tmp" if Path("/tmp").is_dir() else tempfile.gettempdir())
    _remove_abandoned(place)
    outer = Path(tempfile.mkdtemp(prefix="ray-", dir=place))
    owner = FileLock(outer / OWNER, timeout=0)
    owner.acquire()
    _PRIVATE[outer] = owner
    atexit.register(_remove_private_folders)
    # Ray gives every user all rights on its folder, also on one that exists already
    return outer / "s"


def _remove_abandoned(place: Path) -> None:
    """Remove the folders of sessions whose process was killed."""
    for owner in place.glob(f"ray-*/{OWNER}"):
        with suppress(OSError, Timeout):
            if owner.parent.stat().st_uid == os.getuid() and owner.parent not in _PRIVATE:
                with FileLock(owner, timeout=0):
                    shutil.rmtree(owner.parent, ignore_errors=True)


def _remove_private_folders() -> None:
    while _PRIVATE:
        folder, owner = _PRIVATE.popitem()
        shutil.rmtree(folder, ignore_errors=True)
        owner.release()


def connect(address: str | None, n_jobs: int) -> None:
    """Join a running cluster, or start Ray on this machine.

    Raises:
        WorkerError: no cluster there, its token is missing, or authentication is switched off.
    """
    options: dict[str, Any] = {"address": address}
    if address is None:
        if os.environ["RAY_AUTH_MODE"] != "token":
            raise WorkerError(
                f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}: without a token anyone who reaches this "
                "machine's ports can run code here. Unset it, or start Ray yourself and give "
                "workers.address"
            )
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        options = {
            "address": "local",
            # each worker is given one CPU at least, also where there are fewer
            "num_cpus": max(os.cpu_count() or 1, n_jobs),
            "object_store_memory": OBJECT_STORE_BYTES,
            # a further server with a port of its own
            "include_dashboard": False,
            "_temp_dir": str(_private_folder()),
        }
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None and address != "auto":
            host, _, port = address.rpartition(":")  # Ray itself tries for many minutes
            socket.create_connection((host, int(port)), REACH_SECONDS).close()
        with nullcontext() if address is not None else _this_machine_only():
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, RayError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = "on this machine" if address is None else f"at workers.address={address}"
        raise WorkerError(f"no Ray {where}: {first}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own exits at once, with trials untold


def share_of(nodes: Sequence[Mapping[str, Any]], n_jobs: int, devices: int) -> ClusterShare:
    """Return each worker's share: `devices` GPUs of one node if there are any, else CPUs.

    CPUs are shared out so that as many as possible fit n_jobs times.

    Raises:
        WorkerError: the cluster has no room for n_jobs workers.
    """
    found = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in found if node.get("GPU")]
    if gpus:
        _require_room([count for _, count in gpus], n_jobs, devices, "GPUs")
        return ClusterShare(1, devices, max(1, min(cpus // count for cpus, count in gpus)))
    cpus = [int(node.get("CPU", 0)) for node in found]
    _require_room(cpus, n_jobs, 1, "CPUs")
    most = max(c for c in range(1, max(cpus) + 1) if sum(n // c for n in cpus) >= n_jobs)
    return ClusterShare(most, 0, max(1, most // devices))


def _require_room(counts: Sequence[int], n_jobs: int, devices: int, kind: str) -> None:
    room = sum(count // devices for count in counts)
    if room < n_jobs:
        raise WorkerError(
            f"the Ray cluster has room for {room} of {n_jobs} workers of {devices} {kind} on one node "
            f"each, {sum(counts)} {kind} in all. Lower hydra.sweeper.n_jobs or "
            "training.devices_per_trial, or add nodes first"
        )


def pack(folder: Path) -> Files:
    """Return the kept files of a trial's folder, with their contents."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in STAYS
    }


def unpack(folder: Path, files: Files) -> None:
    """Write files into a trial's folder: each file or sub-folder appears whole, outcome.json last."""
    arriving = folder / ".arriving"
    shutil.rmtree(arriving, ignore_errors=True)
    for name, content in files.items():
        path = (arriving / name).resolve()
        assert path.is_relative_to(arriving.resolve()), f"{name} leads out of the trial's folder"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
    # outcome.json comes last, because it tells that the folder is complete
    for part in sorted(arriving.iterdir(), key=lambda path: path.name == "outcome.json"):
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        part.replace(target)
    arriving.rmdir()


def _reason(error: Exception) -> str:
    """Return Ray's message without its table of ids."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith("\t")]
    return " ".join(lines[-1:]) or type(error).__name__
