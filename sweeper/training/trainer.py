"""transformers.Trainer with our loss, our evaluator and our accounts in place of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerControl
from transformers.trainer_pt_utils import LengthGroupedSampler

from sweeper.config.settings import LoraAdapter, TrialSettings
from sweeper.core.paths import TrialFolder, write_json
from sweeper.data.tokens import Tokens
from sweeper.evaluation.judge import Judgement
from sweeper.evaluation.token_loss import autocast, compute_loss_in_forward, target_nll
from sweeper.modeling.model_source import NO_CODE
from sweeper.training.arguments import OBJECTIVE
from sweeper.training.checkpoint import remove_old, seal
from sweeper.training.distributed import RankGroup
from sweeper.training.optimizer import loraplus_optimizer
from sweeper.training.trial_costs import TrialCosts

Judging = Callable[[torch.nn.Module], Judgement]


class TokenizedRows(Dataset[Tokens]):
    """Tokenized rows as torch wants them."""

    def __init__(self, rows: list[Tokens]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tokens:
        return self._rows[index]


class GroupedByLength(LengthGroupedSampler):  # type: ignore[misc]
    """transformers' sampler with an order of its own for each epoch.

    Its order comes from the random state of the moment, which a resumed epoch has only after its rows
    were drawn.
    """

    def __init__(self, plain: LengthGroupedSampler, seed: int) -> None:
        super().__init__(plain.batch_size, lengths=plain.lengths)
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        indices: Iterator[int] = super().__iter__()
        return indices


def stored_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights of a full fine-tune's checkpoint on the CPU, by the names that the model has.

    Read as transformers stored them: it splits experts and drops tied weights, which its Trainer's own
    way of loading a checkpoint passes over in silence.
    """
    stored = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, device_map="cpu", use_safetensors=True, **NO_CODE
    )
    weights: dict[str, torch.Tensor] = stored.state_dict()
    return weights


class JudgedTrainer(Trainer):  # type: ignore[misc]
    """The reference training loop, judged by `judge` and charged to `costs`."""

    def __init__(
        self,
        *,
        judging: Judging,
        costs: TrialCosts,
        settings: TrialSettings,
        compute_dtype: torch.dtype,
        ranks: RankGroup,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._ranks = ranks
        if ranks.size > 1:
            compute_loss_in_forward(self.model, settings.training.loss_chunk_size)
        self.judgements: dict[int, Judgement] = {}
        """By optimiser step; of earlier attempts there are none."""
        self._judging = judging
        self._costs = costs
        self._objective = settings.objective.metric
        self._save_total_limit = settings.training.save_total_limit
        self._chunk_size = settings.training.loss_chunk_size
        self._compute_dtype = compute_dtype
        adapter = settings.adapter
        self._loraplus_lr_ratio = (
            adapter.loraplus_lr_ratio if isinstance(adapter, LoraAdapter) else None
        )
        self.model_accepts_loss_kwargs = True  # compute_loss below divides by all tokens of a step

    @property
    def trained(self) -> torch.nn.Module | None:
        """After training: the model with the best weights."""
        model: torch.nn.Module = self.model
        return model

    def _get_train_sampler(self, *arguments: Any) -> Sampler[int] | None:
        sampler: Sampler[int] | None = super()._get_train_sampler(*arguments)
        if isinstance(sampler, LengthGroupedSampler):
            return GroupedByLength(sampler, self.args.seed)
        return sampler

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """transformers' choice by name, or LoRA+ over it."""
        optimizer: torch.optim.Optimizer
        if self._loraplus_lr_ratio is None:
            optimizer = super().create_optimizer(model)
        else:
            optimizer = loraplus_optimizer(self.model, self.args, self._loraplus_lr_ratio)
            self.optimizer = optimizer
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """Called for each optimiser step: its micro-batches and the number of their targets."""
        batches, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        assert targets is not None, "transformers counts the labels of a step"
        self._costs.add_step(batches, targets, self._ranks.size)
        return batches, targets

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Called for each micro-batch: its share of the mean over the whole step's target tokens."""
        assert not return_outputs, "evaluate() is replaced, nothing asks for outputs"
        assert num_items_in_batch is not None, "transformers counts the labels of a step"
        # accelerate autocasts the model's own forward, which target_nll goes around
        with autocast(self.args.device, self._compute_dtype):
            if self._ranks.size == 1:
                return target_nll(model, inputs, self._chunk_size) / num_items_in_batch
            nll: torch.Tensor = model(**inputs).sum()
            # gradients are averaged over the ranks, and num_items_in_batch counts all of them
            return nll * self._ranks.size / num_items_in_batch

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Called by the training loop; the best checkpoint follows the objective."""
        with self._costs.stage("eval"):
            judgement = self._judging(self.model)
        self.judgements[self.state.global_step] = judgement
        metrics = {**judgement.metrics, OBJECTIVE: judgement.value(self._objective)}
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add fp16's loss scale to what is logged: it tells an overflow from a divergence."""
        scaler = self.accelerator.scaler
        scale = {} if scaler is None else {"loss_scale": float(scaler.get_scale())}
        super().log({**logs, **scale}, start_time)

    def _determine_best_metric(self, metrics: Mapping[str, float], trial: Any) -> bool:
        """Save every new best, also between two periodic checkpoints: it is what the trial keeps."""
        best: bool = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best
        return best

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with self._costs.stage("save"):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each rank writes its own random state
            if self.args.should_save:
                folder = Path(self.args.output_dir)
                seal(folder / f"checkpoint-{self.state.global_step}")
                remove_old(folder, self._save_total_limit, self.state.best_global_step)
                write_json(TrialFolder(folder.parent).spent, self._costs.spent())

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_train_epochs: int, *rest: Any
    ) -> tuple[int, int]:
        """Where the training goes on: (epochs, micro-batches of the next one) that are behind it.

        The best checkpoint has moved where the trial's folder has; a training that was at its end takes
        no further step.
        """
        place: tuple[int, int] = super()._init_training_state(
            max_steps, steps_per_epoch, num_train_epochs, *rest
        )
        if self.state.best_global_step and self.state.best_model_checkpoint is None:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else place

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if isinstance(self.model, PreTrainedModel):
            self.model.load_state_dict(stored_weights(Path(resume_from_checkpoint)))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._costs.stage("load"):
            if isinstance(self.model, PreTrainedModel):
                self.model.load_state_dict(stored_weights(Path(self.state.best_model_checkpoint)))
            else:
                super()._load_best_model()
