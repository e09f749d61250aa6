"""The attention kernel that torch chooses, and the settings that forgo a faster one."""

import pytest

from megaft.base.hardware import GPUS
from megaft.commands.estimate.attention import attention_kernel, attention_note

PLAIN = {"dtype": "bfloat16", "has_mask": False, "dropout": 0.0, "head_width": 64}


@pytest.mark.parametrize(
    ("hardware", "changes", "kernel", "noted"),
    [
        ("h100", {}, "cuDNN", None),
        ("h200", {"dropout": 0.125}, "cuDNN", None),
        ("h100", {"dropout": 0.1}, "FlashAttention", "0.0625 or 0.125"),
        ("h100", {"dropout": 0.1, "has_mask": True}, "memory-efficient", "0.0625 or 0.125"),
        ("b200", {"has_mask": True}, "cuDNN", None),
        ("h100", {"head_width": 256}, "cuDNN", None),
        ("b200", {"head_width": 256}, "FlashAttention", None),
        ("h100", {"head_width": 512}, "memory-efficient", None),
        ("h100", {"dtype": "float32"}, "memory-efficient", "bfloat16"),
        ("a100", {"dropout": 0.1}, "FlashAttention", None),
        ("a100", {"has_mask": True}, "memory-efficient", "--attend-within-documents"),
        ("a6000", {"head_width": 256}, "FlashAttention", None),
        ("a6000", {"head_width": 256, "dropout": 0.1}, "memory-efficient", None),
        ("v100", {"dtype": "float16"}, "memory-efficient", None),
        ("v100", {}, "math", "no fused kernel"),
        ("t4", {"dtype": "float32"}, "memory-efficient", None),
    ],
)
def test_the_attention_kernel(hardware, changes, kernel, noted):
    capability, settings = GPUS[hardware].capability, PLAIN | changes
    assert attention_kernel(capability, **settings) == kernel
    note = attention_note(capability, **settings)
    assert (note is None) == (noted is None)
    assert noted is None or noted in note
