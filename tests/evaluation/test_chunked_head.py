"""The loss in chunks against the whole computation, for every way a model can end."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sweeper.data.tokens import IGNORED
from sweeper.evaluation.chunked_head import FINISHES, states_at
from sweeper.evaluation.token_loss import target_nll, token_nll

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CHUNKED: dict[str, dict[str, Any]] = {
    "cohere": {**SMALL, "logit_scale": 0.25},
    "gemma": SMALL,
    "gemma2": {**SMALL, "final_logit_softcapping": 0.5},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": SMALL,
    "gptj": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "granite": {**SMALL, "logits_scaling": 4.0},
    "llama": {**SMALL, "tie_word_embeddings": True},
    "mistral": SMALL,
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 16},
    "phi": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "stablelm": SMALL,
}
WHOLE: dict[str, dict[str, Any]] = {
    "codegen": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "recurrent_gemma": {**SMALL, "lru_width": 32, "attention_window_size": 16},
    "hyperclovax": {**SMALL, "logits_scaling": 4.0},
}


def tiny(kind: str, options: dict[str, Any]) -> PreTrainedModel:
    """A randomly initialised model whose bias, where its head has one, is not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch_of_three() -> dict[str, torch.Tensor]:
    """Three rows, padded on the right, targets at other places in each."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 14))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row, (prompt, length) in enumerate([(4, 14), (1, 9), (7, 11)]):
        labels[row, :prompt] = labels[row, length:] = IGNORED
        mask[row, length:] = ids[row, length:] = 0
    labels[0, 8] = IGNORED  # a gap, as between two assistant turns
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def needs_whole_logits(model: torch.nn.Module) -> bool:
    """True if `states_at` returns logits, whose width is the vocabulary, instead of hidden states."""
    inputs = batch_of_three()
    targets = inputs.pop("labels") != IGNORED
    with torch.no_grad():
        states, _ = states_at(model, inputs, targets)
    return states.shape[-1] == VOCABULARY


def whole_nll(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The oracle: all logits of the model's own forward, all at once."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits.float()
    return cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All gradients by parameter, taken away from the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal_in_chunks(model: torch.nn.Module) -> None:
    """Value and every gradient agree with the whole computation to 1e-6 of their size."""
    batch = batch_of_three()
    expected = whole_nll(model, batch)
    expected.backward()
    wanted = gradients(model)
    for chunk_size in (None, 1, 4, 1000):
        found = target_nll(model, batch, chunk_size)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        found.backward()
        given = gradients(model)
        assert given.keys() == wanted.keys()
        largest = max(gradient.abs().max().item() for gradient in wanted.values())
        for name, gradient in wanted.items():
            torch.testing.assert_close(given[name], gradient, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("kind", CHUNKED)
def test_chunks_equal_the_whole_computation(kind: str) -> None:
    """Biases, ties, soft caps and scales of known heads survive being applied in chunks."""
    model = tiny(kind, CHUNKED[kind])
    assert not needs_whole_logits(model)
    assert_equal_in_chunks(model)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_class_that_is_not_known_keeps_its_own_forward(kind: str) -> None:
    """Its logits exist whole, at the targets only, and the figures are the same."""
    model = tiny(kind, WHOLE[kind])
    assert needs_whole_logits(model)
    assert_equal_in_chunks(model)


ADAPTERS = {
    "attention": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
    "trained head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "new tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
}


def adapted(name: str, **options: Any) -> PeftModel:
    """A tiny Llama with an adapter that changes its answers."""
    config = copy.deepcopy(ADAPTERS[name])
    config.init_lora_weights = False
    return get_peft_model(tiny("llama", {**SMALL, **options}), config).eval()


@pytest.mark.parametrize("name", ADAPTERS)
def test_chunks_go_through_the_adapter(name: str) -> None:
    """LoRA in the body and on the head, a retrained head, new tokens: same loss, same gradients."""
    tied = name == "new tokens"
    model = adapted(name, tie_word_embeddings=tied)
    assert not needs_whole_logits(model)
    assert_equal_in_chunks(model)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_disabled_adapter_is_not_judged(name: str) -> None:
    """Within disable_adapter the loss is the base's."""
    model, batch = adapted(name), batch_of_three()
    base = tiny("llama", SMALL)
    with torch.no_grad():
        tuned = target_nll(model, batch, 4).item()
        with model.disable_adapter():
            untuned = target_nll(model, batch, 4).item()
        assert untuned == pytest.approx(target_nll(base, batch, 4).item(), rel=1e-6)
    if name != "trained head":  # a copy of the head, trained by nobody yet
        assert abs(tuned - untuned) > 1e-3


def test_dropout_on_the_head_is_drawn_once() -> None:
    """The backward computes a chunk again with the same dropout, so its gradients fit its loss."""
    model = adapted("head")
    layer = model.get_base_model().lm_head
    layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    model.train()
    weight = layer.lora_B["default"].weight
    torch.manual_seed(3)
    target_nll(model, batch_of_three(), 4).backward()
    direction, step = weight.grad.clone(), 1e-3
    model.zero_grad()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction / direction.norm()
            torch.manual_seed(3)
            values.append(target_nll(model, batch_of_three(), 4).item())
            weight -= sign * step * direction / direction.norm()
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(direction.norm().item(), rel=0.02)


def test_tokens_come_row_by_row() -> None:
    """The negative log-likelihoods are in the order of the targets, first row first."""
    model, batch = tiny("llama", SMALL), batch_of_three()
    with torch.no_grad():
        found = token_nll(model, batch, 4)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"]
    expected = [
        -torch.log_softmax(logits[row, place - 1], -1)[labels[row, place]].item()
        for row in range(3)
        for place in range(1, labels.shape[1])
        if labels[row, place] != IGNORED
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_batch_without_targets_is_worth_nothing() -> None:
    """No target, no loss, and a backward that does not fail."""
    model, batch = tiny("llama", SMALL), batch_of_three()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss = target_nll(model, batch, 4)
    loss.backward()
    assert loss.item() == 0


def test_a_class_of_the_same_name_elsewhere_is_not_trusted() -> None:
    """Code that came with a model may end otherwise; its own forward is asked."""
    llama = type(tiny("llama", SMALL))
    theirs = type("LlamaForCausalLM", (llama,), {"__module__": "transformers_modules.theirs"})
    model = theirs(AutoConfig.for_model("llama", **SMALL)).eval()
    assert needs_whole_logits(model)
    assert_equal_in_chunks(model)


@pytest.mark.parametrize("name", sorted(FINISHES))
def test_installed_transformers_ends_as_the_table_says(name: str) -> None:
    """Every line on logits in the class's forward is one that its entry stands for."""
    allowed = {
        "_plain": set(),
        "_soft_capped": {
            "logits = logits / self.config.final_logit_softcapping",
            "logits = torch.tanh(logits)",
            "logits = logits * self.config.final_logit_softcapping",
        },
        "_multiplied": {"logits = logits * self.logit_scale"},
        "_divided": {"logits = logits / self.config.logits_scaling"},
    }[FINISHES[name].__name__]
    source = inspect.getsource(getattr(transformers, name).forward)
    lines = {line.split("#")[0].strip() for line in source.splitlines()}
    assigned = {line for line in lines if re.match(r"(lm_)?logits = ", line)}
    head = {
        "logits = self.lm_head(hidden_states)",
        "lm_logits = self.lm_head(hidden_states)",
        "logits = self.lm_head(hidden_states).contiguous()",
    }
    assert len(assigned & head) == 1
    assert assigned - head == allowed
    states = {line for line in lines if re.match(r"hidden_states = ", line)}
    assert states <= {
        "hidden_states = outputs.last_hidden_state",
        "hidden_states = outputs[0]",
        "hidden_states = transformer_outputs[0]",
        "hidden_states = transformer_outputs.last_hidden_state",
        "hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)",
        "hidden_states = hidden_states.to(self.lm_head.weight.device)",
    }, states
