"""The winner of a study: its experiment file, and the commands that load, serve and publish it.

The module reads a trial's folder and loads no model.
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
    stored_settings,
)
from sweeper.core.errors import StudyError
from sweeper.core.manifest import verify_manifest
from sweeper.core.paths import StudyFolder, TrialFolder
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult
from sweeper.reporting.text_table import point_words
from sweeper.reporting.verdict_doubts import label

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts as --max-lora-rank (vllm/config/lora.py, MaxLoRARanks)."""


@dataclass(frozen=True)
class WinningTrial:
    """A trial that was chosen for use: the best one of an arm, or one chosen by number."""

    study_name: str
    arm: ArmResult
    trial: TrialResult
    folder: TrialFolder

    @cached_property
    def settings(self) -> TrialSettings:
        """Settings that the trial was trained with.

        Raises:
            StudyError: the trial's folder is gone.
            ConfigError: the file was written by a version with other settings.
        """
        path = self.folder.config
        if not path.exists():
            raise StudyError(f"{path} does not exist. The trial's folder was removed or moved.")
        return stored_settings(read_yaml(path))

    @cached_property
    def artifact(self) -> Path:
        """Folder of the adapter, or of the weights after full fine-tuning.

        Raises:
            StudyError: nothing is stored.
            ArtifactError: the files differ from their manifest.
        """
        if self.folder.artifact is None:
            raise StudyError(
                f"{self.folder.path} holds neither adapter/ nor model/. The weights were removed when "
                "the study ended (hydra.sweeper.retention.adapters=null keeps all) or never stored. "
                f"Train the trial again: sweeper trial {self.folder.path} --into FOLDER"
            )
        # A damaged adapter would load without an error and answer badly.
        verify_manifest(self.folder.artifact)
        return self.folder.artifact

    @property
    def words(self) -> str:
        """The trial, its value and its searched settings in one line."""
        loss = (
            ""
            if self.trial.value is None
            else f", {metric_words(self.arm.objective.metric)} {self.trial.value:.4f}"
        )
        point = point_words(self.trial.params)
        return f"{label(self.arm)} of {self.study_name}: trial {self.trial.number}{loss} ({point})"


def find_winner(
    results: StudyResults, folder: StudyFolder, arm: str | None = None, number: int | None = None
) -> WinningTrial:
    """Return the best trial of an arm, or the trial with a given number.

    Args:
        results: the study.
        folder: the study's folder.
        arm: name of the arm. None is the first one.
        number: number of the trial. None is the best one.

    Raises:
        StudyError: there is no such arm or trial. The message lists those that exist.
    """
    arms = {found.name: found for found in results.arms}
    name = arm or results.arms[0].name
    if name not in arms:
        raise StudyError(f"--arm {name}: no such arm. Known arms: {', '.join(arms)}")
    found = arms[name]
    if number is None:
        trial = found.best
        reason = f"arm {name} has no finished trial. See: sweeper report {results.study_name}"
    else:
        trial = next((trial for trial in found.trials if trial.number == number), None)
        numbers = ", ".join(str(n) for n in sorted(trial.number for trial in found.trials))
        reason = f"--trial {number}: no such trial in arm {name}. Known trials: {numbers}"
    if trial is None:
        raise StudyError(reason)
    return WinningTrial(results.study_name, found, trial, folder.trial(name, trial.number))


def experiment_yaml(winner: WinningTrial) -> str:
    """Return the trial's whole configuration as the text of conf/experiment/best.yaml."""
    # The file holds every value: a difference from today's defaults would change with the next default.
    head = (
        "# @package _global_\n"
        f"# {winner.words}.\n"
        "# Save this file as conf/experiment/best.yaml and train the configuration again with\n"
        "#   python -m sweeper +experiment=best\n"
    )
    return head + to_yaml(winner.settings.model_dump(mode="json"))


def usage(winner: WinningTrial) -> str:
    """Return the commands that load, prompt, serve, merge, publish and retrain the winner."""
    path = winner.artifact.as_posix()
    parts = [winner.words, f"in {path}", _loading(winner, path)]
    name = winner.study_name
    # The trial is named, so that the command still means it after further trials.
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
            f"Retrain    python -m sweeper best {which} --yaml > conf/experiment/best.yaml\n"
            "           python -m sweeper +experiment=best",
        ]
    )


def base_name(settings: TrialSettings) -> str:
    """Return the name by which other programs load the base: a hub id or a folder."""
    # The embedded base and stand-ins have no hub id, so their local folder is named.
    name = settings.model.base_model
    if name != EMBEDDED and not name.startswith(stand_ins.PREFIX):
        return name
    from sweeper.modeling.model_source import find_source

    return find_source(settings.model).folder.as_posix()


def _loading(winner: WinningTrial, path: str) -> str:
    """Return Python code that loads the winner with plain transformers and PEFT."""
    if not isinstance(winner.settings.adapter, LoraAdapter):
        return (
            "    from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"    model = AutoModelForCausalLM.from_pretrained({path!r})\n"
            f"    tokenizer = AutoTokenizer.from_pretrained({path!r})"
        )
    # An adapter fits only the weights that it was trained on.
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
    """Return vLLM's command for the adapter, or for the merged model with the reason."""
    adapter = winner.settings.adapter
    assert isinstance(adapter, LoraAdapter)
    # rank_pattern may give single modules a higher rank than r.
    largest = max(adapter.rank, *adapter.rank_pattern.values(), 0)
    rank = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    # vLLM loads plain LoRA weights only.
    reasons = {
        "DoRA": adapter.use_dora,
        "trained biases": adapter.bias != "none",
        "modules_to_save": bool(adapter.modules_to_save),
        f"ranks above {VLLM_RANKS[-1]}": rank is None,
    }
    unsupported = [reason for reason, holds in reasons.items() if holds]
    if unsupported:
        return (
            f"vllm serve merged    (after Merge below, vLLM serves no {' or '.join(unsupported)})"
        )
    return (
        f"vllm serve {shlex.quote(base_name(winner.settings))} --enable-lora "
        f"--max-lora-rank {rank} --lora-modules {winner.study_name}={shlex.quote(path)}"
    )
