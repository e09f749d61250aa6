"""Bad checkpoints, folders, disks, peers, batch scripts and numbers: 39 to 42 and 51 to 56."""

import shutil
import socket
import subprocess

import pytest
from bad_inputs import Table
from tiny_models import change_tensors, overflow

TABLE = Table()
refuse = TABLE.refuse


def damaged_shard(workshop, damage):
    """Resume a run whose only checkpoint is damaged."""
    newest = only_checkpoint(workshop)
    damage(newest / "rank-00000.safetensors")
    return workshop.train(steps=6)


def only_checkpoint(workshop):
    *older, newest = sorted(workshop.run().glob("step-*"))
    for folder in older:
        shutil.rmtree(folder)
    return newest


@refuse("39 missing shard", 4, r"step-00000004.*rank-00000\.safetensors is missing.*--run\.fresh")
def _(workshop):
    return damaged_shard(workshop, lambda shard: shard.unlink())


@refuse(
    "40 truncated shard", 4, r"rank-00000\.safetensors has [\d,]+ bytes, but the manifest says [\d,]+.*--run\.fresh"
)
def _(workshop):
    return damaged_shard(workshop, lambda shard: shard.write_bytes(shard.read_bytes()[:-100]))


@refuse("41 zero-byte shard", 4, r"rank-00000\.safetensors has 0 bytes, but the manifest says [\d,]+.*--run\.fresh")
def _(workshop):
    return damaged_shard(workshop, lambda shard: shard.write_bytes(b""))


@refuse(
    "42 flipped bit", 4, r"rank-00000\.safetensors is damaged: its SHA-256 differs from the manifest's.*--run\.fresh"
)
def _(workshop):
    def flip(shard):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)

    return damaged_shard(workshop, flip)


@refuse("42 flipped bit in the manifest", 4, r"manifest\.json is damaged.*--run\.fresh")
def _(workshop):
    manifest = only_checkpoint(workshop) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    return workshop.train(steps=6)


@refuse("51 output folder in use", 2, r"run is in use by .*pid \d+.*; wait until it ends, or choose another folder")
def _(workshop):
    workshop.hold(workshop.folder / "run")
    return workshop.train()


@refuse("51 prepared dataset in use", 2, r"out/data is in use by .*pid \d+.*; wait until it ends, or choose another")
def _(workshop):
    workshop.hold(workshop.folder / "out/data", workshop.folder / "out/data.lock")
    return workshop.prepare(workshop.write("a.txt", "text"))


@refuse("52 disk full while preparing", 2, r"full/data.* cannot be written: No space left on device\. Free space there")
def _(workshop):
    text = workshop.write("a.txt", "some words\n" * 20_000)
    return [*workshop.prepare(text), f"--output={small_disk(workshop, 16) / 'data'}"]


@refuse("52 disk full in a save", 4, r"full/run.*No space left|free.*--")
def _(workshop):
    return [*workshop.train(), f"--run.dir={small_disk(workshop, 600) / 'run'}"]


@refuse(
    "52 read-only disk", 2, r"full/run.* cannot be written: Read-only file system\. Free space there or choose another"
)
def _(workshop):
    folder = small_disk(workshop, 600, "ro")
    return [*workshop.train(), f"--run.dir={folder / 'run'}"]


@refuse("52 read-only disk, evaluated", 2, r"full/evaluation.* cannot be written: Read-only file system\. Free space")
def _(workshop):
    folder = small_disk(workshop, 600, "ro")
    command = workshop.evaluate(workshop.write("a.txt", "some text"), "--context-length=64", "--stride=32")
    return [*command, f"--output={folder / 'evaluation'}"]


@refuse(
    "52 a folder where a file is",
    2,
    r"file/data cannot be written: File exists\. Free space there or choose another folder",
)
def _(workshop):
    blocked = workshop.write("file", "x")
    return [*workshop.prepare(workshop.write("a.txt", "text")), f"--output={blocked / 'data'}"]


def small_disk(workshop, kilobytes, *options):
    """Mount a separate disk; it is unmounted when the test ends."""
    folder = workshop.folder / "full"
    folder.mkdir()
    wanted = ",".join([f"size={kilobytes}k", *options])
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", wanted, "none", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    workshop.at_end(subprocess.run, ["umount", "--lazy", folder], check=True)
    return folder


@refuse("53 a rank missing", 2, r"rank 0 waited 1 seconds at 127\.0\.0\.1:\d+ .*, and 2 of 3 ranks are missing")
def _(workshop):
    workshop.rank(0, 3, MEGAFT_RENDEZVOUS_SECONDS="1")
    return workshop.deepspeed(train_batch_size=6)


@refuse("53 the port in use", 2, r"127\.0\.0\.1:\d+ .* is in use by another program; set MASTER_PORT .*\d+")
def _(workshop):
    port = workshop.rank(0, 2)
    listener = socket.create_server(("127.0.0.1", port))
    workshop.at_end(listener.close)
    return workshop.train()


@refuse(
    "53 a launcher's variable missing", 2, r"RANK is set, but MASTER_ADDR or MASTER_PORT is not; start the ranks with"
)
def _(workshop):
    workshop.environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    return workshop.train()


@refuse("54 bad walltime", 2, r"time is '2h'; use MINUTES, MM:SS, .* for example 12:00:00")
def _(workshop):
    return ["submit", "prepare_data", "--print", "--time=2h"]


@refuse("54 CRLF batch script", 2, r"job\.sbatch:2 .*CR.?LF.*: sed -i")
def _(workshop):
    return ["submit", "--print", str(workshop.write("job.sbatch", "#!/bin/bash\n#SBATCH --nodes=1\r\n"))]


@refuse("55 more nodes than exist", 2, r"--nodes is 6, but partition main has 5; use 5 or less, or another --partition")
def _(workshop):
    sinfo = workshop.write("bin/sinfo", "#!/bin/sh\necho 'main* 5 infinite gpu:4'\n")
    sinfo.chmod(0o755)
    workshop.environment["PATH"] = f"{sinfo.parent}:/usr/bin:/bin"
    return ["submit", "prepare_data", "--print", "--nodes=6"]


@refuse(
    "56 NaN loss",
    5,
    r"non-finite loss at step 2 .*, samples 4-7; the last checkpoint before it is step 1\. "
    r"Lower --optim\.learning-rate",
    leaves=r"run/checkpoints/(latest|step-00000001/manifest\.json)",
)
def _(workshop):
    # Finite, but the steps it takes are not.
    return workshop.train("--optim.name=sgd", "--optim.learning-rate=1e30", "--checkpoint.every=1", steps=6)


@refuse(
    "56 a validation that is not finite",
    5,
    r"validation after step 0 \(there is no checkpoint before it\): --data\.valid .*valid: [\d,]+ of [\d,]+ scored",
    r"non-finite nats; the first is token 0 of document 0",
)
def _(workshop):
    # Training never reads position 40, nor does its gradient change the norm.
    folder = workshop.model()
    change_tensors(folder, lambda tensors: overflow(tensors["transformer.wpe.weight"][40]))
    return workshop.train("--eval.context-length=64", model=folder, valid=workshop.toy.valid)
