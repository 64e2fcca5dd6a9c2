"""Unattended nightly sweeps: dates and locks of nights, champions, and the morning digest."""
