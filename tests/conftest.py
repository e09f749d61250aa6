"""Shared fixtures: corpora, models, and a small launcher of ranks."""

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import parent_process
from pathlib import Path
from tempfile import TemporaryDirectory

import published
import pytest
from faults_hosts import become_root
from filelock import FileLock
from fork_server import CONTEXT
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]

# Calls in the tests' own process are checked against the shapes and dtypes that annotations give; ranks run as ever.
UNCHECKED = {"megaft.run.validation"}  # tests give its functions stand-ins of datasets and samples
MODULES = [
    name
    for path in sorted((ROOT / "megaft").rglob("*.py"))
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
    and (name := ".".join(path.relative_to(ROOT).with_suffix("").parts)) not in UNCHECKED
]
assert MODULES, "no module of megaft has annotations of shapes"
if parent_process() is None:
    become_root()  # to make network namespaces and mount small disks
    install_import_hook(MODULES, "type_checker.checked")

# No example is late on a busy machine.
settings.register_profile("megaft", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("megaft")

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_report_header() -> str | None:
    return None if published.IS_PRESENT else f"{published.ABSENT}: their tests are left out"


def pytest_collection_modifyitems(config, items):
    """Skip tests of absent corpora; start with files that have slow tests, so that the workers finish together."""
    if not published.IS_PRESENT:
        config.hook.pytest_deselected(items=[item for item in items if "shared" in item.fixturenames])
        items[:] = [item for item in items if "shared" not in item.fixturenames]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """Print a failure immediately, so that a truncated log contains it."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.when} of {report.nodeid} failed:\n{report.longreprtext}", flush=True)


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection, which exports run often."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of published corpora and a GPT-2 trained on one; tests that use it are skipped without it."""
    return published.FOLDER


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """make_once("name", make, ...) returns a folder filled by make(folder, ...), once for all workers of a run."""
    parent = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        parent = parent.parent

    def made(name, make, *args):
        folder = parent / "made" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                shutil.rmtree(partial := folder.with_suffix(".partial"), ignore_errors=True)
                make(partial, *args)
                partial.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def corpora(make_once) -> Path:
    """Folder of corpora in the published formats, made from Python's documentation."""
    import corpora

    return make_once("corpora", corpora.write)


@pytest.fixture(scope="session")
def gpt2_bpe(make_once, corpora) -> Path:
    """Folder of a byte-level BPE in GPT-2's files, vocab.json and merges.txt."""
    import trained_gpt2

    return make_once("gpt2-bpe", trained_gpt2.make_vocabulary, _training_text(corpora))


@pytest.fixture(scope="session")
def trained_gpt2(make_once, corpora, gpt2_bpe) -> Path:
    """Folder of a small trained GPT-2 with that tokenizer."""
    import trained_gpt2

    return make_once("trained-gpt2", trained_gpt2.make_model, gpt2_bpe, _training_text(corpora))


def _training_text(corpora: Path) -> str:
    return "".join(
        (corpora / name).read_text(encoding="utf-8") for name in ("wikitext103/wiki.test.tokens", "plain.txt")
    )


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Restore environment variables and compilation after each test, so that no run of one changes another."""
    before = dict(os.environ)
    yield
    if torch := sys.modules.get("torch"):
        torch.compiler.set_stance("default")
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module")
def memory_folder() -> Iterator[Path]:
    """A folder in memory, or on disk if that is full: fsync is free for tests that save often."""
    memory = Path("/dev/shm")
    has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30
    with TemporaryDirectory(dir=memory if has_room else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory) -> Path:
    """Folder of a random two-layer GPT-2 and its tokenizer."""
    import toy

    folder = tmp_path_factory.mktemp("toy") / "model"
    toy.make_model(folder)
    return folder


@pytest.fixture(scope="session")
def toy_texts(tmp_path_factory) -> tuple[Path, Path]:
    """Texts for training and validation."""
    import toy

    return toy.make_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def smollm2_cut(tmp_path_factory) -> Path:
    """GGUF file of SmolLM2's first layers and vocabulary entries, quantized like the published one."""
    import smollm2

    return smollm2.cut(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def export_runs(tmp_path_factory, toy_model, toy_texts, run_ranks) -> dict[str, list[str]]:
    """Flags of toy runs that ended with an export, by name."""
    from export_runs import make_runs

    return make_runs(tmp_path_factory.mktemp("runs"), toy_model, toy_texts, run_ranks)


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(2, function, *args) returns the results of function(*args) on each of 2 CPU ranks.

    The ranks are processes with the environment of a launcher; libraries are imported once, in the fork server.
    """
    from megaft.base.parallel import free_port

    def run(world_size, function, *args):
        port = free_port()
        with ProcessPoolExecutor(world_size, mp_context=CONTEXT) as pool:
            ranks = [pool.submit(_on_rank, rank, world_size, port, function, args) for rank in range(world_size)]
        if errors := [error for rank in ranks if (error := rank.exception())]:
            raise ExceptionGroup(f"{len(errors)} of {world_size} ranks failed", errors)
        return [rank.result() for rank in ranks]

    return run


def _on_rank(rank, world_size, port, function, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    return function(*args)
