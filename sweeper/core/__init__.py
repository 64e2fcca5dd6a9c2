"""Shared by all packages: errors, trial outcomes, file paths, signals."""
