"""Sweeps that run by themselves: which night it is, who runs it, what is told in the morning."""
