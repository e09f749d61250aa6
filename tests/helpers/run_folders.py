"""Readers of a finished run's folder: rows, losses and checkpoint."""

import json

from megaft.weights import manifest as manifest_module


def losses(run_dir):
    return {row["step"]: row["loss"].hex() for row in rows(run_dir) if "loss" in row}


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def shard_hashes(run_dir, step):
    manifest = manifest_module.verify(manifest_module.folder_of(run_dir, step))
    return {name: file["sha256"] for name, file in manifest["files"].items()}
