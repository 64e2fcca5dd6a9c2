"""Using the winner: its experiment file, and the lines that load, serve and publish it.

Reads a trial's folder; loads no model.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sweeper.builtin import stand_ins
from sweeper.config.compose import read_yaml, to_yaml
from sweeper.config.settings import (
    EMBEDDED,
    LoraAdapter,
    TrialSettings,
    metric_words,
    trial_settings,
)
from sweeper.core.errors import StudyError
from sweeper.core.manifest import verify_manifest
from sweeper.core.paths import StudyFolder, TrialFolder
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult
from sweeper.reporting.text_table import point_words
from sweeper.reporting.verdict import label

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank (vllm/config/lora.py, MaxLoRARanks)."""


@dataclass(frozen=True)
class WinningTrial:
    """A trial that somebody wants to use."""

    study_name: str
    arm: ArmResult
    trial: TrialResult
    folder: TrialFolder

    @cached_property
    def settings(self) -> TrialSettings:
        """What it was trained with.

        Raises:
            StudyError: its folder is gone.
            ConfigError: it was written by a version with other settings.
        """
        path = self.folder.config
        if not path.exists():
            raise StudyError(f"{path}: no such file; the trial's folder was removed or moved")
        return trial_settings(read_yaml(path))

    @cached_property
    def artifact(self) -> Path:
        """Its adapter, or its weights.

        Raises:
            StudyError: it has none.
            ArtifactError: it is not what its manifest says.
        """
        if self.folder.artifact is None:
            raise StudyError(
                f"{self.folder.path} holds neither adapter/ nor model/: they were removed when the "
                "study ended (hydra.sweeper.retention.adapters=null keeps all), or were never stored; "
                f"train them again with: sweeper trial {self.folder.path} --into FOLDER"
            )
        verify_manifest(self.folder.artifact)
        return self.folder.artifact

    @property
    def words(self) -> str:
        """Which trial it is, and how good."""
        loss = (
            ""
            if self.trial.value is None
            else f", {metric_words(self.arm.objective.metric)} {self.trial.value:.4f}"
        )
        point = point_words(self.trial.point)
        return f"{label(self.arm)} of {self.study_name}: trial {self.trial.number}{loss} ({point})"


def find_winner(
    results: StudyResults, folder: StudyFolder, arm: str | None = None, number: int | None = None
) -> WinningTrial:
    """The best trial of an arm, or the trial of a number.

    Args:
        results: the study.
        folder: the study's.
        arm: its name; the first one without.
        number: of the trial; the best one without.

    Raises:
        StudyError: there is no such arm or trial; lists those that exist.
    """
    arms = {found.name: found for found in results.arms}
    name = arm or results.arms[0].name
    if name not in arms:
        raise StudyError(f"--arm {name}: no such arm; arms: {', '.join(arms)}")
    found = arms[name]
    if number is None:
        trial = found.best
        reason = f"arm {name} has no finished trial; see `sweeper report {results.study_name}`"
    else:
        trial = next((trial for trial in found.trials if trial.number == number), None)
        numbers = ", ".join(str(n) for n in sorted(trial.number for trial in found.trials))
        reason = f"--trial {number}: no such trial in arm {name}; trials: {numbers}"
    if trial is None:
        raise StudyError(reason)
    return WinningTrial(results.study_name, found, trial, folder.trial(name, trial.number))


def experiment_yaml(winner: WinningTrial) -> str:
    """The trial's whole configuration as conf/experiment/best.yaml."""
    head = (
        "# @package _global_\n"
        f"# {winner.words}.\n"
        "# Saved as conf/experiment/best.yaml it is trained again by\n"
        "#   python -m sweeper +experiment=best\n"
    )
    return head + to_yaml(winner.settings.model_dump(mode="json"))


def usage(winner: WinningTrial) -> str:
    """How to load, ask, serve, merge and publish it, as text for a terminal."""
    path = winner.artifact.as_posix()
    parts = [winner.words, f"in {path}", _loading(winner, path)]
    name = winner.study_name
    which = f"{name} --arm {winner.arm.name} --trial {winner.trial.number}"
    if isinstance(winner.settings.adapter, LoraAdapter):
        parts += [
            f"Ask        python -m sweeper generate {shlex.quote(path)} --prompt 'Your prompt'",
            f"Serve      {_serving(winner, path)}",
            f"Merge      python -m sweeper best {which} --merge merged",
        ]
    else:
        parts.append(f"Serve      vllm serve {shlex.quote(path)}")
    return "\n\n".join(
        [
            *parts,
            f"Publish    hf upload YOUR_NAME/{name} {shlex.quote(path)}",
            f"Again      python -m sweeper best {which} --yaml > conf/experiment/best.yaml\n"
            "           python -m sweeper +experiment=best",
        ]
    )


def base_name(settings: TrialSettings) -> str:
    """What other programs load the base by: a hub id or a folder."""
    name = settings.model.base_model
    if name != EMBEDDED and not name.startswith(stand_ins.PREFIX):
        return name
    from sweeper.modeling.model_source import find_source

    return find_source(settings.model).folder.as_posix()


def _loading(winner: WinningTrial, path: str) -> str:
    """Plain transformers and PEFT: nothing of this program is needed."""
    if not isinstance(winner.settings.adapter, LoraAdapter):
        return (
            "    from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"    model = AutoModelForCausalLM.from_pretrained({path!r})\n"
            f"    tokenizer = AutoTokenizer.from_pretrained({path!r})"
        )
    revision = winner.settings.model.revision
    pinned = "" if revision is None else f", revision={revision!r}"
    return (
        "    from peft import PeftModel\n"
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"    base = AutoModelForCausalLM.from_pretrained({base_name(winner.settings)!r}{pinned})\n"
        f"    model = PeftModel.from_pretrained(base, {path!r})\n"
        f"    tokenizer = AutoTokenizer.from_pretrained({path!r})"
    )


def _serving(winner: WinningTrial, path: str) -> str:
    """vLLM's line, or why vLLM has to be given the merged model."""
    adapter = winner.settings.adapter
    assert isinstance(adapter, LoraAdapter)
    largest = max(adapter.rank, *adapter.rank_pattern.values(), 0)
    rank = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    reasons = {
        "DoRA": adapter.use_dora,
        "trained biases": adapter.bias != "none",
        "modules_to_save": bool(adapter.modules_to_save),
        f"ranks above {VLLM_RANKS[-1]}": rank is None,
    }
    refused = [reason for reason, holds in reasons.items() if holds]
    if refused:
        return (
            f"vllm serve merged    (after Merge below: vLLM serves no {' and no '.join(refused)})"
        )
    return (
        f"vllm serve {shlex.quote(base_name(winner.settings))} --enable-lora "
        f"--max-lora-rank {rank} --lora-modules {winner.study_name}={shlex.quote(path)}"
    )
