"""A safetensors file written once, synced, and hashed on the way: no second copy of the tensors, no second reading."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor


def write_shard(path: Path, pieces: list[tuple[str, Tensor]]) -> tuple[int, bytes]:
    """Write flat tensors as fp32 into a new safetensors file; return its bytes and SHA-256 once it is on disk.

    A second thread hashes, and is behind or ahead of the disk without either waiting for the other.

    Args:
        path: There must be no such file.
        pieces: Tensors on any device, by the names they get.

    Raises:
        OSError: The disk refuses; nothing of the file is left.
    """
    sha256 = hashlib.sha256()
    try:
        with path.open("xb") as file, ThreadPoolExecutor(1) as hasher:
            header = header_of({name: values.numel() for name, values in pieces})
            hashing = hasher.submit(sha256.update, header)
            file.write(header)
            for _, values in pieces:
                if not values.is_cpu:
                    hashing.result()  # no more than a piece or two of a device's memory is on the host
                data = values.detach().to("cpu", torch.float32).view(torch.uint8).numpy().data
                hashing = hasher.submit(sha256.update, data)
                file.write(data)
            num_bytes = file.tell()
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return num_bytes, sha256.digest()


def header_of(lengths: dict[str, int]) -> bytes:
    """Return the beginning of a safetensors file of flat fp32 tensors: the length of a JSON text, and the text.

    Format: https://github.com/huggingface/safetensors#format
    """
    header, begin = {}, 0
    for name, numel in lengths.items():
        header[name] = {"dtype": "F32", "shape": [numel], "data_offsets": [begin, begin := begin + 4 * numel]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
