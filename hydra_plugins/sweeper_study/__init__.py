"""Hydra loads sweepers only from the hydra_plugins namespace; the work is done in sweeper."""
