"""Settings of `model`, `quantization` and `adapter`, named as in transformers and PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sweeper.config.section import Fraction, Positive, SettingsSection

# a dash and no colon, because YAML 1.1 reads 1:12 as a number
LAYERS = re.compile(r"(?P<first>\d+)-(?P<last>\d+)|last-(?P<count>[1-9]\d*)")
"""Pattern of adapter.layers_to_transform as text: 0-11 (both ends included) or last-8."""


class ModelSettings(SettingsSection):
    """The base model: a hub id, a local folder, or the embedded one."""

    base_model: str = Field(min_length=1)
    revision: str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"]

    @property
    def requested_attention(self) -> str | None:
        """The implementation that transformers receives. None chooses sdpa where the class has it."""
        return None if self.attn_implementation == "auto" else self.attn_implementation


class QuantizationSettings(SettingsSection):
    """Storage of the frozen base in memory (transformers' BitsAndBytesConfig)."""

    load_in_4bit: bool
    # LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339)
    load_in_8bit: bool
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    # QLoRA quantizes the scales as well (Dettmers et al. 2023, arXiv:2305.14314)
    bnb_4bit_use_double_quant: bool
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"]

    @model_validator(mode="after")
    def _one_width(self) -> QuantizationSettings:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError(
                "load_in_4bit and load_in_8bit are both true. A base is held in one of them: "
                "choose quantization=nf4, fp4, int8 or none"
            )
        return self

    @property
    def kind(self) -> Literal["nf4", "fp4", "int8", "none"]:
        """Name of the group choice with this quantization."""
        if self.load_in_4bit:
            return self.bnb_4bit_quant_type
        return "int8" if self.load_in_8bit else "none"

    def arguments(self, dtype: str) -> dict[str, bool | str]:
        """Return the arguments of BitsAndBytesConfig, none for an unquantized base.

        Args:
            dtype: Compute dtype of 4-bit layers if the settings say auto.
        """
        if self.load_in_8bit:
            return {"load_in_8bit": True}
        if not self.load_in_4bit:
            return {}
        auto = self.bnb_4bit_compute_dtype == "auto"
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": dtype if auto else self.bnb_4bit_compute_dtype,
        }


UNQUANTIZED = QuantizationSettings(
    load_in_4bit=False,
    load_in_8bit=False,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=False,
    bnb_4bit_compute_dtype="auto",
)
# PEFT calls its default `true`. OLoRA: Büyükakyüz 2024, arXiv:2406.01775
INITS = ("default", "gaussian", "olora")
REFUSED_INITS = {
    "pissa": "it decomposes the base's weights and fails on a 4-bit or 8-bit base",
    "loftq": "it quantizes the base itself and needs CUDA",
    "eva": "it needs a pass over the data before training",
    "corda": "it needs a pass over the data before training",
    "lora_ga": "it needs gradients over the data before training",
    "orthogonal": "it fails on a 4-bit base",
    "mica": "it freezes B, so that r no longer means what it means for other trials",
    "true": "its name here is default",
    "false": "it starts from a random update, which PEFT offers for debugging only",
}
"""Values of PEFT's init_lora_weights that are refused, each with its reason."""


_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKM])")


def _count(value: Any) -> Any:
    """Convert 20M, 300k and 61440 to whole numbers. Other values are left to pydantic's rule."""
    if match := _COUNT.fullmatch(value) if isinstance(value, str) else None:
        return round(float(match[1]) * (1e6 if match[2] == "M" else 1e3))
    return value


class LoraAdapter(SettingsSection):
    """PEFT's LoraConfig.

    The rank is given as r, or as a target number of trainable parameters, but not both. Alpha is
    given as a number or as a ratio to r, but not both.
    """

    method: Literal["lora"]
    r: Positive | None
    trainable_parameters: Annotated[int, Field(ge=1), BeforeValidator(_count)] | None
    alpha_over_r: Annotated[float, Field(gt=0)] | None
    lora_alpha: Annotated[float, Field(gt=0)] | None
    lora_dropout: Fraction
    target_modules: str | Annotated[list[str], Field(min_length=1)]
    layers_to_transform: str | list[Annotated[int, Field(ge=0)]] | None
    modules_to_save: list[str]
    bias: Literal["none", "all", "lora_only"]
    # rsLoRA divides alpha by the root of r (Kalajdzievski 2023, arXiv:2312.03732)
    use_rslora: bool
    # DoRA trains the norms of the weights apart (Liu et al. 2024, arXiv:2402.09353)
    use_dora: bool
    init_lora_weights: str
    rank_pattern: dict[str, Positive]
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]]
    # LoRA+ gives the B matrices the higher rate (Hayou et al. 2024, arXiv:2402.12354)
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None

    @field_validator("layers_to_transform")
    @classmethod
    def _layers_are_a_range(cls, value: str | list[int] | None) -> str | list[int] | None:
        if value == [] or (isinstance(value, str) and not LAYERS.fullmatch(value)):
            raise ValueError(
                f"{value!r} names no layers. Give null (all), a list such as [0, 1, 2], "
                "a range such as 0-11 (both ends included), or last-8"
            )
        return value

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _known_init(cls, value: Any) -> str:
        name = str(value).lower()
        if name in INITS:
            return name
        known = next((kind for kind in REFUSED_INITS if name.startswith(kind)), None)
        reason = f"is not offered: {REFUSED_INITS[known]}" if known else "is no initialisation"
        raise ValueError(f"{value!r} {reason}. Choose {', '.join(INITS)}")

    @model_validator(mode="after")
    def _one_alpha(self) -> LoraAdapter:
        if (self.alpha_over_r is None) == (self.lora_alpha is None):
            raise ValueError(
                f"give lora_alpha or alpha_over_r, not both or none "
                f"(alpha_over_r={self.alpha_over_r}, lora_alpha={self.lora_alpha}). "
                "Set the other one to null"
            )
        return self

    @model_validator(mode="after")
    def _one_rank(self) -> LoraAdapter:
        if (self.r is None) == (self.trainable_parameters is None):
            raise ValueError(
                f"give r or trainable_parameters, not both or none (r={self.r}, "
                f"trainable_parameters={self.trainable_parameters}). Set the other one to null"
            )
        return self

    @property
    def rank(self) -> int:
        """The r that PEFT receives. Defined once trainable_parameters is resolved for a model."""
        assert self.r is not None, "modeling.check decides it first"
        return self.r

    def with_rank(self, r: int) -> LoraAdapter:
        """Return the same adapter with the given rank."""
        return self.model_copy(update={"r": r, "trainable_parameters": None})

    @property
    def alpha(self) -> float:
        """The lora_alpha that PEFT receives."""
        return self.lora_alpha if self.lora_alpha is not None else self.rank * self.ratio

    @property
    def ratio(self) -> float:
        """Alpha divided by r, however it was given."""
        if self.alpha_over_r is not None:
            return self.alpha_over_r
        assert self.lora_alpha is not None
        return self.lora_alpha / self.rank

    @property
    def alphas(self) -> dict[str, float]:
        """Return PEFT's alpha_pattern, so that alpha_over_r also holds where rank_pattern sets r."""
        if self.alpha_over_r is None:
            return dict(self.alpha_pattern)
        patterned = {name: self.alpha_over_r * r for name, r in self.rank_pattern.items()}
        return {**patterned, **self.alpha_pattern}


class NoAdapter(SettingsSection):
    """Full fine-tuning: every weight of the base is trained.

    LoRA's keys are accepted and ignored, because Hydra merges an experiment's values over the group
    that is chosen: an experiment that sets them keeps them under `adapter=none`.
    """

    method: Literal["none"]

    @model_validator(mode="before")
    @classmethod
    def _without_lora(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        idle = set(LoraAdapter.model_fields) - {"method"}
        return {key: value for key, value in given.items() if key not in idle}


ADAPTER_METHODS: dict[str, type[SettingsSection]] = {"lora": LoraAdapter, "none": NoAdapter}
