"""transformers.Trainer with our loss, evaluation, checkpoints and cost accounting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerControl,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from sweeper.config.settings import LoraAdapter, TrialSettings
from sweeper.core.paths import TrialFolder, write_json
from sweeper.data.padding_free import split_by_tokens, without_targets
from sweeper.data.tokens import IGNORED, Tokens
from sweeper.evaluation.judge import Judgement
from sweeper.evaluation.token_loss import autocast, compute_loss_in_forward, target_nll
from sweeper.modeling.adapter import modules_without_gradient
from sweeper.modeling.model_source import NO_CODE
from sweeper.training.arguments import OBJECTIVE
from sweeper.training.checkpoint import remove_old, seal
from sweeper.training.distributed import RankGroup
from sweeper.training.optimizer import loraplus_optimizer, optimizer_class
from sweeper.training.rank_batches import NO_ROW, CompletedBatches
from sweeper.training.schedule import TrialSchedule
from sweeper.training.trial_costs import TrialCosts

Judging = Callable[[torch.nn.Module], Judgement]
"""Evaluates a model on the validation split."""


class TokenizedRows(Dataset[Tokens]):
    """Tokenized rows as a torch dataset."""

    def __init__(self, rows: list[Tokens]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tokens:
        """Return a row, or for NO_ROW one that adds nothing to the loss."""
        if index != NO_ROW:
            return self._rows[index]
        short = {name: values[:2] for name, values in self._rows[0].items()}
        return {**short, "labels": [IGNORED] * len(short["labels"])}


class GroupedByLength(LengthGroupedSampler):  # type: ignore[misc]
    """transformers' sampler by length, with an order that depends on seed and epoch alone.

    The order of transformers' sampler comes from the global random state. A resumed epoch restores
    that state only after its rows were drawn, so it would train other rows.
    """

    def __init__(self, plain: LengthGroupedSampler, seed: int) -> None:
        super().__init__(plain.batch_size, lengths=plain.lengths)
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch. accelerate's data loader calls this at the start of each one."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        indices: Iterator[int] = super().__iter__()
        return indices


def stored_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a full fine-tune's checkpoint on the CPU, by the model's names."""
    # transformers stores some weights under other names (experts of Qwen-MoE and Mixtral are split) or
    # not at all (tied ones). Its Trainer loads checkpoints with strict=False, which would leave the
    # last weights in place of the best; from_pretrained converts the names
    stored = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, device_map="cpu", use_safetensors=True, **NO_CODE
    )
    weights: dict[str, torch.Tensor] = stored.state_dict()
    return weights


class JudgedTrainer(Trainer):  # type: ignore[misc]
    """The reference training loop, evaluated by `judging` and charged to `costs`."""

    def __init__(
        self,
        *,
        judging: Judging,
        costs: TrialCosts,
        settings: TrialSettings,
        compute_dtype: torch.dtype,
        ranks: RankGroup,
        micro_batch_tokens: int | None,
        schedule: TrialSchedule,
        **options: Any,
    ) -> None:
        """Prepare the training.

        Args:
            judging: Evaluates the model.
            costs: Charged with what the trial uses.
            settings: The trial.
            compute_dtype: Dtype of the forward pass.
            ranks: The processes that train the trial.
            micro_batch_tokens: Limit of a micro-batch, if a device's rows of a step come as one batch
                without padding. None if transformers accumulates padded batches.
            schedule: The trial's schedule.
            options: Arguments of transformers.Trainer.
        """
        super().__init__(**options)
        self._ranks = ranks
        self._micro_batch_tokens = micro_batch_tokens
        self._schedule = schedule
        self._audited = False
        if ranks.size > 1:
            # DDP averages gradients only if the loss is computed inside the outermost forward method
            compute_loss_in_forward(self.model, settings.training.loss_chunk_size)
        self.judgements: dict[int, Judgement] = {}
        """Evaluations of this attempt, by optimiser step."""
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
        """The model with the best weights, after training."""
        model: torch.nn.Module = self.model
        return model

    def _get_train_sampler(self, *arguments: Any) -> Sampler[int] | None:
        sampler: Sampler[int] | None = super()._get_train_sampler(*arguments)
        if isinstance(sampler, LengthGroupedSampler):
            return GroupedByLength(sampler, self.args.data_seed)
        return sampler

    def get_train_dataloader(self) -> DataLoader[Tokens]:
        """Return this rank's batches. Every rank has as many of them."""
        loader: DataLoader[Tokens] = super().get_train_dataloader()
        if self._ranks.size > 1:
            shard: Any = loader.batch_sampler
            shard.batch_sampler = CompletedBatches(shard.batch_sampler, self._ranks.size)
        return loader

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: PreTrainedModel | None = None
    ) -> tuple[Any, Any]:
        """Return the optimiser's class and options, which transformers asks for."""
        return optimizer_class(args, model)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the configured optimiser, with LoRA+ learning rates if they are set."""
        optimizer: torch.optim.Optimizer
        if self._loraplus_lr_ratio is None:
            optimizer = super().create_optimizer(model)
        else:
            optimizer = loraplus_optimizer(self.model, self.args, self._loraplus_lr_ratio)
            self.optimizer = optimizer
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create transformers' schedule, with a warm-up that loses no step of a short run."""
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if self._schedule.warmup_factor(0) is None:
            unchanged: torch.optim.lr_scheduler.LRScheduler = schedule
            return unchanged
        (factor,) = set(schedule.lr_lambdas)

        def rate(step: int) -> float:
            warming = self._schedule.warmup_factor(step)
            return factor(step) if warming is None else warming

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(schedule.optimizer, rate)
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """Return the micro-batches of the next optimiser step and the number of their targets."""
        batches, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        assert targets is not None, "transformers counts the labels of a step"
        self._costs.add_step(batches, targets, self._ranks.size)
        return batches, targets

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Compute the gradients of a batch. After the first one, audit the adapter."""
        loss = self._gradients(model, inputs, num_items_in_batch)
        if not self._audited:
            self._audited = True
            self._audit_adapter()
        return loss

    def _audit_adapter(self) -> None:
        """Count the adapted modules that have no gradient, and warn of them."""
        if not isinstance(self.model, PeftModel):
            return
        dead = modules_without_gradient(self.model)
        self._costs.figures["parameters/modules_without_gradient"] = float(len(dead))
        if dead:
            named = ", ".join(dead[:3]) + (" …" if len(dead) > 3 else "")
            self._costs.advice.append(
                f"{len(dead)} adapted modules have no gradient, so they are not trained: {named}"
            )

    def _gradients(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Compute the gradients of a batch, in micro-batches if it is a step without padding."""
        if self._micro_batch_tokens is None:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        *earlier, last = self._micro_batches(inputs, self._micro_batch_tokens)
        losses = []
        for part in earlier:
            with self._unsynchronized(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        losses.append(super().training_step(model, last, num_items_in_batch))
        return torch.stack(losses).sum()

    def _micro_batches(
        self, step: dict[str, torch.Tensor], limit: int
    ) -> list[dict[str, torch.Tensor]]:
        """Return a step's micro-batches, as many on every rank."""
        parts = split_by_tokens(step, limit)
        # Rows of other lengths may need fewer micro-batches here than on another rank. A sharded model
        # gathers its weights in each of them, so a rank with fewer would let the others wait for ever
        missing = self._ranks.largest(len(parts)) - len(parts)
        return parts + [without_targets(step)] * missing

    def _unsynchronized(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Return a context in which gradients are accumulated, not averaged over the ranks."""
        context: AbstractContextManager[None] = self.accelerator.no_sync(model=model)
        return context

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return a micro-batch's share of the mean loss over the whole step's target tokens."""
        assert not return_outputs, (
            "only Trainer's own evaluation, which is replaced, asks for outputs"
        )
        assert num_items_in_batch is not None, "transformers counts the labels of a step"
        # accelerate autocasts the model's own forward method, which target_nll does not call. Training
        # must autocast like the evaluation, or losses of trial and stored artifact would differ
        with autocast(self.args.device, self._compute_dtype):
            if self._ranks.size == 1:
                return target_nll(model, inputs, self._chunk_size) / num_items_in_batch
            nll: torch.Tensor = model(**inputs).sum()
            # DDP averages the gradients over the ranks, but num_items_in_batch counts all ranks' tokens
            return nll * self._ranks.size / num_items_in_batch

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluate the model. The objective's value decides which checkpoint is the best."""
        with self._costs.stage("eval"):
            judgement = self._judging(self.model)
        self.judgements[self.state.global_step] = judgement
        metrics = {**judgement.metrics, OBJECTIVE: judgement.value(self._objective)}
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add fp16's loss scale to the logs, which distinguishes an overflow from a divergence."""
        scaler = self.accelerator.scaler
        scale = {} if scaler is None else {"loss_scale": float(scaler.get_scale())}
        super().log({**logs, **scale}, start_time)

    def _determine_best_metric(self, metrics: Mapping[str, float], trial: Any) -> bool:
        """Save a checkpoint at every new best value and return True if there is one."""
        # transformers saves the best weights only if they coincide with a periodic checkpoint
        best: bool = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best
        return best

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with self._costs.stage("save"):
            super()._save_checkpoint(model, trial)
            # Each rank writes its own random state, which must be part of the manifest
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                folder = Path(self.args.output_dir)
                seal(folder / f"checkpoint-{self.state.global_step}")
                remove_old(folder, self._save_total_limit, self.state.best_global_step)
                # A next attempt adds these costs to its own. Those after the newest checkpoint are lost
                write_json(TrialFolder(folder.parent).spent, self._costs.spent())

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_train_epochs: int, *rest: Any
    ) -> tuple[int, int]:
        """Return the position to resume at: completed epochs, and micro-batches of the current one."""
        place: tuple[int, int] = super()._init_training_state(
            max_steps, steps_per_epoch, num_train_epochs, *rest
        )
        # transformers stores an absolute path, which leads to another trial's weights, or nowhere,
        # once the trial's folder was copied or moved
        if self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
        # Without this a training that was already complete would take another step
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
