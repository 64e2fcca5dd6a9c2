"""sweeper: find the best QLoRA fine-tune of a model, and know whether full fine-tuning was worth it."""

__version__ = "0.1.0"
