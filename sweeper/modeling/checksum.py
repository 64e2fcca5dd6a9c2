"""Whether a frozen base is still what was loaded, bit by bit, at the speed of reading its memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element: the type whose values are its bits."""


def checksums(model: torch.nn.Module) -> dict[str, int]:
    """The sum of the bits of each weight, read as 64-bit integers where they can be, modulo 2^64.

    No cryptography: it finds what an accident changes (a step of an optimizer, a merge that was not
    undone, a flipped bit), and costs about 0.1 seconds a GiB on one CPU core. Buffers are left out:
    some models compute theirs anew as they go.
    """
    named = dict(model.named_parameters())
    if not named:
        return {}
    with torch.no_grad():
        sums = torch.stack([_sum(weight.detach()) for weight in named.values()])
    return dict(zip(named, sums.tolist(), strict=True))


def changed(before: Mapping[str, int], model: torch.nn.Module) -> list[str]:
    """Names of the weights that are not what they were, or are new or gone."""
    now = checksums(model)
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _sum(weight: torch.Tensor) -> torch.Tensor:
    words = weight.view(INTEGERS[weight.element_size()])
    if words.is_contiguous() and words.numel() * words.element_size() % 8 == 0:
        words = words.reshape(-1).view(torch.int64)
    return words.sum(dtype=torch.int64)
