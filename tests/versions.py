"""Run the tests at both ends of the version ranges in pyproject.toml.

    python -m tests.versions                        # both ends, the fast tests of the subset below
    python -m tests.versions lowest tests/search    # one end, other tests
    python -m tests.versions --python python3.13 --without-torch highest

Each end gets a virtual environment under .venv-versions/, which is kept and completed by the next run.
torch stays at the version in constraints.txt: other builds of it are downloads of gigabytes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENDS = ("lowest", "highest")
EARLY = ("hydra-core==1.4.0rc3",)
"""Release candidates that the highest end installs, because the next release will be like them."""
OF_TORCH = ("torch", "accelerate", "peft", "bitsandbytes")
"""Requirements that are left out without torch, because they bring it along."""
TEST_TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "pillow")
TESTS = (
    *(
        "tests/config",
        "tests/search",
        "tests/config/test_space.py",
        "tests/cli/test_command_line.py",
    ),
    *("tests/config/test_conf.py", "tests/test_lists.py", "tests/config/test_allow_list.py"),
    *("tests/commands/test_dry_run.py", "tests/test_sweep.py", "tests/reporting", "tests/tracking"),
    *("tests/data", "tests/modeling", "tests/evaluation", "tests/training"),
    "--ignore=tests/reporting/test_browser.py",  # pinned to Chromium, not to a range
)
"""What is run by default: every library of the ranges is used by one of them."""
WITHOUT_TORCH = (
    *("tests/config/test_space.py", "tests/test_lists.py", "tests/test_architecture.py"),
    *(
        "tests/core/test_redaction.py",
        "tests/core/test_paths.py",
        "tests/config/test_yaml_bounds.py",
    ),
    *("tests/search/test_samplers.py", "tests/search/test_states.py", "tests/reporting"),
    *("tests/config", "--ignore=tests/reporting/test_browser.py"),
    *("-k", "not gp"),  # Optuna's Gaussian process draws with torch
)
"""What is run by default where torch is not installed."""


def requirements() -> list[str]:
    """Return the requirements of pyproject.toml, and those of its extra `postgres`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["postgres"]]


def name_of(requirement: str) -> str:
    """Return the package's name, without extras and versions."""
    return re.split(r"[\[<>=~! ]", requirement)[0]


def lowest(requirement: str) -> str:
    """Return a requirement pinned to the lower end of its range."""
    (bound,) = re.findall(r">=([\w.]+)", requirement)
    return f"{requirement.split('>=')[0]}=={bound}"


def at_end(end: str) -> list[str]:
    """Return what one end installs beside torch."""
    early = {name_of(requirement): requirement for requirement in EARLY}
    found = [text for text in requirements() if name_of(text) != "torch"]
    if end == "lowest":
        return [lowest(text) for text in found]
    return [early.get(name_of(text), text) for text in found]


def pinned_torch() -> str:
    """Return torch as constraints.txt pins it."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line.startswith("torch=="))


def prepare(end: str, python: str, with_torch: bool) -> Path:
    """Make the environment of one end, or complete it, and return its Python."""
    version = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    folder = ROOT / ".venv-versions" / f"{end}-{version}{'' if with_torch else '-without-torch'}"
    own = folder / "bin" / "python"
    if not own.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [str(own), "-m", "pip", "install", "--quiet"]
    wanted = [*at_end(end), *TEST_TOOLS]
    if with_torch:
        subprocess.run([*pip, pinned_torch()], check=True)  # first, so that no other is resolved
        wanted.append(pinned_torch())
    else:
        wanted = [text for text in wanted if name_of(text) not in OF_TORCH]
    subprocess.run([*pip, "--upgrade", *wanted], check=True)
    return own


def main(arguments: Sequence[str]) -> int:
    """Return 0 if the tests pass at every end that was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument("words", nargs="*", help="lowest, highest, and arguments for pytest")
    given, options = parser.parse_known_args(arguments)
    ends = [word for word in given.words if word in ENDS] or list(ENDS)
    tests = [*(word for word in given.words if word not in ENDS), *options]
    tests = tests or list(WITHOUT_TORCH if given.without_torch else TESTS)
    failed = []
    for end in ends:
        python = prepare(end, given.python, not given.without_torch)
        print(f"== {end}: {python}", flush=True)
        result = subprocess.run(
            [str(python), "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        failed += [end] if result.returncode else []
    print(f"failed: {', '.join(failed)}" if failed else f"passed: {', '.join(ends)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
