"""The gradient of a weight that is both embedding and output layer is the sum of both, in one tensor."""

from copy import deepcopy

import pytest
import torch
from tiny_models import VOCAB, make_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megaft.models.hugging_face import NatsModel
from megaft.models.tied_embedding import join_gradients

TOKENS = torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(2))
LABELS = torch.randint(0, VOCAB, TOKENS.shape, generator=torch.Generator().manual_seed(3))


def tied(family="gpt2"):
    model = make_model(family, tie_word_embeddings=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return model


def weight_of(model):
    return model.get_input_embeddings().weight


def plain_nats(model):
    logits = model(TOKENS).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="sum")


def plain_gradient(model):
    plain_nats(model).backward()
    return weight_of(model).grad


def joined(model):
    """Return the model's copy with joined gradients, and its module of nats."""
    model = deepcopy(model)
    return model, NatsModel(model)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # this llama has a padding token, whose rows get no gradient
def test_the_gradient_is_that_of_plain_torch(family):
    expected = plain_gradient(tied(family))
    model, nats = joined(tied(family))
    nats(TOKENS, LABELS).backward()
    assert_close(weight_of(model).grad, expected)


def test_gradients_of_several_backward_passes_accumulate():
    expected = plain_gradient(tied())
    model, nats = joined(tied())
    for _ in range(3):
        nats(TOKENS, LABELS).backward()
    assert_close(weight_of(model).grad, 3 * expected)


def test_a_bf16_gradient_is_rounded_once():
    model, nats = joined(tied().bfloat16())
    nats(TOKENS, LABELS).backward()
    fp32, fp32_nats = joined(tied().bfloat16().float())
    fp32_nats(TOKENS, LABELS).backward()
    assert weight_of(model).grad.dtype is torch.bfloat16
    difference = weight_of(model).grad.float() - weight_of(fp32).grad
    assert difference.norm() < 0.02 * weight_of(fp32).grad.norm()  # that of bf16 activations


def test_passes_without_backward_change_nothing():
    expected = plain_gradient(tied())
    model, nats = joined(tied())
    nats(TOKENS, LABELS)  # abandoned
    model(TOKENS)  # without the output layer of NatsModel
    pending = nats(TOKENS, LABELS)
    with torch.no_grad():
        nats(TOKENS, LABELS)
    pending.backward()
    assert_close(weight_of(model).grad, expected)


def test_a_gradient_that_no_embedding_takes_is_an_error():
    model, nats = joined(tied())
    model.get_input_embeddings().register_forward_hook(lambda *inputs: inputs[-1].detach().requires_grad_())
    with pytest.raises(AssertionError, match="took no part"):
        nats(TOKENS, LABELS).backward()
    assert model.get_input_embeddings().output_gradient.take() is None


def test_the_model_itself_keeps_its_gradient():
    expected = plain_gradient(tied())
    model, nats = joined(tied())
    nats(TOKENS, LABELS)
    assert_close(plain_gradient(model), expected)


class Shapes(TorchDispatchMode):
    """The operations that allocate or add a tensor of the weight's size."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.names = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.names.append(func.__name__)
        return result


def test_one_tensor_of_the_weights_size_is_made():
    model, nats = joined(tied())
    with Shapes(weight_of(model).shape) as shapes:
        nats(TOKENS, LABELS).backward()
    assert shapes.names.count("zeros.default") == 1
    assert "add.Tensor" not in shapes.names
    assert "embedding_dense_backward.default" not in shapes.names
    with Shapes(weight_of(model).shape) as shapes:  # as torch does it
        plain_nats(tied()).backward()
    assert "embedding_dense_backward.default" in shapes.names


def test_frozen_and_untied_weights_are_left_alone():
    model, nats = joined(tied())
    weight_of(model).requires_grad_(False)
    nats(TOKENS, LABELS).backward()
    assert weight_of(model).grad is None
    untied = make_model("llama", tie_word_embeddings=False)
    assert join_gradients(untied.get_input_embeddings(), untied.get_output_embeddings().weight) is None
    assert NatsModel(untied).head.output_gradient is None


@pytest.mark.parametrize("setting", [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_embeddings_with_other_gradients_are_left_alone(setting):
    embedding = nn.Embedding(5, 3, **setting)
    assert join_gradients(embedding, embedding.weight) is None
