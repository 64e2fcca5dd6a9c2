"""Renew docs/images from a folder in which a study was run: the report, and MLflow's UI on its runs.

    python docs/pictures.py outputs/lr_rank_sweep          (or: make pictures)

Needs Chromium. Starts MLflow's UI on a free port of this machine and ends it again, and clicks there as
a reader would: the assistant's pane closed, the trials unfolded. Every picture is reduced to a palette
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Browser, Page, TimeoutError, sync_playwright

IMAGES = Path(__file__).parent / "images"
MOST_BYTES = 150_000
COLOURS = (256, 128, 64, 32, 16)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
DESKTOP, WIDE, PHONE = (1280, 900), (1680, 1000), (390, 844)
CLOSE_ASSISTANT = "[data-component-id='mlflow.assistant.chat_panel.close']"
SETTLE_MS = 4_000
"""MLflow's table and charts are still drawn when its last request was answered."""
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
        pages = mlflow_pages(MlflowClient(store), arguments.study.name, root)
        shots |= {name: shoot_mlflow(browser, page) for name, page in pages.items()}
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


def shoot_mlflow(browser: Browser, url: str) -> bytes:
    """A page of MLflow's UI without the assistant that it opens beside it."""
    with opened(browser, WIDE) as page:
        page.goto(url, wait_until="networkidle")
        with suppress(TimeoutError):  # it is not on every page
            page.locator(CLOSE_ASSISTANT).first.click(timeout=SETTLE_MS)
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


def mlflow_pages(client: MlflowClient, study: str, root: str) -> dict[str, str]:
    """The UI's pages that show a study: its runs, a comparison, the parent run, a logged model."""
    experiments = [found.experiment_id for found in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`sweeper.study` = '{study}'")
    parent = next(run for run in runs if "sweeper.trial" not in run.data.tags)
    at = parent.info.experiment_id
    trials = [run for run in runs if "best/eval_loss" in run.data.metrics and run is not parent]
    trials.sort(key=lambda run: run.data.metrics["best/eval_loss"])
    compared = json.dumps([run.info.run_id for run in trials[:6]])
    models = client.search_logged_models([at], filter_string=f"tags.`sweeper.study` = '{study}'")
    experiment = f"{root}/#/experiments/{at}"
    lora = quote("tags.arm = 'lora'")  # without a filter the trials are folded up under the study
    table = f"{experiment}/runs?searchFilter={lora}"
    pages = {
        "mlflow_runs": table,
        "mlflow_charts": f"{table}&compareRunsMode=CHART",
        "mlflow_compare": f"{root}/#/compare-runs?runs={quote(compared)}"
        f"&experiments={quote(json.dumps([at]))}",
        "mlflow_parent": f"{experiment}/runs/{parent.info.run_id}",
    }
    if models:
        pages["mlflow_model"] = f"{experiment}/models/{models[0].model_id}"
    return pages


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
