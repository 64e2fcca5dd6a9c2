"""The doctor finds what would fail, says what to do, and shows no secret."""

from __future__ import annotations

import http.server
import json
import sqlite3
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from sweeper.cli.verbs import app
from sweeper.commands import doctor
from sweeper.commands.doctor import DoctorFinding
from sweeper.modeling import device_check, hardware
from sweeper.modeling.device_check import check, nf4_problem, optimizer_problem
from sweeper.workers.devices import DeviceSurvey
from tests.conftest import make_settings

NOBODY = "127.0.0.1:9"
"""The discard port: nothing listens there."""
GPU = {
    "name": "H200",
    "type": "cuda",
    "free_mib": 140_000.0,
    "total_mib": 143_000.0,
    "bf16": True,
    "nf4": None,
    "optimizer_8bit": None,
    "mps": False,
    "spills": False,
}


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers /version as MLflow's does, with a major version of the future."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/version" else 404)
            self.end_headers()
            self.wfile.write(b"99.1.0")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://user:secret@127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_four_bit_layer_learns_here() -> None:
    """The very probe that the doctor runs finds a device, its memory, and a gradient through NF4."""
    (device,) = check()["devices"]  # type: ignore[misc]
    assert device["nf4"] is None
    assert device["optimizer_8bit"] is None
    assert 0 < device["free_mib"] < device["total_mib"]
    levels = [finding.level for finding in doctor.device_findings(device)]
    assert "failure" not in levels


def test_a_layer_without_gradient_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """If bitsandbytes cuts the gradient, training would go on in silence: the probe must see it."""
    import bitsandbytes as bnb
    import torch

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: x.detach().requires_grad_())
    found = nf4_problem(torch.device("cpu"))
    assert found == "no gradient passes through a 4-bit layer in float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_four_bits_are_tried_in_the_dtype_of_trials(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """A GPU's kernels differ by dtype, so the layer computes in the one that trials compute in."""
    import bitsandbytes as bnb
    import torch

    chosen, made = getattr(torch, dtype), []
    plain = bnb.nn.Linear4bit.forward

    def forward(self: bnb.nn.Linear4bit, states: torch.Tensor) -> torch.Tensor:
        made.append((self.compute_dtype, torch.is_autocast_enabled("cpu")))
        result: torch.Tensor = plain(self, states)
        return result

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", forward)
    precision = hardware.ComputePrecision(chosen, "pretended")
    monkeypatch.setattr(device_check, "choose_dtype", lambda name, on: precision)
    assert nf4_problem(torch.device("cpu")) is None
    assert made == [(chosen, chosen == torch.bfloat16)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("step", "does not lower the weights"),
        ("bits", "states in 32 bits"),
        ("load", "RuntimeError"),
    ],
)
def test_an_8_bit_optimizer_that_does_not_work_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, change: str, expected: str
) -> None:
    """The probe sees an optimizer that changes nothing, one with 32 bits, and one that raises."""
    import bitsandbytes as bnb
    import torch

    kind, plain = bnb.optim.AdamW8bit, bnb.optim.AdamW8bit.step

    def step(self: bnb.optim.AdamW8bit) -> None:
        if change == "load":
            raise RuntimeError("CUDA Setup failed")
        (weight,) = self.param_groups[0]["params"]
        before = weight.detach().clone()
        plain(self)
        weight.data.copy_(before)

    if change == "bits":
        monkeypatch.setattr(bnb.optim, "AdamW8bit", bnb.optim.AdamW32bit)
    else:
        monkeypatch.setattr(kind, "step", step)
    assert expected in str(optimizer_problem(torch.device("cpu")))


def test_devices_are_judged_by_what_is_free() -> None:
    """An empty GPU is fine, a used one a warning, a CPU a warning, a broken NF4 a failure."""
    assert [found.level for found in doctor.device_findings(GPU)] == ["ok", "ok", "ok"]
    used = doctor.device_findings({**GPU, "free_mib": 20_000.0})
    assert used[0].level == "warning"
    assert "another process" in used[0].advice
    assert doctor.device_findings({**GPU, "type": "cpu"})[0].level == "warning"
    broken = doctor.device_findings({**GPU, "nf4": "RuntimeError: CUDA Setup failed"})[1]
    assert broken.level == "failure"
    assert "quantization=none" in broken.advice
    broken = doctor.device_findings({**GPU, "optimizer_8bit": "RuntimeError: no kernel"})[2]
    assert broken.level == "failure"
    assert "training.optim=adamw_torch" in broken.advice


def test_a_driver_that_spills_is_a_warning() -> None:
    """Under WSL2 the doctor says that memory is capped, and where Windows keeps the setting."""
    found = doctor.device_findings({**GPU, "spills": True})
    assert [one.level for one in found] == ["ok", "warning", "ok", "ok"]
    assert "Sysmem Fallback" in found[1].advice


def test_gpus_that_nvidia_smi_cannot_list_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that fails is named instead of the silence of a machine without a GPU."""
    survey = DeviceSurvey(problem="no GPU is used, because nvidia-smi fails: no NVML")
    monkeypatch.setattr(doctor, "survey_devices", lambda: survey)
    (found,) = doctor.visible_gpus()
    assert (found.level, found.text) == ("warning", survey.problem)


def test_a_mac_is_told_that_its_gpu_is_not_used() -> None:
    """MPS is there, and trials train on the CPU: the doctor says so."""
    found = doctor.device_findings({**GPU, "type": "cpu", "mps": True})
    assert "(MPS) is not used" in found[1].text


def test_a_checkout_that_is_not_installed_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an installed sweeper the requirements are those of the checkout's pyproject.toml."""
    installed = doctor.own_requirements()

    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", missing)
    found = [Requirement(text) for text in doctor.own_requirements()]
    needed = [Requirement(text) for text in installed if "extra ==" not in text]
    assert sorted(map(str, found)) == sorted(map(str, needed))
    assert [finding.level for finding in doctor.packages()] == ["ok"]


def test_a_torch_that_cannot_be_imported_is_a_failure_not_a_crash() -> None:
    """The device check dies in its own process; the last line of its error is the finding."""
    (found,) = doctor.devices(["-c", "raise ImportError('libcudart.so.13: cannot open')"])
    assert found.level == "failure"
    assert "libcudart.so.13" in found.text


def test_packages_are_held_against_the_ranges_of_pyproject() -> None:
    """The installed set fits; a range it does not fit and a missing package are named."""
    assert [found.level for found in doctor.packages()] == ["ok"]
    found = doctor.packages(["optuna<2", "no-such-package>=1", "pytest>=999; extra == 'dev'"])
    assert [one.level for one in found] == ["failure", "failure"]
    assert "optuna 5" in found[0].text
    assert "<2 is supported" in found[0].text
    assert "no-such-package is not installed" in found[1].text


@pytest.mark.parametrize(("free", "level"), [(0.5, "failure"), (5.0, "warning"), (50.0, "ok")])
def test_disk_levels(tmp_path: Path, free: float, level: str) -> None:
    """Below 1 GiB nothing can be stored, below 10 a model may not fit."""
    assert doctor.disk("output_dir", tmp_path / "not" / "there", free).level == level


def test_a_token_is_named_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_TOKEN set or not is all that is said."""
    monkeypatch.setenv("HF_TOKEN", "hf_geheim")
    (found,) = doctor.tokens()
    assert found.level == "ok"
    assert "geheim" not in doctor.to_json([found])


def test_a_server_that_does_not_answer_is_a_failure() -> None:
    """MLflow at a port where nobody listens, with the ways out."""
    settings = make_settings(f"tracking.uri=http://{NOBODY}").tracking
    found = doctor.tracking(settings)
    assert found.level == "failure"
    assert "tracking=none" in found.advice


def test_a_server_of_another_major_version_is_a_warning(server: str) -> None:
    """It answers, its version is shown, its password is not."""
    found = doctor.mlflow_server(server.replace("user:secret@", ""))
    assert found.level == "warning"
    assert "version 99.1.0" in found.text
    assert "secret" not in doctor.mlflow_server(server).text


def test_tracking_none_needs_nothing() -> None:
    """Nothing is recorded, so nothing can be missing."""
    assert doctor.tracking(make_settings("tracking=none").tracking).level == "ok"


def test_a_database_opens_or_says_why_not(tmp_path: Path) -> None:
    """A SQLite file opens; one to come needs its folder; a text file is no database."""
    path = tmp_path / "study.db"
    url = f"sqlite:///{path}"
    assert "will be created" in doctor.reach_database("study", url).text
    assert not path.exists()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (x)")
    assert doctor.reach_database("study", url).level == "ok"
    path.write_text("no database " * 100, encoding="utf-8")
    found = doctor.reach_database("study", url)
    assert found.level == "failure"
    assert "not a database" in found.text


@pytest.mark.parametrize(
    "url", [f"nonsense://u:geheim@{NOBODY}/x", f"postgresql+nope://u@{NOBODY}/x?password=geheim"]
)
def test_a_database_that_cannot_be_reached_shows_no_password(url: str) -> None:
    """An unknown dialect or driver is a failure whose text may be pasted anywhere."""
    found = doctor.reach_database("study", url)
    assert found.level == "failure"
    assert "geheim" not in found.text


def test_exit_code_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`sweeper doctor --json` prints findings; it exits with 1 if and only if one is a failure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "devices", lambda: [DoctorFinding("device", "ok", "pretended")])
    good = CliRunner().invoke(app, ["doctor", "--json", "+experiment=lr_rank_sweep"])
    assert good.exit_code == 0, good.output
    checks = {one["check"] for one in json.loads(good.output)}
    assert {
        "device",
        "packages",
        "disk, output_dir",
        "hub token",
        "MLflow",
        "study database",
    } <= checks
    bad = CliRunner().invoke(app, ["doctor", f"tracking.uri=http://{NOBODY}"])
    assert bad.exit_code == 1
    assert "does not answer" in bad.output
    assert not list(tmp_path.iterdir()), "the doctor writes nothing"
