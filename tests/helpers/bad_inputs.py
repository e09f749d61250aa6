"""Cases of the bad-input tests: commands in subprocesses, and a factory of broken inputs."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from itertools import count
from pathlib import Path

from fork_server import CONTEXT

NUMBERS = count()
EVALUATE = "evaluate_zero_shot.__main__"


@dataclass(frozen=True, slots=True)
class Done:
    """Exit code and output of a command."""

    code: int | None
    out: str
    err: str


@dataclass(kw_only=True)
class Running:
    """A running command."""

    process: object
    out: Path
    err: Path

    def wait(self, seconds=180.0):
        self.process.join(seconds)
        is_late = self.process.is_alive()
        done = self.kill()
        assert not is_late, f"still running after {seconds} s: {done}"
        return done

    def kill(self):
        self.process.kill()
        self.process.join()
        return Done(self.process.exitcode, self.out.read_text(), self.err.read_text())


def start(command, folder, environment=None, before=None):
    """Start `megaft ...` or `evaluate ...` in a child of the fork server, which has the libraries imported."""
    number = next(NUMBERS)
    out, err = folder / f"{number}.out", folder / f"{number}.err"
    process = CONTEXT.Process(target=_run, args=(list(command), folder, out, err, environment or {}, before))
    process.start()
    return Running(process=process, out=out, err=err)


def _run(command, folder, out, err, environment, before):
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(folder)
    os.environ.update(environment)
    if before is not None:
        before()
    is_evaluation = command[0] == "evaluate"
    sys.argv = command
    sys.exit(import_module(EVALUATE if is_evaluation else "megaft.cli").main(command[is_evaluation:]))


def _hold(folder, file, held, stop):
    from megaft.base.lock import locked

    with locked(folder, file=file):
        held.set()
        stop.wait(600)


def trusted(folder):
    """Return the hashes of files that a later run would accept as finished: receipts, checkpoints, exports, results."""
    files = (path for path in folder.rglob("*") if path.is_file() and _is_trusted(path))
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def _is_trusted(path):
    is_receipt = path.suffix == ".json" and path.with_suffix(".bin").exists()
    return (
        is_receipt or path.name in ("latest", "manifest.json", "results.json", "report.html") or "export" in path.parts
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One bad input: the command that reads it, and the expected answer."""

    id: str
    code: int
    said: tuple[str, ...]
    """Pattern of the message: file or setting, value, rule, fix."""
    make: Callable
    """Function from a Workshop to the command."""
    leaves: str = "nothing"
    """Pattern of files that may be created: a checkpoint from before a loss went wrong."""
    before: Callable | None = None
    """Function that first runs in the command's process, to hide a feature of this machine."""


class Table:
    """Cases, collected by a decorator on their commands."""

    def __init__(self):
        self.cases = []

    def refuse(self, id, code, *said, **options):
        def add(make):
            self.cases.append(Case(id=id, code=code, said=said, make=make, **options))
            return make

        return add


@dataclass(frozen=True)
class Toy:
    """Valid inputs, made once: a model, a sentencepiece model, prepared texts, a finished run."""

    model: Path
    sentencepiece: Path
    train: Path
    valid: Path
    run: Path


TRAIN_JSON = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 1},
}


class Workshop:
    """Factory of files in its own folder, and of commands that are valid except for a case's change."""

    def __init__(self, folder, toy):
        self.folder, self.toy, self.environment = folder, toy, {}
        self._at_end = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._at_end.close()

    def at_end(self, function, *arguments, **options):
        """Call a function when the test has ended."""
        self._at_end.callback(function, *arguments, **options)

    def write(self, name, content):
        """Write a file, text as UTF-8."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def prepare(self, *inputs, tokenizer=None, flags=()):
        return [
            *("prepare", *map(str, inputs), f"--output={self.folder / 'out/data'}"),
            *(f"--tokenizer={tokenizer or self.toy.model}", *flags),
        ]

    def prepared(self, name, text, *flags):
        """Prepare a valid text; return the prefix."""
        prefix = self.folder / name
        command = ["prepare", str(text), f"--output={prefix}", f"--tokenizer={self.toy.model}", *flags]
        done = start(command, self.folder).wait()
        assert done.code == 0, done
        return prefix

    def train(self, *flags, model=None, data=None, valid=None, deepspeed=None, steps=2):
        settings = self.write("deepspeed.json", json.dumps(TRAIN_JSON if deepspeed is None else deepspeed))
        named = [f"--model.path={model or self.toy.model}"]
        return [
            *("train", f"--deepspeed-config={settings}", f"--run.dir={self.folder / 'run'}"),
            *([] if any(flag.startswith("--model.") for flag in flags) else named),
            *(f"--data.train={data or self.toy.train}", *([f"--data.valid={valid}"] if valid else [])),
            *([] if any(flag.startswith("--data.context-length") for flag in flags) else ["--data.context-length=32"]),
            *(f"--run.max-steps={steps}", "--optim.schedule=constant", *flags),
        ]

    def deepspeed(self, **changes):
        """Train with a changed DeepSpeed JSON; None removes a key."""
        merged = TRAIN_JSON | changes
        return self.train(deepspeed={key: value for key, value in merged.items() if value is not None})

    def evaluate(self, data, *flags, model=None):
        return [
            *("evaluate", f"--model={model or self.toy.model}", f"--data={data}", "--task=text"),
            *(f"--output={self.folder / 'evaluation'}", *flags),
        ]

    def generate(self, model):
        return ["generate", f"--model={model}", "--prompt=Python is", "--max-new-tokens=2"]

    def model(self, **changes):
        """Copy the model's folder with a changed config.json."""
        folder = self.folder / "model"
        shutil.copytree(self.toy.model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    def copy(self, prefix, name="copy"):
        """Copy a prepared dataset."""
        for path in prefix.parent.glob(f"{prefix.name}.*"):
            shutil.copyfile(path, self.folder / f"{name}{path.name.removeprefix(prefix.name)}")
        return self.folder / name

    def hold(self, folder, file=None):
        """Hold the lock of a folder, as another process does."""
        stop = CONTEXT.Event()
        held = CONTEXT.Event()
        process = CONTEXT.Process(target=_hold, args=(folder, file, held, stop))
        process.start()
        self.at_end(process.join)
        self.at_end(stop.set)
        assert held.wait(120)

    def rank(self, rank, world_size, **environment):
        """Act as one rank of several; return the port of their rendezvous."""
        from megaft.base.parallel import free_port

        port = free_port()
        self.environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        self.environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
        return port

    def run(self):
        """Copy the finished run; return the folder of its checkpoints."""
        shutil.copytree(self.toy.run, self.folder / "run")
        return self.folder / "run" / "checkpoints"
