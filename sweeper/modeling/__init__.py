"""The base model and its adapters: find, load, attach, detach, count, estimate, merge."""

import logging

_NOISE = ("MatMul8bitLt: inputs will be cast", "Failed to load CPU gemm_4bit_forward")


def _is_informative(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE)


# bitsandbytes logs its own casts at every call of every 8-bit layer, and the absence of an inference
# kernel that training switches off (base_model.disable_inference_repacking)
for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).addFilter(_is_informative)
