"""Create and load models that are partitioned by ZeRO-3 from the start.

A rank never holds more than its partition and the gathered weights of about one layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, core_model_loading, integrations, modeling_utils
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import _load_state_dict_into_zero3_model
from transformers.utils import logging

from megaft.base import parallel
from megaft.base.agreement import raise_from_anywhere, raise_together
from megaft.base.errors import DataError, UserError
from megaft.weights.loading.finite_weights import is_finite, require_finite_weights
from megaft.weights.loading.replaced import replaced
from megaft.weights.loading.weight_files import require_complete, untied_weights


@contextmanager
def loading(engine_config: dict[str, Any], setting: str) -> Iterator[None]:
    """Make `from_pretrained` load into partitions: rank 0 maps the files and broadcasts one module at a time.

    Args:
        engine_config: Configuration for deepspeed.initialize; it sets the precision of the partitions.
        setting: Name of the model's setting, for messages.

    Raises:
        UserError: The body raised it on some rank; it is raised on every rank.
    """
    live_config = HfDeepSpeedConfig(engine_config)  # transformers keeps a weak reference to it
    agreement = _Agreement()
    error = None
    try:
        with (
            replaced(deepspeed.zero, "Init", agreement.then_init),
            replaced(modeling_utils, "_load_state_dict_into_zero3_model", partial(_fill, setting)),
            _gathering(_own_weights),
            _renaming_as_without_zero(),
            _returning_memory(),
        ):
            yield
    except UserError as caught:
        error = caught
    finally:
        del live_config
    agreement.end(error)


class _Agreement:
    """Exchange of errors between ranks before a partitioned model is created, and after it is loaded.

    A rank that cannot read its files reports it first, so the others do not wait for it in a collective.
    """

    def __init__(self) -> None:
        self._has_begun = False
        self._shared_error: UserError | None = None

    def then_init(self, config_dict_or_path: dict[str, Any]) -> _Init:
        """Exchange errors, then return the context in which transformers creates the model."""
        if not self._has_begun:
            self._has_begun = True
            try:
                raise_together(None)
            except UserError as error:
                self._shared_error = error
                raise
        return _Init(config_dict_or_path)

    def end(self, error: UserError | None) -> None:
        """Raise any rank's error on all ranks, unless all have already raised it."""
        if error is not None and error is self._shared_error:
            raise error
        if error is not None and self._has_begun:  # others may be waiting for this rank's partition of a weight
            raise_from_anywhere(error)
        raise_together(error)


def _fill(setting: str, model: Any, state_dict: dict[str, Any], load_config: Any) -> tuple[list[str], set[str]]:
    """Load the weights as transformers does, after the checks that it skips under ZeRO-3.

    Raises:
        DataError: The weights are not finite or do not match config.json; raised on every rank.
    """
    source = model.config.name_or_path
    name = f"{setting} is {source}"
    require_complete(name, _report(model, state_dict))
    for head, embedding in model.all_tied_weights_keys.items():
        if _differ(*(_stored(model, state_dict, name) for name in (head, embedding))):
            raise untied_weights(name, head, embedding)
    with _requiring_finite(name, source) as require:
        loaded = _load_state_dict_into_zero3_model(model, state_dict, load_config)
        require((key, buffer) for key, buffer in model.named_buffers() if key in state_dict)
    return loaded


@contextmanager
def _requiring_finite(name: str, source: str) -> Iterator[Callable[[Iterable[tuple[str, Tensor]]], None]]:
    """Refuse non-finite parameters, and non-finite tensors given to the yielded function, on every rank at the end.

    Rank 0 checks a module's parameters while they are gathered. If it read every file beforehand, or raised an error in
    between, the other ranks of a large model would wait beyond their timeout.
    """
    plain = nn.Module._load_from_state_dict
    errors: list[UserError] = []

    def require(weights: Iterable[tuple[str, Tensor]]) -> None:
        if not errors:
            try:
                require_finite_weights(name, source, weights)
            except DataError as error:
                errors.append(error)

    def load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        plain(module, state_dict, prefix, *arguments)
        require(module.named_parameters(prefix.rstrip("."), recurse=False))

    with replaced(nn.Module, "_load_from_state_dict", load):
        yield require
    raise_together(errors[0] if errors else None)


def _report(model: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the loading report that transformers gives without ZeRO-3, computed from shapes alone."""
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state_dict.items()}
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True, "device_map": "meta"}
    with _without_zero(), _quietly():
        return type(model).from_pretrained(None, config=deepcopy(model.config), state_dict=shapes, **options)[1]


@contextmanager
def _renaming_as_without_zero() -> Iterator[None]:
    """Keep a stored name if the model has that parameter and not the renamed one.

    transformers does so except under ZeRO-3, where it loses the final norm of DeepSeek-V4.
    """
    plain = core_model_loading.rename_source_key

    def rename(
        source_key: str,
        weight_renamings: list[Any],
        weight_converters: list[Any],
        base_model_prefix: str | None = None,
        meta_state_dict: dict[str, Any] | None = None,
    ) -> tuple[str, str | None]:
        model = base_model_prefix, meta_state_dict
        renamed, pattern = plain(source_key, weight_renamings, weight_converters, *model)
        if meta_state_dict and renamed not in meta_state_dict and source_key in meta_state_dict:
            return plain(source_key, [], [], *model)
        return renamed, pattern

    with replaced(core_model_loading, "rename_source_key", rename):
        yield


@contextmanager
def _without_zero() -> Iterator[None]:
    """Hide the engine's configuration from transformers within the block."""
    known = integrations.deepspeed._hf_deepspeed_config_weak_ref
    integrations.deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integrations.deepspeed._hf_deepspeed_config_weak_ref = known


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence messages that transformers has already logged."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _stored(model: Any, state_dict: dict[str, Any], name: str) -> Tensor | None:
    """Return the stored tensor of a parameter; its stored name may lack the base model's prefix."""
    return state_dict.get(name, state_dict.get(name.removeprefix(f"{model.base_model_prefix}.")))


def _differ(first: Tensor | None, second: Tensor | None) -> bool:
    """Return True if both tensors are stored and differ. Every rank calls this; only rank 0 has the values.

    Non-finite values are ignored here, because NaN differs from itself; they are refused later.
    """
    if first is None or second is None:
        return False
    is_different = first.device.type != "meta" and not torch.equal(first, second)
    is_different = is_different and is_finite(first) and is_finite(second)
    return bool(parallel.max_over_ranks([int(is_different)])[0])


@contextmanager
def creating(engine_config: dict[str, Any]) -> Iterator[None]:
    """Make `from_config` create partitions of the same weights as without ZeRO-3.

    By itself transformers skips what a layer's constructor draws, and draws on the device and in the precision of the
    run, so a seed would give different weights than at other stages.

    Args:
        engine_config: Configuration for deepspeed.initialize; it sets the precision of the partitions.
    """
    with _gathering(_whole_on_host), _Init(engine_config), _returning_memory():
        yield


@contextmanager
def _gathering(weights_of: Callable[[nn.Module], AbstractContextManager[None]]) -> Iterator[None]:
    """Gather a module's weights, with the context `weights_of` returns, when transformers initializes the module."""
    plain = PreTrainedModel._initialize_weights

    def gathered(self: Any, module: nn.Module, is_custom_code: bool = False) -> None:
        if not getattr(module, "_is_hf_initialized", False):
            with weights_of(module):
                plain(self, module, is_custom_code)

    with replaced(PreTrainedModel, "_initialize_weights", gathered):
        yield


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of mallopt
# Thresholds in bytes. By itself malloc grows the threshold up to the second value, and keeps freed blocks below it.
WHILE_BUILDING, AFTERWARDS = 2**20, 32 * 2**20


@contextmanager
def _returning_memory() -> Iterator[None]:
    """Return freed memory to the system at once within the block.

    Otherwise the heap fragments, as partitions that stay lie between full weights that are freed: the 2.5 B shape held
    14 GB on two CPU ranks for partitions of 5 GB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # only glibc has it
    mallopt(MMAP_THRESHOLD, WHILE_BUILDING)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, AFTERWARDS)
        mallopt(TRIM_THRESHOLD, 2 * AFTERWARDS)


class _Init(deepspeed.zero.Init):
    """zero.Init, but with tensors created in fp32 on the host; weights are rounded when they are partitioned.

    DeepSpeed's own creates all tensors in the precision of the run, even buffers, which must stay in fp32.
    """

    def __init__(self, config_dict_or_path: dict[str, Any]):
        super().__init__(config_dict_or_path=config_dict_or_path, tensor_overrides=[])

    def _zero_init_param(self, param: Any) -> None:
        param.data = param.data.to(self.dtype)
        super()._zero_init_param(param)

    def _post_init_method(self, module: nn.Module) -> None:
        super()._post_init_method(module)
        for buffer in module.buffers(recurse=False):  # the engine does not move buffers of a partitioned model
            buffer.data = buffer.data.to(self.local_device)


def _own_weights(module: nn.Module) -> AbstractContextManager[None]:
    """Gather a module's own loaded parameters for reading: initialization may give a buffer their shape."""
    parameters = [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(parameters)


@contextmanager
def _whole_on_host(module: nn.Module) -> Iterator[None]:
    """Gather the parameters that a module may initialize, its own and its children's, for overwriting in fp32."""
    owners = (module, *module.children())
    parameters = dict.fromkeys(parameter for owner in owners for parameter in owner.parameters(recurse=False))
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    formats = [(parameter.device, parameter.dtype) for parameter in partitioned]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        for parameter in partitioned:
            parameter.data = parameter.data.to("cpu", torch.float32)
        yield
        for parameter, (device, dtype) in zip(partitioned, formats, strict=True):
            parameter.data = parameter.data.to(device, dtype)
