"""Build and load models partitioned by ZeRO-3 from the start.

A rank never has more than its part of the model and the weights of about a layer, which are gathered to be filled.
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
    """Let `from_pretrained` fill parts: rank 0 maps the files and sends the weights of one module at a time.

    Args:
        engine_config: What deepspeed.initialize gets. Its precision is that of the parts.
        setting: Names the model in messages.

    Raises:
        UserError: On every rank what the body raises on any: the first alone sees what does not fit.
    """
    lives = HfDeepSpeedConfig(engine_config)  # transformers asks whether there is one
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
        del lives
    agreement.end(error)


class _Agreement:
    """Agreement of the ranks before a model is built in parts, and after it was filled.

    What one rank cannot read is found before it would take part in building, for which the others would wait.
    """

    def __init__(self) -> None:
        self._has_begun = False
        self._known: UserError | None = None

    def then_init(self, config_dict_or_path: dict[str, Any]) -> _Init:
        """Return the context in which transformers builds the model: it has found configuration and files."""
        if not self._has_begun:
            self._has_begun = True
            try:
                raise_together(None)
            except UserError as error:
                self._known = error
                raise
        return _Init(config_dict_or_path)

    def end(self, error: UserError | None) -> None:
        """Raise the error of any rank on all, unless all have raised it already."""
        if error is not None and error is self._known:
            raise error
        if error is not None and self._has_begun:  # others may wait for this rank's part of a weight
            raise_from_anywhere(error)
        raise_together(error)


def _fill(setting: str, model: Any, state_dict: dict[str, Any], load_config: Any) -> tuple[list[str], set[str]]:
    """Fill the model as transformers does, after the checks that it leaves out under ZeRO-3.

    Raises:
        DataError: On every rank, where the weights are not finite, or not those of config.json.
    """
    source = model.config.name_or_path
    name = f"{setting} is {source}"
    require_complete(name, _report(model, state_dict))
    for head, embedding in model.all_tied_weights_keys.items():
        if _differ(*(_stored(model, state_dict, name) for name in (head, embedding))):
            raise untied_weights(name, head, embedding)
    with _requiring_finite(name, source) as require:
        found = _load_state_dict_into_zero3_model(model, state_dict, load_config)
        require((key, buffer) for key, buffer in model.named_buffers() if key in state_dict)
    return found


@contextmanager
def _requiring_finite(name: str, source: str) -> Iterator[Callable[[Iterable[tuple[str, Tensor]]], None]]:
    """Refuse parameters that are not finite, and what the yielded function is given, on every rank at the end.

    Rank 0 checks those of a module while it has them whole. To read every file before would keep the other ranks
    waiting beyond their time-out with a large model, and so would an error that rank 0 raised in between.
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
    """Return the loading report that transformers gives without ZeRO-3, for tensors that have shapes and no values."""
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state_dict.items()}
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True, "device_map": "meta"}
    with _without_zero(), _quietly():
        return type(model).from_pretrained(None, config=deepcopy(model.config), state_dict=shapes, **options)[1]


@contextmanager
def _renaming_as_without_zero() -> Iterator[None]:
    """Leave a stored name as it is where the model has it and the family's renaming leads nowhere.

    transformers does so except under ZeRO-3, where the final norm of DeepSeek-V4 gets lost.
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
    """Hide the engine's configuration from transformers in the block."""
    known = integrations.deepspeed._hf_deepspeed_config_weak_ref
    integrations.deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integrations.deepspeed._hf_deepspeed_config_weak_ref = known


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence hints that transformers has logged once already."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _stored(model: Any, state_dict: dict[str, Any], name: str) -> Tensor | None:
    """Return the tensor of a parameter, whose stored name may lack the prefix of the base model."""
    return state_dict.get(name, state_dict.get(name.removeprefix(f"{model.base_model_prefix}.")))


def _differ(first: Tensor | None, second: Tensor | None) -> bool:
    """Return whether both tensors are stored and their values, which only rank 0 has, differ; every rank calls this.

    Values that are not finite are refused later: a NaN does not equal itself.
    """
    if first is None or second is None:
        return False
    is_different = first.device.type != "meta" and not torch.equal(first, second)
    is_different = is_different and is_finite(first) and is_finite(second)
    return bool(parallel.max_over_ranks([int(is_different)])[0])


@contextmanager
def making(engine_config: dict[str, Any]) -> Iterator[None]:
    """Let `from_config` make partitions of the same weights that it makes without ZeRO-3.

    transformers' own way leaves out what a layer's constructor draws, and draws on the device and in the precision of
    the run: the same seed would give other weights than at other stages.

    Args:
        engine_config: What deepspeed.initialize gets. Its precision is that of the parts.
    """
    with _gathering(_whole_on_host), _Init(engine_config), _returning_memory():
        yield


@contextmanager
def _gathering(weights_of: Callable[[nn.Module], AbstractContextManager[None]]) -> Iterator[None]:
    """Gather the weights that `weights_of` names whenever transformers initializes a module."""
    plain = PreTrainedModel._initialize_weights

    def gathered(self: Any, module: nn.Module, is_custom_code: bool = False) -> None:
        if not getattr(module, "_is_hf_initialized", False):
            with weights_of(module):
                plain(self, module, is_custom_code)

    with replaced(PreTrainedModel, "_initialize_weights", gathered):
        yield


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's names of what mallopt sets
# Bytes. malloc comes to the second by itself, and then keeps larger ones.
WHILE_BUILDING, AFTERWARDS = 2**20, 32 * 2**20


@contextmanager
def _returning_memory() -> Iterator[None]:
    """Return freed memory to the system at once in the block.

    Parts that stay lie among whole weights that do not, and holes between them are lost: the 2.5 B shape held 14 GB
    on two CPU ranks where its parts are 5.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # glibc's alone
    mallopt(MMAP_THRESHOLD, WHILE_BUILDING)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, AFTERWARDS)
        mallopt(TRIM_THRESHOLD, 2 * AFTERWARDS)


class _Init(deepspeed.zero.Init):
    """ZeRO-3's construction, but tensors are made as ever, in fp32 on the host; weights are rounded when they are cut.

    DeepSpeed's own makes all of them in the precision of the run, buffers too, which must stay in fp32 there.
    """

    def __init__(self, config_dict_or_path: dict[str, Any]):
        super().__init__(config_dict_or_path=config_dict_or_path, tensor_overrides=[])

    def _zero_init_param(self, param: Any) -> None:
        param.data = param.data.to(self.dtype)
        super()._zero_init_param(param)

    def _post_init_method(self, module: nn.Module) -> None:
        super()._post_init_method(module)
        for buffer in module.buffers(recurse=False):  # the engine moves none of a model in parts
            buffer.data = buffer.data.to(self.local_device)


def _own_weights(module: nn.Module) -> AbstractContextManager[None]:
    """Gather a module's own parameters to be read: they are loaded, and a buffer beside them may take their shape."""
    return deepspeed.zero.GatheredParameters([one for one in module.parameters(recurse=False) if hasattr(one, "ds_id")])


@contextmanager
def _whole_on_host(module: nn.Module) -> Iterator[None]:
    """Gather what a module may initialise, its own parameters and its children's, to be overwritten in fp32."""
    parameters = [one for part in (module, *module.children()) for one in part.parameters(recurse=False)]
    parts = [(one, one.device, one.dtype) for one in dict.fromkeys(parameters) if hasattr(one, "ds_id")]
    with deepspeed.zero.GatheredParameters([one for one, *_ in parts], modifier_rank=0):
        for parameter, *_ in parts:
            parameter.data = parameter.data.to("cpu", torch.float32)
        yield
        for parameter, device, dtype in parts:
            parameter.data = parameter.data.to(device, dtype)
