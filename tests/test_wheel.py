"""A wheel works from any directory: the configuration and the base model travel inside it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_wheel_holds_everything_and_runs_elsewhere(tmp_path: Path) -> None:
    """Built, installed away from the checkout, and run from an empty folder: a study with fakes."""
    dist, site, empty = tmp_path / "dist", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = dist.glob("sweeper-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "sweeper/conf/config.yaml" in names
    assert "sweeper/builtin/base/model.safetensors" in names
    assert "hydra_plugins/sweeper_study/study_sweeper.py" in names
    assert not any(name.startswith(("tests/", "tools/", "outputs/", "mlruns/")) for name in names)
    assert not [name for name in names if "pretrain" in name]
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "sweeper", "+experiment=lr_rank_sweep", "workers=fake", "-m"]
    result = subprocess.run(
        [*command, "tracking=none", "hydra.sweeper.n_trials=2"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (empty / "outputs" / "lr_rank_sweep" / "report.md").exists()
    where = [sys.executable, "-c", "import sweeper.config.compose as c; print(c.conf_dir())"]
    shown = subprocess.run(where, cwd=empty, env=environment, capture_output=True, text=True)
    assert shown.stdout.strip() == str(site / "sweeper" / "conf")
