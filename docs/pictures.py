"""Renew docs/images from a folder in which a study was run: the report, and MLflow's UI on its runs.

    python docs/pictures.py outputs/lr_rank_sweep          (or: make pictures)

Needs Chromium. Starts MLflow's UI on a free port of this machine and ends it again; there the
assistant's pane is closed and the columns are those of a sweep. Every picture is reduced to a palette
until it is at most 150 kB.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
MOST_BYTES = 150_000
COLOURS = (256, 128, 64, 32, 16)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
DESKTOP, WIDE, PHONE = (1280, 900), (1680, 1000), (390, 844)
COLUMNS = [
    *("metrics.`best/eval_loss`", "params.`training.learning_rate`", "params.`adapter.r`"),
    *("params.`adapter.target_modules`", "metrics.`parameters/trainable`"),
    *("metrics.`cost/seconds`", "tags.`cause`", "attributes.`Models`"),
]
CHARTS = "^(eval|train)/"
"""A regular expression of the metrics whose charts are shown."""
SETTLE_MS = 12_000
"""MLflow fetches and draws for seconds, and polls for ever: no moment is its last."""
START_SECONDS = 120
Scheme = Literal["light", "dark"]


def main() -> None:
    """Take all pictures of one study."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", type=Path, help="outputs/STUDY of a study that has ended")
    parser.add_argument("--mlruns", type=Path, default=Path("mlruns"), help="MLflow's local store")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where the pictures go")
    arguments = parser.parse_args()
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    report = arguments.study / "report.html"
    if program is None or not report.exists():
        sys.exit(f"{report} and Chromium are needed (apt-get install chromium)")
    url = report.resolve().as_uri()
    store = f"sqlite:///{(arguments.mlruns / 'mlflow.db').resolve()}"
    with sync_playwright() as playwright, mlflow_ui(store) as root:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        shots = {
            "report": shoot(browser, url, DESKTOP),
            "report_dark": shoot(browser, url, DESKTOP, "dark"),
            "report_phone": shoot(browser, url, PHONE),
        }
        client = MlflowClient(store)
        experiments = [found.experiment_id for found in client.search_experiments()]
        query = f"tags.`sweeper.study` = '{arguments.study.name}'"
        runs = client.search_runs(experiments, query)
        models = client.search_logged_models(experiments)
        pages = mlflow_pages(runs, models, root)
        at = runs[0].info.experiment_id
        shots |= {name: shoot_mlflow(browser, page, at) for name, page in pages.items()}
        browser.close()
    for name, png in shots.items():
        target = arguments.images / f"{name}.png"
        save(png, target)
        print(f"{target}  {target.stat().st_size / 1000:.0f} kB")


def shoot(browser: Browser, url: str, size: tuple[int, int], scheme: Scheme = "light") -> bytes:
    """What a window of a size shows, as PNG."""
    with opened(browser, size, scheme) as page:
        page.goto(url, wait_until="load")
        return page.screenshot()


def shoot_mlflow(browser: Browser, url: str, experiment: str) -> bytes:
    """A page of MLflow's UI as one would set it up: for training, the assistant closed, our columns."""
    shown = json.dumps({"selectedColumns": COLUMNS, "runsExpanded": {}})
    remembered = {
        "mlflow.workflowType_v1": '"machine_learning"',
        "mlflow.assistant.panelOpen_v1": "false",
        "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
        f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment}"]-ReactComponentState': shown,
    }
    with opened(browser, WIDE) as page:
        items = json.dumps(list(remembered.items()))
        page.add_init_script(f"{items}.forEach(([key, value]) => localStorage.setItem(key, value))")
        page.goto(url, wait_until="load")
        page.wait_for_timeout(SETTLE_MS)
        charts = page.get_by_placeholder("Search metric charts")
        if charts.count():
            charts.fill(CHARTS)
            page.wait_for_timeout(SETTLE_MS)
        return page.screenshot()


@contextmanager
def opened(browser: Browser, size: tuple[int, int], scheme: Scheme = "light") -> Iterator[Page]:
    """A new window, as of a person who was never there."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    try:
        yield page
    finally:
        page.close()


def mlflow_pages(runs: Sequence[Run], models: Sequence[LoggedModel], root: str) -> dict[str, str]:
    """The UI's pages that show a study: its runs, their charts, the parent run, its best model."""
    parent = next(run for run in runs if "sweeper.trial" not in run.data.tags)
    experiment = f"{root}/#/experiments/{parent.info.experiment_id}"
    order = f"orderByKey={quote('metrics.`best/eval_loss`')}&orderByAsc=true"
    table = f"{experiment}/runs?{order}"
    best = best_with_model(runs, models).info.run_id
    model = next(each for each in models if each.source_run_id == best)
    return {
        "mlflow_runs": table,
        "mlflow_charts": f"{table}&compareRunsMode=CHART",
        "mlflow_parent": f"{experiment}/runs/{parent.info.run_id}",
        "mlflow_model": f"{experiment}/models/{model.model_id}",
    }


def best_with_model(runs: Sequence[Run], models: Sequence[LoggedModel]) -> Run:
    """The run with the lowest loss among those whose adapter is kept."""
    kept = {model.source_run_id for model in models}
    return min(
        (run for run in runs if run.info.run_id in kept),
        key=lambda run: run.data.metrics["best/eval_loss"],
    )


@contextmanager
def mlflow_ui(store: str) -> Iterator[str]:
    """MLflow's UI on a free port; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **quiet},
        start_new_session=True,
    )
    root = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{root}/health")
        yield root
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for(url: str) -> None:
    """Until somebody answers."""
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            urlopen(url, timeout=5).close()
            return
        except (URLError, OSError):
            if time.monotonic() > until:
                raise
        time.sleep(0.5)


def save(png: bytes, target: Path) -> None:
    """Store a picture with as many colours as its size allows."""
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for count in COLOURS:
        packed = io.BytesIO()
        picture.quantize(count, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
        if packed.tell() <= MOST_BYTES:
            break
    else:
        sys.exit(
            f"{target}: {packed.tell()} bytes with {COLOURS[-1]} colours; take a smaller window"
        )
    target.write_bytes(packed.getvalue())


if __name__ == "__main__":
    main()
