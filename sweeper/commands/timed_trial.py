"""Shorten a trial to what its forecast needs, and scale what was timed to the whole trial.

A shortened trial takes a few steps. Each of its looks judges a few rows and writes a few short answers.
The seconds of whole splits follow by tokens, and those of all answers from the lengths of the
references.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from sweeper.config.settings import ROUGE_METRICS, LoraAdapter, Objective, TrialSettings
from sweeper.core.outcome import ANSWER_RATE, ANSWERING_SECONDS
from sweeper.data.tokens import TokenizerSetup, Tokens
from sweeper.evaluation.generation import batch_tokens
from sweeper.evaluation.judge import draw_rows
from sweeper.modeling.adapter import touches_base
from sweeper.training.prepared_data import PreparedData
from sweeper.training.schedule import TrialSchedule
from sweeper.training.trial_costs import Stage

STEPS = 6
"""Steps that are taken at most. The first one is much slower than the others, and is not timed."""
LOOK_EVERY = 2
"""Steps between two looks. After a look the timing may end."""
JUDGED_BATCHES = 2
"""Batches of rows that a look judges."""
WRITTEN_TOKENS = 16
"""Tokens that each of a few answers has, from which the time of longer ones follows."""
STAGES = get_args(Stage)


@dataclass(frozen=True)
class TimedTrial:
    """A trial of a few steps, with the data that it shares with the trial that is forecast."""

    settings: TrialSettings
    prepared: PreparedData
    schedule: TrialSchedule

    @property
    def answers(self) -> int:
        """Number of answers that are written at a look, as many as are written together."""
        generation = self.settings.evaluation.generation
        wanted = max(generation.num_examples, len(self.settings.evaluation.prompts))
        return min(wanted, generation.batch_size) if self.prepared.held_out else 0

    @property
    def written_tokens(self) -> int:
        """Tokens of each of these answers, if it does not end before."""
        return min(WRITTEN_TOKENS, self.settings.evaluation.generation.max_new_tokens)

    @property
    def shortened(self) -> TrialSettings:
        """The trial with a few steps, looks at a few rows, and a few short answers at each look."""
        settings, answers = self.settings, self.answers
        training = settings.training.model_copy(
            update={
                "max_steps": STEPS + 1,  # the clock ends the trial before
                "eval_steps": float(LOOK_EVERY),
                "eval_delay": 0.0,
                "save_steps": None,
                "logging_steps": STEPS,
                "warmup_steps": None,
                "warmup_ratio": 0.0,
                "early_stopping_patience": None,
                "divergence_threshold": None,
            }
        )
        generation = settings.evaluation.generation
        evaluation = settings.evaluation.model_copy(
            update={
                "look_rows": self._look_rows,
                "prompts": [],
                "metrics": {},
                "generation": generation.model_copy(
                    update={"num_examples": answers, "max_new_tokens": self.written_tokens}
                ),
            }
        )
        # A look writes answers only if the objective needs them
        objective = Objective(metric="eval/rougeL", direction="maximize", pruning_metric=None)
        if not answers:
            objective = Objective(metric="eval/loss", direction="minimize", pruning_metric=None)
        artifacts = settings.artifacts.model_copy(update={"merged": False, "zip": False})
        return settings.model_copy(
            update={
                "training": training,
                "evaluation": evaluation,
                "objective": objective,
                "artifacts": artifacts,
            }
        )

    @property
    def _look_rows(self) -> int:
        return JUDGED_BATCHES * self.settings.evaluation.per_device_eval_batch_size

    @property
    def look_tokens(self) -> float:
        """Tokens of the rows that a look of the shortened trial judges."""
        rows = self.prepared.validation.rows
        if self.settings.data.group_by is not None:
            return _tokens(rows) * min(1.0, self._look_rows / len(rows))
        drawn = draw_rows(len(rows), (), self._look_rows, self.settings.data.split_seed)
        return _tokens([rows[index] for index in drawn])

    @property
    def reference_tokens(self) -> int:
        """Tokens that follow one another in all batches of answers, if answers are like references."""
        prompts, generation = self.prepared.held_out, self.settings.evaluation.generation
        drawn = prompts and prompts.sample(generation.num_examples, self.settings.data.split_seed)
        if not drawn:
            return 0
        setup, most = TokenizerSetup(self.prepared.tokenizer), generation.max_new_tokens
        # the token that ends the answer counts too
        lengths = [min(len(setup.ids(text)) + 1, most) for text in drawn.references]
        return batch_tokens(drawn.prompt_ids, lengths, generation.batch_size)

    @property
    def longest_tokens(self) -> int:
        """The same if each answer is cut at the limit, as an untuned model's is that does not end it."""
        generation = self.settings.evaluation.generation
        batches = math.ceil(generation.num_examples / generation.batch_size)
        return batches * generation.max_new_tokens if self.prepared.held_out else 0

    @property
    def prompt_tokens(self) -> int:
        """The same of the qualitative prompts, whose answers have no references."""
        generation = self.settings.evaluation.generation
        batches = math.ceil(len(self.settings.evaluation.prompts) / generation.batch_size)
        return batches * generation.max_new_tokens

    @cached_property
    def general(self) -> Sequence[Tokens]:
        """The windows of general text, or none.

        Raises:
            DataError: the general text cannot be used.
        """
        wanted = self.settings.evaluation.general_text.source is not None
        return self.prepared.general_rows(self.settings) if wanted else ()

    def seconds(
        self, metrics: Mapping[str, float], spool: Sequence[Mapping[str, Any]], step_s: float
    ) -> dict[str, float]:
        """Return the seconds of each part of the trial and of its judgements, by field of TrialTiming.

        Args:
            metrics: the outcome of the shortened trial.
            spool: its observations.
            step_s: seconds of one of its steps.
        """
        spent = {name: metrics[f"cost/{name}_seconds"] for name in STAGES}
        looks = sum("eval/loss" in row for row in spool)
        # what is no stage: the check of the trial, and that of its base
        other_s = metrics["cost/seconds"] - math.fsum(spent.values())
        setup_s = spent["train"] - LOOK_EVERY * looks * step_s
        checkpoints = math.ceil(self.schedule.total_steps / self.schedule.save_every)
        return {
            **JudgingSeconds.of(self, spent["eval"], spool).parts(self),
            "step_s": step_s,
            "setup_s": max(0.0, setup_s) + max(0.0, other_s),
            # each checkpoint and the artifact hold the same weights
            "save_s": (checkpoints + 1) * spent["save"] / (looks + 1),
            # a trial that changes the weights of its base leaves none for the next one
            "load_s": spent["load"] if touches_base(self.settings.adapter) else 0.0,
            "start_s": spent["load"] + spent["data"],
            "need_mib": metrics["cost/peak_memory_mib"],
        }


@dataclass(frozen=True)
class JudgingSeconds:
    """Seconds of judging a token of a row, and of the next token of all answers of a batch."""

    token_s: float
    next_token_s: float

    @classmethod
    def of(
        cls, timed: TimedTrial, judging_s: float, spool: Sequence[Mapping[str, Any]]
    ) -> JudgingSeconds:
        """Return what the looks of a shortened trial took.

        Args:
            timed: the trial.
            judging_s: seconds of all looks.
            spool: observations of the shortened trial, with the seconds and the speed of its answers.
        """
        looks = [row for row in spool if "eval/loss" in row]
        writing_s = math.fsum(row.get(ANSWERING_SECONDS, 0.0) for row in looks)
        return cls(
            token_s=max(0.0, judging_s - writing_s) / (len(looks) * timed.look_tokens),
            next_token_s=min((_next_token_s(look, timed) for look in looks), default=0.0),
        )

    def parts(self, timed: TimedTrial) -> dict[str, float]:
        """Return the seconds of each judgement in the study of a trial, by field of TrialTiming."""
        settings, prepared = timed.settings, timed.prepared
        evaluation, rows = settings.evaluation, prepared.validation.rows
        validation_s = self.token_s * _tokens(rows)
        answers_s = self.next_token_s * timed.reference_tokens
        generated = settings.objective.is_costly
        share = min(1.0, (evaluation.look_rows or len(rows)) / len(rows))
        merged = settings.artifacts.merged and isinstance(settings.adapter, LoraAdapter)
        # The last look is the judgement if it was at the whole split
        judgements = (0 if share == 1.0 else 1) + merged
        answered = (0 if share == 1.0 and generated else 1) + merged
        prompts_s = self.next_token_s * timed.prompt_tokens
        tested = () if prepared.test is None else prepared.test.rows
        scored_s = answers_s if settings.objective.metric in ROUGE_METRICS else 0.0
        return {
            "row_s": validation_s / len(rows),
            "look_s": share * validation_s + (answers_s if generated else 0.0),
            "judgement_s": judgements * validation_s,
            "answers_s": answered * answers_s + prompts_s,
            "untuned_s": validation_s + self.next_token_s * timed.longest_tokens + prompts_s,
            "test_s": self.token_s * _tokens(tested) + (scored_s if tested else 0.0),
            "general_s": self.token_s * _tokens(timed.general),
        }


def _next_token_s(look: Mapping[str, Any], timed: TimedTrial) -> float:
    """Return the seconds of the next token of all answers of a look, or 0 without answers."""
    if not look.get(ANSWERING_SECONDS):
        return 0.0
    mean = look[ANSWERING_SECONDS] * look[ANSWER_RATE] / timed.answers
    # The batch had as many tokens as a cut answer. Without one, its longest answer is not known
    longest = timed.written_tokens if look["eval/response_limit_share"] else mean
    return float(look[ANSWERING_SECONDS] / longest)


def _tokens(rows: Sequence[Tokens]) -> int:
    return sum(len(row["input_ids"]) for row in rows)
