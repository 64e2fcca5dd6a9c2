"""Rows to batches, in stages of one shape: read, split, render, tokenize, batch."""
