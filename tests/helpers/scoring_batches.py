"""Scoring of batches given as tensors, with quantities at the places of their labels."""

import torch


def batch_of(inputs, labels):
    """Return a batch on the CPU."""
    from megaft.scoring.batch import ScoringBatch

    return ScoringBatch.of(inputs.numpy(), labels.numpy(), torch.device("cpu"))


def grid_of(model, inputs, labels):
    """Return a scoring model's quantities in the shape of the labels; 0.0 where they are not scored."""
    batch = batch_of(inputs, labels)
    values = model(batch)
    grid = values.new_zeros(len(values), labels.numel())
    grid[:, batch.positions] = values
    return grid.view(-1, *labels.shape)
