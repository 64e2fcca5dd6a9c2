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
from sweeper.core.loading_code import BaseLines, loading_code, prompting_code
from sweeper.core.manifest import verify_manifest
from sweeper.core.paths import StudyFolder, TrialFolder
from sweeper.core.stored_files import read_words
from sweeper.core.trained_form import TrainedForm, read_trained_form
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult
from sweeper.reporting.serve_lines import ServedAdapter, whole_serving
from sweeper.reporting.served_forms import ServedContrast, served_sentences, served_warning
from sweeper.reporting.text_table import point_words
from sweeper.reporting.verdict import judge
from sweeper.reporting.verdict_doubts import label


@dataclass(frozen=True)
class WinningTrial:
    """A trial that was chosen for use: the best one of an arm, or one chosen by number."""

    study_name: str
    arm: ArmResult
    trial: TrialResult
    folder: TrialFolder
    served: tuple[ServedContrast, ...] = ()
    """The test losses of the arm's winner as it is served, empty for any other trial."""
    gain: str = ""
    """What the search gained over the arm's recipe, "" for any other trial than the arm's winner."""

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
    def form(self) -> TrainedForm | None:
        """Form that the artifact was trained in, or None if an earlier version stored the artifact."""
        return read_trained_form(self.artifact)

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
    chosen = trial.number if found.final is None else found.final.winner
    served = tuple(each for each in results.served if each.arm == name and trial.number == chosen)
    compared = found.final is not None and found.final.recipe is not None
    gain = judge(results).recipe_words(name) if compared and trial.number == chosen else ""
    place = folder.trial(name, trial.number)
    return WinningTrial(results.study_name, found, trial, place, served, gain)


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
    names = {winner.arm.name: label(winner.arm)}
    parts = [
        winner.words,
        f"in {path}",
        *filter(None, [winner.gain]),
        *_warnings(winner),
        *filter(None, [served_warning(winner.served, names)]),
        *served_sentences(winner.served, names),
        _indented(loading_lines(winner)),
    ]
    name = winner.study_name
    # The trial is named, so that the command still means it after further trials.
    which = f"{name} --arm {winner.arm.name} --trial {winner.trial.number}"
    if isinstance(winner.settings.adapter, LoraAdapter):
        parts += [
            f"Ask        python -m sweeper generate {shlex.quote(path)} --prompt 'Your prompt'",
            f"Serve      {_serving(winner)}",
            f"Merge      python -m sweeper best {which} --merge merged",
        ]
    else:
        parts.append(f"Serve      {whole_serving(path, winner.form, chat_template(winner))}")
    return "\n\n".join(
        [
            *parts,
            f"Publish    hf upload YOUR_NAME/{name} {shlex.quote(path)}{_unpublished(winner)}",
            f"Retrain    python -m sweeper best {which} --yaml > conf/experiment/best.yaml\n"
            "           python -m sweeper +experiment=best",
        ]
    )


def _warnings(winner: WinningTrial) -> list[str]:
    form = winner.form
    if form is None:
        return [
            "An earlier version stored this model without its prompt template and end tokens. "
            "Train the trial again to get them: "
            f"python -m sweeper trial {shlex.quote(winner.folder.path.as_posix())} --into FOLDER"
        ]
    if form.template_problem is None:
        return []
    return [
        "WARNING: the stored chat template does not prompt the model as in training: "
        f"{form.template_problem}."
    ]


def _unpublished(winner: WinningTrial) -> str:
    """Return what is to be done before an adapter of a local base is published."""
    adapter = isinstance(winner.settings.adapter, LoraAdapter)
    if not adapter or winner.form is None or winner.form.base is not None:
        return ""
    return (
        "\n           Before: publish the base, and set base_model_name_or_path in "
        "adapter_config.json to its name"
    )


def base_name(settings: TrialSettings, form: TrainedForm | None) -> str:
    """Return the name by which other programs load the base: a hub id or an absolute folder."""
    if form is not None and form.base is not None:
        return form.base
    # The embedded base and stand-ins have no hub id, so their local folder is named.
    name = settings.model.base_model
    if name == EMBEDDED or name.startswith(stand_ins.PREFIX):
        from sweeper.modeling.model_source import find_source

        return find_source(settings.model).folder.as_posix()
    folder = Path(name).expanduser()
    return folder.resolve().as_posix() if folder.exists() else name


def loading_lines(winner: WinningTrial) -> str:
    """Return Python code that loads and prompts the winner with plain transformers and PEFT."""
    settings, path, form = winner.settings, winner.artifact.as_posix(), winner.form
    base = None
    if isinstance(settings.adapter, LoraAdapter):
        dtype = None if form is None else form.dtype
        # An adapter fits only the weights that it was trained on.
        revision = settings.model.revision if form is None else form.revision
        quantized = settings.quantization.arguments(dtype or "bfloat16")
        base = BaseLines(base_name(settings, form), revision, dtype, quantized)
    code = loading_code(path, base, stored_ends=form is not None)
    if form is None or form.template is None:
        return code
    limit = settings.evaluation.generation.max_new_tokens
    return "\n".join([code, "", prompting_code(limit, form.chat_template_kwargs)])


def _serving(winner: WinningTrial) -> str:
    settings, form = winner.settings, winner.form
    assert isinstance(settings.adapter, LoraAdapter)
    served = ServedAdapter(
        winner.study_name,
        winner.artifact.as_posix(),
        base_name(settings, form),
        settings.model.revision if form is None else form.revision,
        settings.adapter,
        form,
        chat_template(winner),
    )
    return served.command


def chat_template(winner: WinningTrial) -> str:
    """Return the source of the stored chat template, or "" if there is none."""
    return read_words(winner.artifact / "chat_template.jinja")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())
