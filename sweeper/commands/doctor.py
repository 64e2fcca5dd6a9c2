"""`sweeper doctor`: checks of devices, packages, disk, tokens, MLflow and the study's database.

Each check is a function that returns findings. No check writes a file or shows a secret. The checks
run in parallel, because the slowest (torch in its own process) takes as long as all others
together.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from sweeper.config import compose
from sweeper.config.settings import RunSettings, StudySettings, TrackingSettings, validate
from sweeper.core.errors import WorkerError
from sweeper.core.paths import StudyFolder
from sweeper.reporting.console import say
from sweeper.search.ownership import database_url
from sweeper.search.study_naming import name_study
from sweeper.search.study_plan import single
from sweeper.tracking.tracker_factory import LOCAL_STORE
from sweeper.tracking.tracking_server import local_uri
from sweeper.workers.devices import survey_devices

Level = Literal["ok", "warning", "failure"]
STYLES: Mapping[Level, str] = {"ok": "green", "warning": "yellow", "failure": "bold red"}
TIMEOUT_S = 5
"""Seconds to wait for each server. A judgement: one that answers later would slow every request."""
DEVICE_TIMEOUT_S = 120
"""Seconds for the process that imports torch, which a cold file system or a busy machine slows down."""
# no machine with one was at hand, and bitsandbytes' 4-bit layers do not run on it
MPS = "the GPU of this Mac (MPS) is not used: trials train on its CPU"
MPS_ADVICE = "train small bases here, and larger ones on Linux with an NVIDIA GPU"
SPILLS = (
    "under WSL2 the driver moves memory of this GPU into system memory instead of refusing, which is "
    "many times slower. sweeper allocates no more than the GPU has free when a worker starts"
)
SPILL_ADVICE = (
    "NVIDIA Control Panel on Windows: CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback"
)
FULL_GIB, TIGHT_GIB = 1.0, 10.0
"""Free GiB below which a disk is a failure and a warning. A judgement: adapters take megabytes, and
the files of a base take gigabytes."""
WAYS_OUT = {"output_dir": "output_dir=FOLDER", "hub cache": "the variable HF_HOME"}
"""What moves each place to another disk."""
MIB_OF_GIB = 1024


@dataclass(frozen=True)
class DoctorFinding:
    """One result of a check."""

    check: str
    level: Level
    text: str
    advice: str = ""


def examine(overrides: Sequence[str]) -> list[DoctorFinding]:
    """Return all findings for what a command line would run, in a fixed order.

    Raises:
        ConfigError: the overrides are wrong.
    """
    fixed, _ = compose.split_sweeps(compose.complete_overrides(overrides, Path.cwd()))
    settings = single(fixed)
    composition = compose.compose(fixed)
    study = validate(StudySettings, composition.sweeper, "hydra.sweeper")
    folder = StudyFolder(Path(settings.output_dir) / name_study(fixed, composition).name)
    database = study.storage or database_url(folder.database)
    checks: list[Callable[[], list[DoctorFinding]]] = [
        visible_gpus,
        devices,
        packages,
        lambda: disks(settings),
        tokens,
        lambda: [tracking(settings.tracking)],
        lambda: [reach_database("study database", database)],
    ]
    # side by side, because several of them wait for a server or a process
    with ThreadPoolExecutor(max_workers=len(checks)) as pool:
        return [finding for found in pool.map(lambda check: check(), checks) for finding in found]


def print_findings(findings: Sequence[DoctorFinding], console: Console) -> None:
    """Print each finding on a line, followed by what to do about it."""
    for finding in findings:
        mark = Text(f"{finding.level:<8}", style=STYLES[finding.level])
        console.print(mark, f"{finding.check}: ", end="", highlight=False)
        say(console, finding.text)
        if finding.advice:
            say(console, " " * 9 + finding.advice)


def to_json(findings: Sequence[DoctorFinding]) -> str:
    """Return the findings as a JSON list."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)


def sound(findings: Sequence[DoctorFinding]) -> bool:
    """Return True if no check failed."""
    return all(finding.level != "failure" for finding in findings)


def devices(
    command: Sequence[str] = ("-m", "sweeper.modeling.device_check"),
) -> list[DoctorFinding]:
    """Check devices, free memory, bf16 and 4-bit layers in a process that imports torch."""
    try:
        answer = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=DEVICE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return [
            DoctorFinding(
                "devices",
                "failure",
                f"torch did not answer within {DEVICE_TIMEOUT_S} s",
                "run the doctor again when the machine is less busy, or install torch again",
            )
        ]
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        advice = "install again with: pip install -c constraints.txt -e ."
        return [DoctorFinding("devices", "failure", f"torch cannot be used: {last}", advice)]
    # the last line, because libraries may print others before it
    found = json.loads(answer.stdout.splitlines()[-1])["devices"]
    return [finding for device in found for finding in device_findings(device)]


def visible_gpus() -> list[DoctorFinding]:
    """Check that nvidia-smi and CUDA_VISIBLE_DEVICES name the GPUs that workers would use."""
    try:
        survey = survey_devices()
    except WorkerError as error:
        return [DoctorFinding("GPUs", "failure", str(error))]
    if survey.problem:
        advice = "check nvidia-smi -L, the driver, and CUDA_VISIBLE_DEVICES"
        return [DoctorFinding("GPUs", "warning", survey.problem, advice)]
    if not survey.names:
        return []
    return [DoctorFinding("GPUs", "ok", f"workers use {', '.join(survey.names)}")]


def device_findings(device: Mapping[str, Any]) -> list[DoctorFinding]:
    """Interpret one line of sweeper.modeling.device_check."""
    free, total = device["free_mib"] / MIB_OF_GIB, device["total_mib"] / MIB_OF_GIB
    text = f"{device['name']}: {free:.1f} of {total:.1f} GiB free"
    bf16 = "computes bf16" if device["bf16"] else "does not compute bf16"
    level: Level = "ok"
    advice = ""
    if device["type"] == "cpu":
        level, advice = (
            "warning",
            "no GPU: the embedded base trains in seconds, 100M+ models do not",
        )
    elif free < 0.8 * total:
        level, advice = "warning", "another process holds memory of this device (see nvidia-smi)"
    findings = [DoctorFinding("device", level, f"{text}, {bf16}", advice)]
    if device["mps"]:
        findings.append(DoctorFinding("Apple GPU", "warning", MPS, MPS_ADVICE))
    if device["spills"]:
        findings.append(DoctorFinding("device memory", "warning", SPILLS, SPILL_ADVICE))
    return [*findings, _four_bits(device), _eight_bit_optimizer(device)]


def _four_bits(device: Mapping[str, Any]) -> DoctorFinding:
    if device["nf4"] is None:
        return DoctorFinding("4-bit", "ok", f"bitsandbytes NF4 learns on {device['name']}")
    problem = f"bitsandbytes NF4 does not work on {device['name']}: {device['nf4']}"
    return DoctorFinding("4-bit", "failure", problem, "train without it: quantization=none")


def _eight_bit_optimizer(device: Mapping[str, Any]) -> DoctorFinding:
    check, found = "8-bit optimizer", device["optimizer_8bit"]
    if found is None:
        return DoctorFinding(check, "ok", f"bitsandbytes AdamW steps on {device['name']}")
    problem = f"bitsandbytes AdamW in 8 bits does not work on {device['name']}: {found}"
    return DoctorFinding(check, "failure", problem, "train without it: training.optim=adamw_torch")


def packages(requirements: Sequence[str] | None = None) -> list[DoctorFinding]:
    """Compare installed versions with the supported ranges (pyproject.toml)."""
    from packaging.requirements import Requirement

    texts = requirements if requirements is not None else own_requirements()
    # the packages of extras are optional
    needed = [text for text in texts if "extra ==" not in text]
    wrong = [problem for text in needed if (problem := _package_problem(Requirement(text)))]
    if not wrong:
        return [
            DoctorFinding("packages", "ok", f"{len(needed)} packages within the supported ranges")
        ]
    advice = "pip install -c constraints.txt -e .   (the versions that were tested)"
    return [DoctorFinding("packages", "failure", problem, advice) for problem in wrong]


def own_requirements() -> list[str]:
    """Return the requirements of the installed sweeper, or of the checkout that runs without one."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.requires("sweeper") or []
    project = Path(compose.__file__).parents[2] / "pyproject.toml"
    found: list[str] = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    return found


def _package_problem(need: Any) -> str | None:
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return f"{need.name} is not installed. {need.specifier} is needed"
    # without it packaging takes every pre-release for one outside the range
    if need.specifier.contains(version, prereleases=True):
        return None
    return f"{need.name} {version} is installed, but {need.specifier} is supported"


def disks(settings: RunSettings) -> list[DoctorFinding]:
    """Check the free space for trials and for the hub's models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"output_dir": Path(settings.output_dir), "hub cache": Path(HF_HUB_CACHE)}
    return [disk(name, path) for name, path in places.items()]


def disk(name: str, path: Path, free_gib: float | None = None) -> DoctorFinding:
    """Check the free space and write access at a path that may not exist yet."""
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = free_gib if free_gib is not None else shutil.disk_usage(place).free / 2**30
    text = f"{path}: {free:.1f} GiB free"
    other = f"another place: {WAYS_OUT[name]}" if name in WAYS_OUT else "another place"
    if not os.access(place, os.W_OK):
        text = f"{place} cannot be written"
        return DoctorFinding(f"disk, {name}", "failure", text, f"choose {other}")
    if free < FULL_GIB:
        advice = f"make room, or choose {other}"
        return DoctorFinding(f"disk, {name}", "failure", text, advice)
    if free < TIGHT_GIB:
        advice = "a 7B model takes 15 GiB, and a full fine-tune of it 30 GiB"
        return DoctorFinding(f"disk, {name}", "warning", text, advice)
    return DoctorFinding(f"disk, {name}", "ok", text)


def tokens() -> list[DoctorFinding]:
    """Check for a hub token, which gated models need. The token itself is never shown."""
    from huggingface_hub import get_token

    if get_token() is not None:
        where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the hub's login"
        return [DoctorFinding("hub token", "ok", f"set, from {where}")]
    text = "HF_TOKEN is not set. Gated models (Llama, Gemma) cannot be fetched"
    return [DoctorFinding("hub token", "warning", text, "needed for those only: export HF_TOKEN=…")]


def tracking(settings: TrackingSettings) -> DoctorFinding:
    """Check that runs can be recorded."""
    if settings.kind == "none":
        return DoctorFinding("MLflow", "ok", "tracking=none: nothing is recorded")
    uri = settings.uri or local_uri(LOCAL_STORE)
    if uri.startswith(("http://", "https://")):
        return mlflow_server(uri)
    if "://" not in uri or uri.startswith("file:"):
        return disk("MLflow", Path(urllib.parse.urlparse(uri).path))
    return reach_database("MLflow", uri)


def mlflow_server(uri: str) -> DoctorFinding:
    """Check that a tracking server answers, and that its version is supported."""
    shown, ours = without_password(uri), metadata.version("mlflow")
    start = time.monotonic()
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=TIMEOUT_S) as answer:
            theirs = answer.read(100).decode().strip()
    except (OSError, ValueError) as error:  # URLError, timeouts and refused connections alike
        reason = getattr(error, "reason", error)
        advice = "start it (make ui, or mlflow server), or train with tracking=none"
        return DoctorFinding("MLflow", "failure", f"{shown} does not answer: {reason}", advice)
    text = f"{shown} answers in {time.monotonic() - start:.1f} s, version {theirs}"
    if theirs.split(".")[0] != ours.split(".")[0]:
        return DoctorFinding(
            "MLflow", "warning", text, f"this client is {ours}. Use one major version"
        )
    return DoctorFinding("MLflow", "ok", text)


def reach_database(name: str, url: str) -> DoctorFinding:
    """Check that a database opens. An SQLite file that does not exist yet needs only its folder."""
    import sqlalchemy
    from sqlalchemy.exc import SQLAlchemyError

    try:
        parsed = sqlalchemy.make_url(url)
        if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
            place = disk(name, Path(parsed.database or ""))
            text = f"{url} will be created. {place.text}"
            return DoctorFinding(name, place.level, text, place.advice)
        # sqlite3 has another name for it than the drivers of PostgreSQL and MySQL
        timeout = {"sqlite": "timeout"}.get(parsed.get_backend_name(), "connect_timeout")
        engine = sqlalchemy.create_engine(parsed, connect_args={timeout: TIMEOUT_S})
        with engine.connect() as connection:
            sqlalchemy.inspect(connection).get_table_names()  # opens SQLite's file as well
        engine.dispose()
    except (SQLAlchemyError, ImportError) as error:
        reason = str(error).splitlines()[0]
        advice = "check the URL (dialect+driver://user:password@host/name) and that it is running"
        return DoctorFinding(name, "failure", f"{without_password(url)}: {reason}", advice)
    return DoctorFinding(name, "ok", f"{without_password(url)} opens")


def without_password(url: str) -> str:
    """Return a URL without password and query, both of which may hold secrets."""
    parts = urllib.parse.urlsplit(url)
    if parts.password is None and not parts.query:
        return url
    user = "" if parts.username is None else f"{parts.username}:***@"
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{user}{host}", query="").geturl()
