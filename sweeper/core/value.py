"""Base class of all stored or sent values, and the value that `DoesNotFit` carries."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class FrozenValue(BaseModel):
    """Base of every value that is stored or sent between processes."""

    # NaN is refused because JSON cannot hold it, and unknown keys because they hide misspelt ones.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MemoryShortfall(FrozenValue):
    """Amount by which a training exceeds the device's memory at any batch size."""

    need_mib: float
    have_mib: float
    what: str = "weights, gradients and optimizer states"
    """Name of the things that need the memory, in the plural: the subject of the message."""
    met: str = ""
    """First line of the error, if memory ran out where the estimate saw room."""

    def __str__(self) -> str:
        if self.met:
            return (
                f"memory ran out for {self.what} ({self.met}). They need about {self.need_mib:,.0f} "
                f"MiB, and {self.have_mib:,.0f} MiB of the device were free"
            )
        return (
            f"{self.what} need {self.need_mib:,.0f} MiB, but the device "
            f"has {self.have_mib:,.0f} MiB"
        )


class EquivalenceMargin(FrozenValue):
    """The largest difference that still counts as none: absolute, or a share of the improvement."""

    absolute: Annotated[float, Field(gt=0)] | None = None
    """In the metric's unit."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the reference's improvement over the untuned base, 0 to 1."""

    def __str__(self) -> str:
        if self.share is None:
            return f"{self.absolute:g}"
        return f"{100 * self.share:g} % of the reference's improvement"
