"""The base of every stored or sent value, and the one value that an error carries."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenValue(BaseModel):
    """Base of everything that travels or is stored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MemoryShortfall(FrozenValue):
    """A training that is larger than the device, whatever its batch."""

    need_mib: float
    have_mib: float
    what: str = "weights, gradients and optimizer states"
    """What needs it, as the subject of a sentence in the plural."""

    def __str__(self) -> str:
        return (
            f"{self.what} need {self.need_mib:,.0f} MiB, and the device "
            f"has {self.have_mib:,.0f} MiB"
        )
