"""What matters in the compose file, the Dockerfile and the scripts, without a Docker engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SCRIPTS = sorted([*ROOT.glob("deploy/*.sh"), *ROOT.glob("deploy/slurm/*.sbatch")])


def _variables(text: str) -> dict[str, str]:
    return dict(re.findall(r"\$\{(\w+)(:?[?-][^}]*)?\}", text))


def test_every_port_is_on_the_loopback() -> None:
    """Nothing is published to the network."""
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_no_password_has_a_default() -> None:
    """Compose refuses to start without one; no secret stands in the file."""
    found = _variables((ROOT / "docker-compose.yml").read_text())
    assert found["POSTGRES_PASSWORD"].startswith(":?")
    secret = [name for name in found if re.search("PASSWORD|TOKEN|SECRET", name)]
    assert {name for name in secret if found[name] not in (":-",)} == {"POSTGRES_PASSWORD"}


def test_every_variable_is_in_the_example() -> None:
    """What the compose file reads, .env.example explains."""
    example = (ROOT / ".env.example").read_text()
    wanted = set(_variables((ROOT / "docker-compose.yml").read_text())) - {"SWEEPER_STORAGE"}
    assert {name for name in wanted if name not in example} <= {"TORCH_INDEX", "oc"}
    assert re.search(r"^POSTGRES_PASSWORD=$", example, re.MULTILINE), "the example has no password"


def test_images_are_pinned() -> None:
    """No tag that moves, in the compose file or in the Dockerfile."""
    images = [service["image"] for service in SERVICES.values()]
    images += re.findall(r"^FROM (\S+:\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert len(images) == 7
    assert all(re.search(r":\d+\.\d+", image) for image in images)


def test_servers_have_healthchecks_and_start_in_order() -> None:
    """The database, then the migrations, then MLflow, then sweeps."""
    assert {name for name, service in SERVICES.items() if "healthcheck" in service} == {
        *("db", "mlflow")
    }
    assert SERVICES["init"]["depends_on"] == {"db": {"condition": "service_healthy"}}
    order = {"init": {"condition": "service_completed_successfully"}}
    assert SERVICES["mlflow"]["depends_on"] == order
    for name in ("sweep", "nightly"):
        assert SERVICES[name]["depends_on"] == {"mlflow": {"condition": "service_healthy"}}


def test_mlflow_server_is_closed_where_it_should_be() -> None:
    """Hosts by name, no telemetry, no job runner, and no database URL among the arguments."""
    server = SERVICES["mlflow"]
    environment = server["environment"]
    hosts = environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert all(host.partition(":")[0] in ("mlflow", "127.0.0.1", "localhost") for host in hosts)
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert not any("postgresql" in word for word in server["command"])
    assert SERVICES["sweep"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://") in hosts


def test_data_lives_in_named_volumes() -> None:
    """Nothing of value is in a container or in a folder of the host."""
    used = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
    }
    assert used == set(COMPOSE["volumes"])


def test_keys_are_keys_of_compose() -> None:
    """A mistyped key would be an error only where a Docker engine is."""
    known = {
        *("build", "command", "depends_on", "deploy", "environment", "healthcheck", "image"),
        *("init", "ports", "profiles", "restart", "shm_size", "stop_grace_period"),
        *("stop_signal", "volumes"),
    }
    assert {key for service in SERVICES.values() for key in service} <= known
    assert set(COMPOSE) <= {"name", "services", "volumes", "x-storage", "x-backend"}


def test_images_do_not_run_as_root() -> None:
    """Each final stage of the Dockerfile ends as an ordinary user."""
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    final = [stage for stage in stages if re.match(r"\S+ AS (servers|sweeper|nightly)\n", stage)]
    assert len(final) == 3
    for stage in final:
        assert re.findall(r"^USER (\w+)$", stage, re.MULTILINE)[-1] == "sweeper"


def test_files_that_images_copy_exist() -> None:
    """Each COPY source is there, and .dockerignore lets it through."""
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    copies = re.findall(
        r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    sources = " ".join(copies).split()
    assert {"sweeper", "hydra_plugins", "conf"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source.partition('/')[0]}" in allowed, source


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    """Quoting, unset variables, and what else goes wrong in shell."""
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
