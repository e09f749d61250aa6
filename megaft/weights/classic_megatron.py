"""Read classic Megatron-LM checkpoints (2019 to 2023): GPT-2 as pickles, one file per tensor-parallel rank.

    FOLDER/latest_checkpointed_iteration.txt             a number, or the word release
    FOLDER/iter_0500000/mp_rank_00/model_optim_rng.pt    or release/...; mp_rank_00_000 with a pipeline rank

Follows Megatron-LM's megatron/checkpointing.py and transformers' convert_megatron_gpt2_checkpoint.py. No code in a
pickle runs: torch's weights_only reader builds tensors and plain values, and turns instances of classes that these
checkpoints are known to contain into `UnpickledObject`, which has none of their code. Any other class is refused.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from megaft.base.errors import DataError
from megaft.base.plural import counted
from megaft.weights.layout import Layout

TRACKER = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")

KNOWN = re.compile(
    r"argparse\.Namespace|(megatron\.)?(fp16(_deprecated)?|model|optimizer)\.loss_scaler\.\w+"
    r"|megatron\.(legacy\.|core\.)?(model\.)?enums\.\w+|megatron\.core\.transformer\.enums\.\w+"
    r"|numpy(\.(_?core\.multiarray\.(_reconstruct|scalar)|ndarray|dtype))"
)
"""Classes in the checkpoints' pickles (settings, loss scalers, random states) whose code is not needed."""

NAMES = (
    (r"^(transformer|encoder)\.", "decoder."),
    (r"\.attention\.", ".self_attention."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.post_attention_layernorm\.", ".pre_mlp_layernorm."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
)
"""Rewrites of Megatron-LM's classic parameter names to megatron-core's."""

GPT2_SETTINGS = {
    **{"swiglu": False, "squared_relu": False, "normalization": "LayerNorm", "add_bias_linear": True},
    **{"apply_residual_connection_post_layernorm": False, "apply_layernorm_1p": False, "num_experts": None},
    **{"use_rotary_position_embeddings": False, "group_query_attention": False, "pipeline_model_parallel_size": 1},
}
"""Megatron-LM settings with which its model is a GPT-2."""


class UnpickledObject:
    """Stand-in for an unpickled object of any class: its state, without its code."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


def is_classic(folder: Path) -> bool:
    """Return True if a folder is, or contains, a classic Megatron-LM checkpoint."""
    return (folder / TRACKER).is_file() or any(folder.glob("mp_rank_*/model*_rng.pt"))


@dataclass(frozen=True, slots=True)
class ClassicCheckpoint:
    """Shards of every tensor-parallel rank, under megatron-core's parameter names."""

    folder: Path
    ranks: list[dict[str, Tensor]]
    version: float
    """Checkpoint version, which determines the row order of queries, keys and values."""
    settings: dict[str, Any] | None
    """Megatron-LM's arguments, if the checkpoint stores them."""

    @staticmethod
    def open(folder: Path) -> ClassicCheckpoint:
        """Open a checkpoint's files. In zip archives, tensors stay on disk until they are read.

        Raises:
            DataError: A file is missing or damaged, contains code, or is not a GPT checkpoint.
        """
        paths = _files(folder)
        states = [read_pickle(path) for path in paths]
        ranks = [_tensors(path, state) for path, state in zip(paths, states, strict=True)]
        version, settings = states[0].get("checkpoint_version", 0), states[0].get("args")
        if version not in (0, 1) and version < 2:
            raise DataError(
                f"{paths[0]} has checkpoint_version {version}; use one saved with version 0, 1.0, 2.0 or 3.0."
            )
        return ClassicCheckpoint(
            folder, ranks, version, vars(settings) if isinstance(settings, UnpickledObject) else None
        )

    def config(self) -> Any:
        """Return transformers' configuration for Megatron-LM's settings.

        Raises:
            DataError: The settings are missing, or the model is not a GPT-2.
        """
        from transformers import GPT2Config

        settings = self._gpt2_settings()
        vocab_size = settings["padded_vocab_size"]
        ending = 50256 if vocab_size > 50256 else None
        is_tanh = settings.get("openai_gelu") or settings.get("bias_gelu_fusion")
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=settings["max_position_embeddings"],
            n_embd=settings["hidden_size"],
            n_layer=settings["num_layers"],
            n_head=settings["num_attention_heads"],
            n_inner=settings.get("ffn_hidden_size"),
            activation_function="gelu_new" if is_tanh else "gelu",
            layer_norm_epsilon=settings.get("layernorm_epsilon", 1e-5),
            resid_pdrop=settings.get("hidden_dropout", 0.1),
            embd_pdrop=settings.get("hidden_dropout", 0.1),
            attn_pdrop=settings.get("attention_dropout", 0.1),
            tie_word_embeddings=not settings.get("untie_embeddings_and_output_weights", False),
            bos_token_id=ending,
            eos_token_id=ending,
        )

    def _gpt2_settings(self) -> dict[str, Any]:
        settings = self.settings or {}
        needed = ("padded_vocab_size", "max_position_embeddings", "hidden_size", "num_layers", "num_attention_heads")
        if missing := [name for name in needed if settings.get(name) is None]:
            raise DataError(
                f"{self.folder} does not describe its model ({missing[0]} is not in its args); give --model-config, "
                "the folder or config.json of a transformers model of the same shape, such as gpt2-medium's."
            )
        for name, expected in GPT2_SETTINGS.items():
            if (settings.get(name) or expected) != expected:
                raise DataError(
                    f"{self.folder} has {name} {settings[name]}; classic checkpoints are "
                    f"read for GPT-2 only, which needs {name} {expected}. Convert it with Megatron-LM's own tools."
                )
        return settings

    def shapes(self, rank: int) -> dict[str, torch.Size]:
        """Return the shapes of a rank's tensors."""
        return {name: tensor.shape for name, tensor in self.ranks[rank].items()}

    def require_known_tensors(self, layout: Layout) -> None:
        """Refuse tensors that the configuration's model does not have, such as those of an extra layer."""
        if unknown := sorted(self.ranks[0].keys() - layout.rules.keys()):
            raise DataError(
                f"{self.folder} contains {counted(len(unknown), 'tensor')} absent from its configuration, such as "
                f"{unknown[0]}. If it is a GPT-2, give the matching --model-config."
            )

    def padded_shapes(self, layout: Layout, expected: dict[str, torch.Size]) -> dict[str, torch.Size]:
        """Return the expected shapes with Megatron-LM's vocabulary rows, padded to a multiple of 128."""
        changed = {}
        for name in (name for name, rule in layout.rules.items() if rule.rows):
            rows = len(self.ranks[0].get(name, ()))
            if rows * len(self.ranks) >= layout.rules[name].rows:
                changed[name] = torch.Size([rows, expected[name][1]])
        return expected | changed

    def read(self, name: str, layout: Layout) -> list[Tensor]:
        """Return every rank's shard of a parameter, with queries, keys and values in megatron-core's order."""
        rule = layout.rules[name]
        shards = [tensors[name].clone() for tensors in self.ranks]
        if not rule.groups:
            return shards
        return [reorder_qkv(shard, self.version, rule.groups // len(shards)) for shard in shards]


def reorder_qkv(tensor: Tensor, version: float, num_heads: int) -> Tensor:
    """Reorder the rows of queries, keys and values to version 2.0's order: by head, then q, k and v, then width.

    Version 0 stores all queries, then all keys, then all values; version 1.0 interleaves the three row by row.
    """
    if version == 0:
        return tensor.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)
    if version == 1:
        return tensor.unflatten(0, (num_heads, -1, 3)).transpose(1, 2).flatten(0, 2)
    return tensor


def _files(folder: Path) -> list[Path]:
    """Return the file of each tensor-parallel rank."""
    inner = folder
    if (folder / TRACKER).is_file():
        step = (folder / TRACKER).read_text(errors="replace").strip()
        inner = folder / (f"iter_{int(step):07d}" if step.isdecimal() else "release")
    files = {match: path for path in inner.glob("mp_rank_*") if (match := _RANK.fullmatch(path.name))}
    ranks = sorted((int(match[1]), path) for match, path in files.items())
    if any(int(match[2] or 0) for match in files):
        raise DataError(f"{inner} is split over pipeline ranks; merge them with the Megatron-LM that wrote it.")
    if not ranks or [rank for rank, _ in ranks] != list(range(len(ranks))):
        raise DataError(
            f"{inner} has {[path.name for _, path in ranks]}; it needs each of mp_rank_00, mp_rank_01, ... once. "
            "Copy the missing folders."
        )
    return [next(folder.glob("model*_rng.pt"), folder / "model_optim_rng.pt") for _, folder in ranks]


@contextmanager
def _allowing_only(classes: Iterable[tuple[type, str]]) -> Iterator[None]:
    """Restrict torch's reader to these classes; libraries such as megatron-core add others when imported."""
    before = get_safe_globals()
    clear_safe_globals()
    add_safe_globals([*classes])
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def read_pickle(path: Path) -> dict[str, Any]:
    """Unpickle a checkpoint's dictionary without running code; objects become UnpickledObject."""
    known: dict[str, None] = {}
    while True:
        try:
            with _allowing_only((UnpickledObject, name) for name in known):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (OSError, RuntimeError, EOFError, KeyError, ValueError, UnpicklingError) as error:
            name = re.search(r"GLOBAL (\S+)", str(error))
            if name is None:
                raise DataError(
                    f"{path} is missing or damaged ({str(error).splitlines()[0]}); copy it again."
                ) from error
            if name[1] in known or not KNOWN.fullmatch(name[1]):
                raise DataError(
                    f"{path} refers to {name[1]}; megaft runs no code from a checkpoint. If you trust the file, load "
                    "it elsewhere and save only its model, args and checkpoint_version."
                ) from error
            known[name[1]] = None


def _tensors(path: Path, state: Any) -> dict[str, Tensor]:
    """Return a rank's tensors under megatron-core's names."""
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise DataError(
            f"{path} has no dictionary named model; save it without virtual pipeline stages, which are not supported."
        )
    return {_core_name(name): tensor for name, tensor in _flat(state["model"].get("language_model", {})).items()}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested dictionaries, with keys joined by dots."""
    tensors = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            tensors |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor) and value.is_floating_point():
            tensors[f"{prefix}{key}"] = value
    return tensors


def _core_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name
