"""Record runs in MLflow, and the provenance of results."""
