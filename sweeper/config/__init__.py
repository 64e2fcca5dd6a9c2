"""Composition of the command line, search spaces, and frozen, validated settings."""
