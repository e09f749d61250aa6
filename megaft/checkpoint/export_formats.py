"""Export formats: write a checkpoint of either backend as a transformers folder, and verify the folder against it."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from megaft.base.errors import ConfigError
from megaft.base.gguf import read_header
from megaft.base.host_memory import available_memory
from megaft.checkpoint.export_check import Rows, check_nats, check_nats_from_disk, load_weights
from megaft.config.train import TrainConfig
from megaft.data.tokenizer import AnyTokenizer
from megaft.models import adapters, hugging_face
from megaft.models.offload import num_offloadable, offloaded_model, save_offloaded
from megaft.weights import writing
from megaft.weights.canonical import TransformersView
from megaft.weights.checkpoint_reader import WEIGHT
from megaft.weights.generation_ids import (
    GENERATION,
    follow_tokenizer,
    generation_ids,
    ids_of,
    require_same_generation_ids,
)
from megaft.weights.loading import pretrained, text_model
from megaft.weights.loading.size_limit import FP32_BYTES
from megaft.weights.loading.stored_weights import keep_padding_row
from megaft.weights.loading.trial_model import num_parameters as count_parameters
from megaft.weights.parameters import Weights, load_config, shapes_of
from megaft.weights.provenance import published_name
from megaft.weights.reading import file_of, open_weights
from megaft.weights.writing import rounded

OpenCheckpoint = Callable[[Any], TransformersView]
"""Opens a checkpoint for a transformers configuration."""


class HuggingFaceExport:
    """Export of a run with transformers' modules, block by block if the model does not fit in host memory.

    A model that has adapters, comes from a GGUF file, is part of a composite model, or has buffers or frozen parameters
    in its state cannot be exported block by block, and must fit.
    """

    def __init__(
        self, config: TrainConfig, open_checkpoint: OpenCheckpoint, dtype: torch.dtype, tokenizer: AnyTokenizer
    ) -> None:
        self.config, self.open_checkpoint, self.dtype, self.tokenizer = config, open_checkpoint, dtype, tokenizer

    def write(self, folder: Path) -> None:
        """Write weights, configuration and generation settings; also the adapters separately.

        Raises:
            CheckpointError: The checkpoint is damaged.
            OSError: The folder cannot be written.
        """
        try:
            if self._is_offloaded:
                model = offloaded_model(self._architecture, self._rounded_weight, self.dtype)
                keep_padding_row(model)
                save_offloaded(model, folder)
            else:
                self._write_whole(folder)
        except SafetensorError as error:  # safetensors wraps errors of the disk in it
            raise OSError(str(error)) from error
        _copy_generation(self.config, folder)

    def verify(self, folder: Path, rows: Rows) -> str:
        """Load the export with plain transformers; return the result of the comparison, for the model card.

        Raises:
            DataError: The export begins, ends or pads texts differently than the source.
            NumericsError: Its nats differ from the trained model's.
        """
        if not self._is_offloaded:
            return str(check_nats(lambda: self._rounded_model(folder), folder, rows))
        _check_generation(self.config, self.tokenizer, self._architecture, folder)
        return str(
            check_nats_from_disk(self._architecture, lambda name: self._rounded_weight(name).float(), folder, rows)
        )

    def _write_whole(self, folder: Path) -> None:
        model = self._trained()
        if self.config.model.from_scratch is not None:
            follow_tokenizer(model.config, self.tokenizer.bos_id, self.tokenizer.eos_id)
            model.generation_config = _generation_of(model.config)
        if self.config.lora.rank:
            adapters.save_adapters(model, folder / "adapter", published_name(str(self.config.model.path)))
            model = adapters.merge_adapters(model)
        keep_padding_row(model)
        model.to(self.dtype).save_pretrained(folder)
        text_model.keep_composite_config(model, self.config.model.path, folder)

    @cached_property
    def _is_offloaded(self) -> bool:
        if self.config.lora.rank or not (_has_files(self.config) or self.config.model.from_scratch):
            return False
        if self._architecture.get_text_config() is not self._architecture:  # only the text model may be trained
            return False
        num_parameters = num_offloadable(self._architecture)
        return num_parameters is not None and not has_room_for(num_parameters)

    @cached_property
    def _architecture(self) -> Any:
        return _architecture_of(self.config, self.tokenizer)

    @cached_property
    def _canonical(self) -> TransformersView:
        return self.open_checkpoint(self._architecture)

    def _rounded_weight(self, name: str) -> torch.Tensor:
        return rounded(name, self._canonical.read(name, WEIGHT), self.dtype)

    def _rounded_model(self, folder: Path) -> nn.Module:
        """Return the trained module for the comparison, after checking the export's generation settings."""
        model = self._trained()
        _check_generation(self.config, self.tokenizer, model.config, folder)
        adapters.round_weights(model, self.dtype)
        return hugging_face.NatsModel(model)

    def _trained(self) -> Any:
        """Return the training module with the checkpoint's weights in fp32 and unmerged adapters.

        Raises:
            ConfigError: The model does not fit in host memory.
        """
        gc.collect()  # frees an earlier model
        self._require_room()
        model = hugging_face.build_whole(self.config.model, self.config.lora, self.config.run.seed)
        load_weights(model, self.open_checkpoint(model.config))
        return model

    def _require_room(self) -> None:
        """Refuse to build a model that does not fit in host memory; the system would kill the process."""
        source = self.config.model.path or ""
        is_gguf = source.endswith(".gguf")
        num_parameters = read_header(Path(source)).num_elements if is_gguf else count_parameters(self._architecture)
        num_bytes, room = FP32_BYTES * num_parameters, available_memory()
        if room < num_bytes:
            raise ConfigError(
                f"--run.export is {self.config.run.export}; this model must fit in host memory to be exported (it has "
                f"adapters, frozen parameters or buffers, or comes from a GGUF file): it needs {num_bytes:,} bytes in "
                f"fp32, but {room:,} are free. The checkpoint is intact; run the same command with more memory."
            )


class MegatronExport:
    """Export of a run with megatron-core's modules, parameter by parameter, as the model may exceed host memory."""

    def __init__(
        self, config: TrainConfig, open_checkpoint: OpenCheckpoint, dtype: torch.dtype, tokenizer: AnyTokenizer
    ) -> None:
        self.config, self.dtype, self.tokenizer = config, dtype, tokenizer
        architecture = _architecture_of(config, tokenizer)
        canonical = open_checkpoint(architecture)
        shapes = shapes_of(architecture)
        self.weights = Weights(architecture, torch.float32, shapes, lambda name: canonical.read(name, WEIGHT))

    def write(self, folder: Path) -> None:
        """Write weights, configuration and generation settings.

        Raises:
            CheckpointError: The checkpoint is damaged.
        """
        writing.write_hugging_face(self.weights, folder, self.dtype)
        _copy_generation(self.config, folder)

    def verify(self, folder: Path, rows: Rows) -> str:
        """Load the export with plain transformers, layer by layer if it does not fit in host memory.

        Raises:
            DataError: The export begins, ends or pads texts differently than the source.
            NumericsError: Its nats differ from the trained model's.
        """
        _check_generation(self.config, self.tokenizer, self.weights.config, folder)
        if has_room_for(self.weights.num_parameters):
            return str(check_nats(self._rounded_model, folder, rows))
        return str(check_nats_from_disk(self.weights.config, self._rounded_weight, folder, rows))

    def _rounded_weight(self, name: str) -> torch.Tensor:
        return rounded(name, self.weights.read(name), self.dtype).float()

    def _rounded_model(self) -> nn.Module:
        model = pretrained.new_model(self.weights.config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self._rounded_weight(name))
        return hugging_face.NatsModel(model)


MEMORY_FACTOR = 1.2
"""Host memory needed to compute nats, relative to the size of the model: it includes activations and cached files."""


def has_room_for(num_parameters: int) -> bool:
    """Return True if this host has memory to compute nats with this many parameters in fp32."""
    return available_memory() > MEMORY_FACTOR * FP32_BYTES * num_parameters


def _architecture_of(config: TrainConfig, tokenizer: AnyTokenizer) -> Any:
    """Return transformers' configuration of the exported model."""
    source = config.model.source
    is_megatron = config.model.backend == "megatron" and config.model.path is not None
    architecture = open_weights(source).config if is_megatron else load_config(source)
    pretrained.set_dropout(architecture, config.model.dropout)
    if config.model.from_scratch is not None:
        follow_tokenizer(architecture, tokenizer.bos_id, tokenizer.eos_id)
    return architecture


def _has_files(config: TrainConfig) -> bool:
    return config.model.path is not None and not config.model.path.endswith(".gguf")


def _copy_generation(config: TrainConfig, folder: Path) -> None:
    """Copy the source's generation_config.json."""
    if _has_files(config) and (path := file_of(str(config.model.path), GENERATION)):
        shutil.copyfile(path, folder / GENERATION)


def _check_generation(config: TrainConfig, tokenizer: AnyTokenizer, architecture: Any, folder: Path) -> None:
    if _has_files(config):
        expected = generation_ids(str(config.model.path))
    else:
        if config.model.from_scratch is not None:
            follow_tokenizer(architecture, tokenizer.bos_id, tokenizer.eos_id)
        expected = ids_of(_generation_of(architecture))
    require_same_generation_ids(expected, generation_ids(folder), folder)


def _generation_of(architecture: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig.from_model_config(architecture)
