"""What to try next: each step follows from the figures, and its command is one that can be typed."""

from __future__ import annotations

import shlex

import pytest

from sweeper.reporting.next_steps import next_steps
from sweeper.reporting.report_evidence import ReportEvidence
from sweeper.reporting.results import ArmResult, StudyResults
from sweeper.search.study_plan import studies
from tests.reporting.studies import LORA_COSTS, RATE, make_arm, make_results, make_trial

COMMAND = "+experiment=lr_rank_sweep -m"


def ranks(*losses: float, deviation: float = 0.001) -> StudyResults:
    """Three trials for each rank 2, 4, 8, … that differ by about the given deviation."""
    trials = [
        make_trial(
            *("lora", 3 * n + k, "finished", loss + (k - 1) * deviation, LORA_COSTS),
            learning_rate=1e-3,
            r=2 ** (n + 1),
        )
        for n, loss in enumerate(losses)
        for k in range(3)
    ]
    return make_results(make_arm("lora", trials)).model_copy(update={"command": COMMAND})


def _reasons(results: StudyResults, evidence: ReportEvidence | None = None) -> str:
    return "\n".join(step.reason for step in next_steps(results, evidence or ReportEvidence()))


def _alone(cause: str = "finished", name: str = "lora", **metrics: float) -> ArmResult:
    method = "QLoRA" if name == "lora" else "full fine-tuning"
    named = {key.replace("__", "/"): value for key, value in metrics.items()}
    loss = 4.0 if cause == "finished" else None
    return make_arm(name, [make_trial(name, 0, cause, loss, {**LORA_COSTS, **named})], method)


def test_largest_rank_is_best() -> None:
    """The search goes on above the largest rank, and only there, by a difference with an interval."""
    step = next_steps(ranks(4.2, 4.1, 4.0), ReportEvidence())[0]
    assert "r=8 is the largest rank that was tried, and better than r=4 by 0.1000 nats (95 %" in (
        step.reason
    )
    assert "choice(4, 8, 16, 32)" in step.command
    assert "largest" not in _reasons(ranks(4.0, 4.1, 4.2))


def test_no_rank_is_recommended_within_chance() -> None:
    """A rank within the spread of the others is not shown to be better, and is no advice."""
    reasons = _reasons(ranks(4.2, 4.001, 4.0, deviation=0.01))
    assert "r=4" not in reasons
    assert "use it" not in reasons
    assert "largest" not in reasons


@pytest.mark.parametrize(("name", "key"), [("lora", "lora_dropout"), ("full", "num_train_epochs")])
def test_gap_between_training_and_evaluation(name: str, key: str) -> None:
    """A gap above a quarter of the gain (0.5 nats) asks for dropout, or for fewer epochs."""
    arm = _alone(name=name, best__eval_minus_train_loss=0.2)
    settings = {**arm.settings, "training.num_train_epochs": 2.0}
    results = make_results(arm.model_copy(update={"settings": settings})).model_copy(
        update={"command": COMMAND}
    )
    assert any(key in step.command for step in next_steps(results, ReportEvidence()))
    quiet = make_results(_alone(name=name, best__eval_minus_train_loss=0.1))
    assert "memorised" not in _reasons(quiet)


def test_length_of_a_trial() -> None:
    """A curve that still falls asks for more steps; one that was flat early for fewer."""
    results = make_results(_alone())
    falling = ReportEvidence({("lora", 0): ((16, 4.3), (32, 4.2), (64, 4.0))})
    assert "training.max_steps=128" in next_steps(results, falling)[0].command
    flat = ReportEvidence({("lora", 0): ((16, 4.005), (32, 4.001), (64, 4.0))})
    assert "training.max_steps=16" in next_steps(results, flat)[0].command


def test_memory() -> None:
    """Many trials out of memory ask for recomputed activations, also where nothing finished."""
    step = next_steps(make_results(_alone("oom")), ReportEvidence())[0]
    assert "activation_checkpointing=true" in step.command


def test_nothing_to_say() -> None:
    """Without a hint the best is trained with another seed; without a result nothing is said."""
    steps = next_steps(make_results(_alone()), ReportEvidence())
    assert len(steps) == 1
    assert "seed=1" in steps[0].command
    assert next_steps(make_results(make_arm("lora", [])), ReportEvidence()) == []


def _commanded(arm: ArmResult) -> StudyResults:
    return make_results(arm).model_copy(update={"command": COMMAND})


@pytest.mark.parametrize(
    ("results", "suffix"),
    [
        (ranks(4.2, 4.1, 4.0), "ranks"),
        (_commanded(_alone(best__eval_minus_train_loss=0.2)), "dropout"),
        (_commanded(_alone("oom")), "memory"),
        (
            _commanded(
                make_arm("lora", [make_trial("lora", 0, "finished", 4.0)], rates=(1e-3, 1e-1))
            ),
            "wider",
        ),
    ],
    ids=["ranks", "gap", "memory", "edge"],
)
def test_commands_are_studies_under_a_new_name(results: StudyResults, suffix: str) -> None:
    """What is proposed composes into a valid plan, and resumes no study that asks another question."""
    (step,) = next_steps(results, ReportEvidence())
    words = shlex.split(step.command)
    assert words[:3] == ["python", "-m", "sweeper"]
    plan = studies([word for word in words[3:] if word != "-m"])[0]
    assert plan.study.study_name == f"mine_{suffix}"
    assert RATE in plan.arms[0].space
