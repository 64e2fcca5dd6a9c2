"""The seeds of initialisation and order, together and apart."""

from __future__ import annotations

import pytest

from sweeper.config.decisive_settings import settings_digest
from sweeper.core.errors import ConfigError
from sweeper.search.study_plan import single, studies

STUDY = ("+experiment=lr_rank_sweep", "workers=fake", "tracking=none")


def test_one_seed_is_all_seeds_unless_they_are_given() -> None:
    """`seed` decides initialisation and order, and each of them has a setting of its own."""
    together = single(["seed=3"])
    assert (together.init_seed, together.order_seed) == (3, 3)
    apart = single(["seed=3", "seed_init=0", "seed_data=7"])
    assert (apart.seed, apart.init_seed, apart.order_seed) == (3, 0, 7)


def test_trials_of_before_keep_their_identity() -> None:
    """A seed that is not given changes no digest, and one that is given changes it."""
    plain = single(["seed=3"]).trial
    assert settings_digest(plain) != settings_digest(single(["seed=3", "seed_init=0"]).trial)
    before = {**plain.model_dump(), "seed_init": None, "seed_data": None}
    assert settings_digest(type(plain).model_validate(before)) == settings_digest(plain)


def test_seeds_that_repeat_one_training_are_refused() -> None:
    """With both given, finalists would differ in dropout alone. Without finalists that is no problem."""
    both = ("seed_init=0", "seed_data=0")
    with pytest.raises(ConfigError, match="would differ in dropout alone"):
        studies([*STUDY, *both])
    assert studies([*STUDY, *both, "finalists=none"])
    assert studies([*STUDY, "seed_init=0"])


def test_no_seed_is_searched() -> None:
    """The best seed is luck, whichever of the three it is."""
    for key in ("seed", "seed_init", "seed_data"):
        with pytest.raises(ConfigError, match="never searched"):
            studies([*STUDY, f"{key}=1,2"])
