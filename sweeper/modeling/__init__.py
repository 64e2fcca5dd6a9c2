"""The base model and its adapters: load, attach, detach, count."""
