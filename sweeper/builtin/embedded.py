"""Location of the embedded base model, a tiny pre-trained model that needs no download.

The model is built by tools/pretrain_base.py. This module imports neither torch nor transformers.
"""

from pathlib import Path

BASE_DIR: Path = Path(__file__).parent / "base"
"""Folder of the embedded base model in Hugging Face layout: config, weights, tokenizer, model card."""

__all__ = ["BASE_DIR"]
