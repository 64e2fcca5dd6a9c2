"""The search with Optuna: plan, spaces, samplers, pruners, storage, and the states of a trial."""
