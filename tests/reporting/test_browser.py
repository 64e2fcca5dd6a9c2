"""The page in a browser: no error with the network off, and nothing that axe-core calls serious."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from html import unescape
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from sweeper.core.paths import StudyFolder
from sweeper.reporting.html_page import PageStudy, page
from sweeper.reporting.report_evidence import ReportEvidence
from sweeper.reporting.results import StudyResults
from tests.reporting.browser import find_browser, open_offline
from tests.reporting.studies import make_arm, make_results, make_trial, two_arms
from tests.reporting.test_html_page import all_failed, curves, many

pytestmark = pytest.mark.slow  # a browser's start a page

AXE = "https://registry.npmjs.org/axe-core/-/axe-core-4.14.1.tgz"
AXE_SHA512 = (
    "1477dafa598d8d065f273d6af302aa203c02e83131707b7fa648cd41bd3d6b73"
    "4f8c22a0dab86ee6a6f64b8afbe804b214d36db85a2826965edfb3a0b9d546b5"
)
STUDIES = {
    "two arms": two_arms(4.05, 4.0),
    "many trials": many(200),
    "all failed": all_failed(),
    "one trial": make_results(make_arm("lora", [make_trial("lora", 0, "finished", 4.1)])),
}
RUN_AXE = """
<pre id="axe"></pre><script>
axe.run().then(found => document.getElementById("axe").textContent = JSON.stringify({
  violations: found.violations.map(v => ({id: v.id, impact: v.impact, nodes: v.nodes.map(n => n.html)})),
  dark: matchMedia("(prefers-color-scheme: dark)").matches, passes: found.passes.length}));
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    """Chromium's path."""
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core's script, pinned, from the npm registry."""
    try:
        with urlopen(AXE, timeout=30) as answer:
            archive = answer.read()
    except (URLError, TimeoutError) as error:
        pytest.skip(f"the npm registry cannot be reached: {error}")
    assert hashlib.sha512(archive).hexdigest() == AXE_SHA512
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        script = files.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


def _written(results: StudyResults, folder: Path) -> Path:
    evidence = curves(results) if results.arms[0].best is not None else ReportEvidence()
    path = folder / "report.html"
    text = page([PageStudy(results, StudyFolder(Path("outputs/mine")), evidence)])
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", STUDIES)
def test_page_opens_without_a_network_and_without_an_error(
    browser: str, name: str, tmp_path: Path
) -> None:
    """From disk: the console stays empty, and the script has made the leaderboards sortable."""
    opened = open_offline(browser, _written(STUDIES[name], tmp_path), tmp_path / "profile")
    assert opened.messages == ()
    heads = re.findall(r"<th[^>]*><button", opened.dom)
    assert len(heads) >= 6


def test_a_page_with_an_error_would_be_seen(browser: str, tmp_path: Path) -> None:
    """The check itself: what a script throws reaches the console, and is read there."""
    path = tmp_path / "broken.html"
    path.write_text("<script>nowhere()</script>")
    (message,) = open_offline(browser, path, tmp_path / "profile").messages
    assert "nowhere is not defined" in message


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 500], ids=["desktop", "phone"])
def test_axe_finds_nothing_serious(
    browser: str, axe: str, scheme: str, width: int, tmp_path: Path
) -> None:
    """All of axe-core's rules, contrast included, on a page with every kind of section."""
    path = _written(STUDIES["many trials"], tmp_path)
    text = path.read_text(encoding="utf-8")
    text = text.replace("<details>", "<details open>")  # what is folded away is judged too
    path.write_text(text.replace("</body>", f"<script>{axe}</script>{RUN_AXE}</body>"))
    opened = open_offline(browser, path, tmp_path / "profile", scheme, width)
    found = _axe_result(opened.dom)
    assert found["passes"] > 20
    assert found["dark"] == (scheme == "dark")
    serious = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
    assert serious == []


def _axe_result(dom: str) -> Any:
    told = re.search(r'<pre id="axe">(.*?)</pre>', dom, re.DOTALL)
    assert told is not None
    return json.loads(unescape(told[1]))
