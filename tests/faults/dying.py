"""A driver that is killed after its first write to Optuna's storage, a second one after two, and so on.

Each is a fork of this process, so that a study costs no imports; after each death the same study is run
to its end. Prints how many there were, the last of which was not killed.
"""

from __future__ import annotations

import os
import signal
import sys

from sweeper.commands.run_study import run_study
from sweeper.search.storage import PatientStorage
from sweeper.search.study_plan import studies

WRITES = (
    *("_create_new_trial", "_set_trial_param", "set_trial_state_values"),
    *("set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr"),
)


def main(overrides: list[str]) -> None:
    """Kill after 1, 2, 3, … writes, until a study ends before it would be killed."""
    studies(overrides)  # imports and composing are paid once
    for number in range(1, 1000):
        there = [*overrides, f"output_dir=killed_{number}"]
        killed = _run(there, dies_after=number) == signal.SIGKILL
        assert _run(there, dies_after=None) == 0, f"not resumed after write {number}"
        if not killed:
            print(number)
            return


def _run(overrides: list[str], dies_after: int | None) -> int:
    """Run a study in a fork; returns its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if dies_after is not None:
        _count_down(dies_after)
    (plan,) = studies(overrides)
    run_study(plan)
    os._exit(0)


def _count_down(writes: int) -> None:
    left = [writes]
    for name in WRITES:
        call = getattr(PatientStorage, name)

        def counted(*arguments: object, _call: object = call, **options: object) -> object:
            result = _call(*arguments, **options)  # type: ignore[operator]
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(PatientStorage, name, counted)


if __name__ == "__main__":
    main(sys.argv[1:])
