"""Warm-up for fork servers, imported last: computations that each child would otherwise repeat for its first model."""

import gc

import deepspeed.ops
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("gpt2")  # compiles a thousand patterns, for all architectures at once
assert deepspeed.ops.__compatible_ops__  # asks compilers what they can build
gc.freeze()  # collections in children, of which DeepSpeed makes many, need not look at what is here already
