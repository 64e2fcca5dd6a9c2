"""One evaluator for the untuned base, LoRA and full fine-tuning."""
