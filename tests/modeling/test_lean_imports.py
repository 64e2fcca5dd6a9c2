"""What a worker imports, and what it leaves out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from sweeper.modeling.lean_imports import compile_at_first_call, lean_imports

IN_A_WORKER = """
import json, sys
from pathlib import Path
from sweeper.config.settings import WorkerSettings
from sweeper.workers.worker import WorkerResources, make_runner

make_runner(WorkerSettings.model_construct(trainer="transformers"), 0, 1, WorkerResources(Path("log")))
import torch, transformers.utils
from scipy.optimize import linear_sum_assignment  # an import after the block finds the library
assert torch.compile.__module__ == "torch"
assert transformers.utils.is_datasets_available() and transformers.utils.is_scipy_available()
print(sorted({"datasets", "pandas", "torch._inductor.compile_fx"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_a_worker_imports_no_library_that_no_trial_calls() -> None:
    """A worker's imports load no datasets, no pandas and no compiler, and hide nothing afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_WORKER], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_function_is_compiled_at_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles a function once, with its options, when it is first called."""
    seen: list[dict[str, Any]] = []

    def compiler(function: Any, **options: Any) -> Any:
        seen.append(options)
        return lambda value: function(value) + 1

    monkeypatch.setattr(torch, "compile", compiler)
    plain = compile_at_first_call(abs)
    optioned = compile_at_first_call(dynamic=False)(abs)
    assert seen == []
    assert [plain(-3), plain(-4), optioned(-5)] == [4, 5, 6]
    assert seen == [{}, {"dynamic": False}]


def test_an_interrupted_import_leaves_torch_as_it_was() -> None:
    """The block puts torch's functions back when an import fails."""
    compile_of_torch = torch.compile
    with lean_imports():
        assert torch.compile is compile_at_first_call
    with pytest.raises(ImportError), lean_imports():
        raise ImportError
    assert torch.compile is compile_of_torch
