"""Embedded default: a tiny pre-trained base model and a real data set that need no download.

Knows where the shipped base lies. Neither loads nor trains it (tools/pretrain_base.py does): this
package imports neither torch nor transformers.
"""

from pathlib import Path

BASE_DIR: Path = Path(__file__).parent / "base"
"""Folder of the embedded base model in Hugging Face layout: config, weights, tokenizer, model card."""

__all__ = ["BASE_DIR"]
