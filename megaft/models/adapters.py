"""Low-rank adapters (LoRA, Hu et al. 2021) through PEFT: add, merge and save them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megaft.base.errors import ConfigError
from megaft.config.train import LoraConfig
from megaft.weights.loading.causal_lm import CausalLM


def add_adapters(model: CausalLM, lora: LoraConfig, seed: int) -> None:
    """Freeze the model and add trainable low-rank adapters, initialized from the seed.

    Raises:
        ConfigError: The model lacks a target layer, or a target's weight is shared, so its adapter cannot be merged.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    torch.manual_seed(seed)
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) or None,
        task_type="CAUSAL_LM",
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--lora.target-modules is {lora.target_modules}: {reason}") from error
    _require_mergeable(model, lora.target_modules)


def merge_adapters(model: CausalLM) -> CausalLM:
    """Merge every adapter into its weight matrix and return the plain model.

    An adapted embedding or output layer is untied first, because its adapter must not change the other layer.
    """
    for name, layer in list(adapted_layers(model)):
        base = layer.get_base_layer()
        if _is_shared(model, base.weight):
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            _untie(model)
        layer.merge()
        replace_module(model, name, base)
    return model


@torch.no_grad()
def round_weights(model: CausalLM, dtype: torch.dtype) -> None:
    """Round every weight to a dtype but store it in fp32; for an adapted layer, round its effective weight (W + BA).

    The effective weight is computed from the layer's outputs rather than by merging.
    """
    for name, layer in list(adapted_layers(model)) if dtype != torch.float32 else []:
        replace_module(model, name, _plain_layer(layer.eval()))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()


PROBED_ROWS = 1024
"""Rows of the identity matrix that a layer processes at once."""


def _plain_layer(layer: Any) -> nn.Module:
    """Return a layer without adapters that computes the same function as the adapted layer.

    Its weight is the layer's output for the identity matrix (an embedding's for every token), so that merging code need
    not be trusted.
    """
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        largest = torch.tensor(divmod(int(base.weight.abs().argmax()), base.embedding_dim))
        scale = base(largest[:1])[0, largest[1]] / base.weight[tuple(largest)]  # some families scale their embeddings
        weight = torch.cat([layer(rows) for rows in torch.arange(base.num_embeddings).split(PROBED_ROWS)])
        base.weight = nn.Parameter(weight / scale)
        return base
    bias, num_inputs = base.bias, layer.in_features
    if bias is not None:
        base.bias = nn.Parameter(torch.zeros_like(bias))
    row_chunks = torch.arange(num_inputs).split(PROBED_ROWS)
    weight = torch.cat([layer(nn.functional.one_hot(rows, num_inputs).float()) for rows in row_chunks]).T
    plain = nn.Linear(num_inputs, len(weight), bias=bias is not None)
    plain.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        plain.bias = bias
    return plain


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and module of every adapted layer."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule at the dotted path `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def save_adapters(model: CausalLM, folder: Path, base: str | None) -> None:
    """Write the adapters without the base model, in PEFT's format.

    Args:
        model: The model with its adapters.
        folder: A new folder.
        base: Name of the base model in the adapter's configuration; must not contain a local path or a secret.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    # Adapted embeddings belong to the base model; by default PEFT would write them too.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {f"base_model.model.{name}": values.contiguous() for name, values in state.items()}
    save_file(weights, folder / "adapter_model.safetensors")


def _names_of(model: nn.Module, weight: nn.Parameter) -> list[str]:
    """Return all names of a parameter: more than one if layers share it."""
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]


def _is_shared(model: nn.Module, weight: nn.Parameter) -> bool:
    return len(_names_of(model, weight)) > 1


def _require_mergeable(model: CausalLM, targets: tuple[str, ...]) -> None:
    """Refuse adapters on layers that share a weight, except the embedding and output layer, which can be untied."""
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    embedding_names = {
        name for layer in embeddings if layer is not None for name in _names_of(model, _weight_of(layer))
    }
    for name, layer in adapted_layers(model):
        names = _names_of(model, _weight_of(layer))
        is_tied_embedding = layer in embeddings and len(names) == len(embeddings) and embedding_names == {*names}
        if len(names) > 1 and not is_tied_embedding:
            raise ConfigError(
                f"--lora.target-modules is {targets}, but the weight of {name} is shared by "
                f"{', '.join(names)}; merging one adapter would change them all. Target other layers."
            )


def _weight_of(layer: Any) -> nn.Parameter:
    return getattr(layer, "base_layer", layer).weight


def _untie(model: CausalLM) -> None:
    """Record in the configuration that the embedding and the output layer are untied."""
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
