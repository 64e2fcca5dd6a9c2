"""Compare training steps of a small model on two forms of the same rows.

The rows are longer than the small model's attention windows. Knows nothing of how a form is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sweeper.data.tokens import IGNORED, Tokens
from sweeper.modeling.reduced_model import VOCABULARY, disable_dropout, small_model
from sweeper.modeling.row_attention import UnsupportedAttention

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOLERANCE = 1e-10
"""Largest relative difference of the loss, and of each gradient in its L2 norm, in float64."""
ROUNDING = 10.0
"""Multiple of the difference that the order of the rows makes in padded batches, if that is larger."""
# Some classes compute their norms in float32 whatever the dtype of the model (Gemma, Cohere, Helium)
LARGEST_ROUNDING = 2e-6
"""Relative difference that rounding in float32 explains at most."""
NEGLIGIBLE = 1e-6
"""Share of the largest gradient below which a gradient counts as zero. Biases of keys have none."""
ROW_LENGTHS = (3, 20, 11, 9)
"""Tokens of the rows: below, far above and slightly above the window."""
TrainingStep = tuple[Tensor, Mapping[str, Tensor]]
"""The loss of a step, and its gradients by parameter."""
Batch = dict[str, Tensor]


def obstacle(
    config: PretrainedConfig,
    attention: str,
    require: Callable[[PreTrainedModel], None],
    dtype: torch.dtype = torch.float64,
) -> str | None:
    """Return None if a small model of this configuration meets a requirement, else the reason.

    torch's random state is unchanged.

    Args:
        config: Configuration of the model at its full size.
        attention: Attention implementation of the small model.
        require: Raises UnsupportedAttention if the small model does not meet the requirement.
        dtype: Dtype of the small model.
    """
    name = str((config.architectures or [config.model_type])[0])
    try:
        # The small model's weights are drawn from the generator that the trial goes on with
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            require(small_model(config, attention, dtype))
    except UnsupportedAttention as reason:
        return f"{name}: {reason}"
    except Exception as error:  # noqa: BLE001 - a class can fail in any way, plain batches work
        first = str(error).partition("\n")[0].partition(". ")[0]
        return f"no proof for {name}: {type(error).__name__}: {first}"
    return None


class StepProof:
    """A small model's training step on plain batches, and how much other forms may differ from it."""

    def __init__(self, model: PreTrainedModel, plain: list[Batch], reordered: list[Batch]) -> None:
        """Compute the step.

        Args:
            model: The small model.
            plain: Padded batches of all rows.
            reordered: The same rows in other padded batches. Their step differs by rounding.
        """
        model.train()
        disable_dropout(model)
        self._model = model
        self._expected = _step(model, plain)
        rounding = ROUNDING * _difference(self._expected, _step(model, reordered))
        # Eager attention has its softmax in float32 whatever the dtype of the model
        eager = model.config._attn_implementation == "eager"
        least = LARGEST_ROUNDING if eager else TOLERANCE
        self._limit = max(least, min(rounding, LARGEST_ROUNDING))

    def require_equal(self, batch: Batch, how: str = "") -> None:
        """Compare the step on another form of the same rows.

        Args:
            batch: All rows in the other form.
            how: Words that name the form in the message.

        Raises:
            UnsupportedAttention: Loss or gradients differ.
        """
        worst = _difference(self._expected, _step(self._model, [batch]))
        if not worst <= self._limit:  # also if it is not a number
            raise UnsupportedAttention(
                f"its rows are not independent {how}(relative error {worst:.1e})"
            )

    def require_equal_recomputed(self, batch: Batch) -> None:
        """Compare the step with recomputed activations, if the class can recompute them.

        Raises:
            UnsupportedAttention: Loss or gradients differ.
        """
        if self._model.supports_gradient_checkpointing:
            self._model.activation_checkpointing_enable({"use_reentrant": False})
            self.require_equal(batch, "with recomputed activations ")


def proof_rows() -> list[Tokens]:
    """Return random rows of the lengths ROW_LENGTHS."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in ROW_LENGTHS]
    return [{"input_ids": row, "labels": [IGNORED, *row[1:]]} for row in ids]


def inputs(batch: Batch) -> Batch:
    """Return a batch without its labels."""
    return {name: values for name, values in batch.items() if name != "labels"}


def _step(model: PreTrainedModel, batches: list[Batch]) -> TrainingStep:
    """Return the mean loss of one step and the gradients by parameter."""
    model.zero_grad()
    targets = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        # The loss is computed here from the whole logits, independently of the product's loss
        logits = model(**inputs(batch), use_cache=False).logits[:, :-1].flatten(0, 1).double()
        nll = cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum")
        (nll / targets).backward()  # type: ignore[no-untyped-call]
        loss += nll.detach() / targets
    named = model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


def _difference(expected: TrainingStep, found: TrainingStep) -> float:
    """Return the largest relative difference of two steps: of the loss, or of a gradient's L2 norm."""
    (loss, gradients), (other, others) = expected, found
    assert gradients.keys() == others.keys(), "other weights get a gradient"
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    least = NEGLIGIBLE * max(norms.values())
    parts = [
        float((others[name] - gradients[name]).norm()) / max(norm, least)
        for name, norm in norms.items()
    ]
    # torch's maximum of values that include NaN is NaN
    return float(torch.tensor([float((other - loss).abs() / loss), *parts]).max())
