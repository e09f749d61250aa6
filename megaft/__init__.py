"""megaft: finetune causal language models with DeepSpeed, and score them so that the numbers can be checked."""

__version__ = "0.1.0"
