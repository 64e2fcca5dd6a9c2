"""The base model and its adapters: find, load, attach, detach, count, estimate, merge."""

import logging

_NOISE = ("MatMul8bitLt: inputs will be cast", "Failed to load CPU gemm_4bit_forward")


def _informs(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE)


# why: bitsandbytes logs its own casts once for every 8-bit layer and call, and the absence of an
# inference kernel that training switches off (modeling.base.keep_gradient)
for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).addFilter(_informs)
