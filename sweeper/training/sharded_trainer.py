"""Full fine-tuning of a model that is too large to train on one device (FSDP2).

Every device of the trial holds its share of the weights, gradients and optimizer states; the weights of
a block are whole only while it computes. transformers shards the model while it loads it
(DistributedConfig) and trains it; what its Trainer does not do yet, resuming, is done here.

Source: Zhao et al. 2023, PyTorch FSDP (arXiv 2304.11277); torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from sweeper.modeling.blocks import blocks
from sweeper.modeling.model_source import NO_CODE
from sweeper.training.trainer import JudgedTrainer, stored_weights

OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
"""transformers' names, so that a checkpoint looks as any other."""
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def load_sharded(
    whole: PreTrainedModel, devices: int, compute_dtype: torch.dtype
) -> PreTrainedModel:
    """The same model in fp32, its weights spread over the ranks of the process group.

    Called by every rank. The whole model gives up its storage first.

    Args:
        whole: loaded from a folder, and not changed since.
        devices: how many ranks there are.
        compute_dtype: bfloat16 weights travel and compute as such; autocast's copies would stay.
    """
    spread = DistributedConfig(
        fsdp_size=devices,
        fsdp_plan=_plan(whole),
        fsdp_mixed_precision=compute_dtype == torch.bfloat16,
    )
    whole.to("meta")
    sharded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        whole.config.name_or_path,
        dtype=torch.float32,
        attn_implementation=whole.config._attn_implementation,
        distributed_config=spread,
        use_safetensors=True,
        **NO_CODE,
    )
    return sharded


def load_whole(checkpoint: Path, sharded: PreTrainedModel) -> PreTrainedModel:
    """The weights of a sharded training's checkpoint, whole, on this rank's device."""
    whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation=sharded.config._attn_implementation,
        device_map={"": sharded.device},
        use_safetensors=True,
        **NO_CODE,
    )
    whole.name_or_path = whole.config.name_or_path = sharded.config.name_or_path
    return whole


class ShardedTrainer(JudgedTrainer):
    """A JudgedTrainer whose model is spread over the ranks; all of them judge it, in step.

    Its checkpoints are those of any other full fine-tune: the leader writes whole weights and optimizer
    states, and hands out the shares when the training is resumed.
    """

    model: PreTrainedModel

    def __init__(self, **options: Any) -> None:
        options["args"].save_only_model = True  # it refuses to keep states that it cannot restore
        super().__init__(**options)
        self.args.save_only_model = False  # they are restored below

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states = get_optimizer_state_dict(self.model, self._own_optimizer, options=GATHERED)
        if self.args.should_save:
            torch.save(states, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        leads = self.args.should_save
        weights: dict[str, Any] = stored_weights(Path(resume_from_checkpoint)) if leads else {}
        set_model_state_dict(self.model, weights, options=SPREAD)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states: dict[str, Any] = {}
        if self.args.should_save:
            states = torch.load(Path(checkpoint) / OPTIMIZER, weights_only=True)
        set_optimizer_state_dict(self.model, self._own_optimizer, states, options=SPREAD)
        schedule = torch.load(Path(checkpoint) / SCHEDULER, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    def _load_best_model(self) -> None:
        """The leader alone needs it, whole, to judge and store it while the others go home."""
        self.optimizer.state.clear()  # make room
        self.judgements.clear()  # shares in bfloat16 round otherwise than autocast: judged anew
        if self.args.should_save:
            with self._costs.stage("load"):
                self.model = load_whole(Path(self.state.best_model_checkpoint), self.model)

    @property
    def _own_optimizer(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper, whose steps go through the loss scaler."""
        wrapper: Any = self.optimizer
        own: torch.optim.Optimizer = wrapper.optimizer
        return own

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Spread the gradient of every micro-batch: put off, it would stay whole on every device."""
        return nullcontext()

    @property
    def trained(self) -> PreTrainedModel | None:
        """After training: the model with the best weights, whole; None if none was ever judged."""
        return None if isinstance(self.model, FSDPModule) else self.model


def _plan(model: PreTrainedModel) -> dict[str, str]:
    """transformers' fsdp_plan for the blocks of an architecture; not every one brings its own."""
    names = (re.sub(r"\.\d+\b", ".*", name) for name in blocks(model))
    return dict.fromkeys(names, "free_full_weight")
