"""Train one trial: schedule, early stopping, best checkpoint, resume."""
