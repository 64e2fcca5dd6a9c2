"""MLflow runs, and where a result comes from."""
