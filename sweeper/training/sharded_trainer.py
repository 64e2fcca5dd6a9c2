"""Full fine-tuning of a model that is too large to train on one device (FSDP2).

Every device of the trial holds its share of the weights, gradients and optimizer states. The weights of
a block are gathered only while the block computes. transformers shards the model while loading it
(DistributedConfig) and trains it. This module adds resuming, which transformers' Trainer lacks.

Source: Zhao et al. 2023, PyTorch FSDP (arXiv:2304.11277), and torch.distributed.fsdp.fully_shard.
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
"""transformers' file names, so that checkpoints have the same files as without sharding."""
# whole tensors on rank 0 alone and in the host's memory, because a device holds its share only
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
# rank 0 alone has read the checkpoint, and every rank keeps its share
SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def load_sharded(
    whole: PreTrainedModel, devices: int, compute_dtype: torch.dtype
) -> PreTrainedModel:
    """Load a model again in fp32, with its weights spread over the ranks of the process group.

    Every rank must call this function. It releases the storage of `whole` first.

    Args:
        whole: a model that was loaded from a folder and not changed since.
        devices: number of ranks.
        compute_dtype: dtype of the forward pass. With bfloat16, weights are gathered in bfloat16.
    """
    # FSDP's mixed precision instead of autocast, which would keep bfloat16 copies of whole weights
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
    """Load a sharded training's checkpoint as a whole model onto this rank's device."""
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
    """A JudgedTrainer whose model is spread over the ranks, which all evaluate it together.

    Checkpoints have the format of any other full fine-tune. The leader writes whole weights and
    optimizer states, and distributes the shares when the training is resumed. torch's distributed
    checkpoints are not used, because they contain a pickle.
    """

    model: PreTrainedModel

    def __init__(self, **options: Any) -> None:
        # Trainer refuses sharded models unless only weights are saved, because it cannot restore the
        # optimizer's states. The methods below can
        options["args"].save_only_model = True
        super().__init__(**options)
        self.args.save_only_model = False

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
        """Load the best checkpoint as a whole model on the leader, which evaluates and stores it."""
        self.optimizer.state.clear()  # frees memory for the whole model
        # FSDP's bfloat16 rounds differently from autocast, so these losses are not the artifact's
        self.judgements.clear()
        if self.args.should_save:
            # Evaluating and storing one whole model needs no second code path. In exchange, the weights
            # must fit one device
            with self._costs.stage("load"):
                self.model = load_whole(Path(self.state.best_model_checkpoint), self.model)

    @property
    def _own_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without accelerate's wrapper, whose steps go through the loss scaler."""
        wrapper: Any = self.optimizer
        own: torch.optim.Optimizer = wrapper.optimizer
        return own

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Reduce the gradient after every micro-batch, not after the last one of a step."""
        # Deferred, as transformers does it, whole gradients would stay on every device
        return nullcontext()

    def _unsynchronized(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        return self._defer_fsdp_gradient_reduction()

    @property
    def trained(self) -> PreTrainedModel | None:
        """The whole model with the best weights after training, or None without any evaluation."""
        return None if isinstance(self.model, FSDPModule) else self.model


def _plan(model: PreTrainedModel) -> dict[str, str]:
    """Return transformers' fsdp_plan for the blocks of an architecture."""
    # Not every architecture of transformers defines its own plan
    names = (re.sub(r"\.\d+\b", ".*", name) for name in blocks(model))
    return dict.fromkeys(names, "free_full_weight")
