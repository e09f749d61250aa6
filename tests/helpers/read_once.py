"""Cache of models and tokenizers, so that several commands read a source once."""

from functools import cache


def tokenizers(patch):
    """Let `load_tokenizer` of evaluation and generation read a folder once; `patch` is a MonkeyPatch."""
    from megaft.data import tokenizer

    once = cache(tokenizer.load_tokenizer)
    patch.setattr(tokenizer, "load_tokenizer", once)


def models(patch):
    """Let evaluations of one model with one dtype and backend load it once."""
    from evaluate_zero_shot.evaluation import evaluated_model

    tokenizers(patch)
    load, kept = evaluated_model.load, {}

    def once(source, tokenizer, config, backend, device):
        key = source, config.dtype, config.partition, backend, device
        if key not in kept:
            kept[key] = load(source, tokenizer, config, backend, device)
        return kept[key]

    patch.setattr(evaluated_model, "load", once)
