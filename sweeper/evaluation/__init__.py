"""Evaluate the untuned base, LoRA and full fine-tunes with the same metrics, computed the same way."""
