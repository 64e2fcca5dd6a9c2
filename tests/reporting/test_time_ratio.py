"""Times of two arms: compared only where the machine's load cannot have made the difference."""

from __future__ import annotations

import pytest

from sweeper.core.outcome import Outcome
from sweeper.reporting.finalist_results import FinalistRanking, FinalistResult, SeedRepeat
from sweeper.reporting.results import ArmResult
from sweeper.reporting.time_ratio import time_ratio
from sweeper.reporting.verdict import judge
from tests.reporting.studies import FACTS, LORA_COSTS, make_arm, make_results, make_trial

CPU = FACTS.model_copy(update={"device": "some CPU, 2 threads"})
GPU = FACTS.model_copy(update={"device": "some GPU"})
Times = list[tuple[float, float]]
"""Wall and CPU seconds of each fresh seed."""


def _outcome(wall: float, cpu: float) -> Outcome:
    costs = {"cost/seconds": wall, "cost/cpu_seconds": cpu}
    return Outcome(cause="finished", best_value=4.0, metrics={**LORA_COSTS, **costs})


def _arm(name: str, searched: Times, fresh: Times, *, gpu: bool = False) -> ArmResult:
    outcomes = [_outcome(*times) for times in searched]
    trials = [
        make_trial(name, n, "finished", 4.0).model_copy(update={"outcome": outcome})
        for n, outcome in enumerate(outcomes)
    ]
    method = "QLoRA" if name == "lora" else "full fine-tuning"
    arm = make_arm(name, trials, method, rates=(1e-4, 1e-2), facts=GPU if gpu else CPU)
    own = (SeedRepeat(seed=0, outcome=outcomes[0]),)
    judged = tuple(SeedRepeat(seed=1 + n, outcome=_outcome(*t)) for n, t in enumerate(fresh))
    final = FinalistRanking(
        finalists=(FinalistResult(number=0, repeats=own),), winner=0, judged=judged
    )
    return arm.model_copy(update={"final": final})


def test_a_loaded_machine_does_not_change_a_ratio_of_cpu_seconds() -> None:
    """Five times the wall time beside another program, and the same CPU time: 1.15 in either case."""
    quiet = [(10.0, 11.4), (10.0, 11.5), (10.0, 11.6)]
    loaded = [(50.0, 11.4), (51.0, 11.5), (50.0, 11.6)]
    full = _arm("full", [(10.0, 10.0)], [(10.0, 9.95), (10.0, 10.0), (10.0, 10.05)])
    found = [time_ratio(_arm("lora", times[:1], times), full) for times in (quiet, loaded)]
    for ratio in found:
        assert ratio is not None
        assert ratio.value == pytest.approx(1.15, rel=0.01)
        assert ratio.low is not None
        assert ratio.low < 1.15 < (ratio.high or 0)


def test_alternating_seeds_cancel_the_load_of_a_gpu() -> None:
    """The load triples from one pair to the next: each pair tells 2, and its interval is narrow."""
    lora = _arm("lora", [(9.0, 1.0)], [(20.0, 1.0), (61.0, 1.0), (180.0, 1.0)], gpu=True)
    full = _arm("full", [(1.0, 1.0)], [(10.0, 1.0), (30.0, 1.0), (91.0, 1.0)], gpu=True)
    ratio = time_ratio(lora, full)
    assert ratio is not None
    assert ratio.value == pytest.approx(2.0, rel=0.02)
    assert (ratio.high or 9.0) < 2.2


def test_a_ratio_within_its_spread_is_not_told() -> None:
    """1.3, 0.8 and 1.1 are one, and no figure of times is in the words."""
    lora = _arm("lora", [(1.0, 1.0)], [(13.0, 13.0), (8.0, 8.0), (11.0, 11.0)])
    full = _arm("full", [(1.0, 1.0)], [(10.0, 10.0)] * 3)
    assert time_ratio(lora, full) is None
    assert "time" not in judge(make_results(lora, full)).words


def test_arms_that_ran_one_after_the_other_have_no_ratio_on_a_gpu() -> None:
    """Searches meet different loads. On CPUs their CPU seconds compare."""
    searched: tuple[Times, Times] = ([(20.0, 20.0), (21.0, 21.0)], [(10.0, 10.0), (10.1, 10.1)])
    gpu = [_arm(name, times, [], gpu=True) for name, times in zip("lf", searched, strict=True)]
    assert time_ratio(gpu[0], gpu[1]) is None
    cpu = [_arm(name, times, []) for name, times in zip("lf", searched, strict=True)]
    ratio = time_ratio(cpu[0], cpu[1])
    assert ratio is not None
    assert ratio.value == pytest.approx(2.04, rel=0.01)


def test_words_give_the_ratio_with_its_spread_and_no_memory_on_a_cpu() -> None:
    """The peak on a CPU is the whole process, mostly at rest, so no share of it is told."""
    fresh = [(20.0, 20.0), (20.2, 20.2), (19.8, 19.8)]
    lora = _arm("lora", [(1.0, 1.0)], fresh)
    full = _arm("full", [(1.0, 1.0)], [(10.0, 10.0)] * 3)
    words = judge(make_results(lora, full)).words
    assert "takes 2× (95 % interval 1.95 to 2.05) the CPU time of a training" in words
    assert "memory" not in words
    gpus = (_arm(name, [(1.0, 1.0)], fresh, gpu=True) for name in ("lora", "full"))
    assert "1× the peak memory" in judge(make_results(*gpus)).words
