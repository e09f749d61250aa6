"""Assignment of GPUs to ranks, and the precisions of a GPU: torch's answers about GPUs are mocked."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from megaft.base.device import device_of, require_own_gpu, require_supported, seed_generators
from megaft.base.errors import ConfigError
from megaft.base.topology import Topology


@pytest.fixture
def gpus(monkeypatch):
    """gpus(2, major=8) makes torch see two GPUs of that compute capability; returns what is made current."""

    def see(count, major=9):
        current = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        one = SimpleNamespace(major=major, uuid="8f1e")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: one)
        monkeypatch.setattr(torch.version, "hip", None)
        return current

    return see


def rank(local_rank):
    return Topology("slurm", 4 + local_rank, local_rank, 8, "n1", 29500)


@pytest.mark.parametrize(
    ("count", "local_rank", "index"),
    [
        pytest.param(1, 0, 0, id="one GPU, one rank"),
        pytest.param(1, 3, 0, id="srun shows each rank its own"),
        pytest.param(4, 3, 3, id="each rank sees all"),
        pytest.param(8, 1, 1, id="more GPUs than ranks"),
    ],
)
def test_a_rank_takes_its_own_gpu(gpus, count, local_rank, index):
    current = gpus(count)
    assert device_of(rank(local_rank)) == torch.device("cuda", index)
    assert current == [index]


@pytest.mark.parametrize(("count", "local_rank"), [(2, 2), (2, 3), (0, 0)])
def test_more_ranks_than_gpus_are_refused(gpus, count, local_rank):
    current = gpus(count)
    with pytest.raises(ConfigError, match=f"local rank {local_rank}, but sees {count} GPUs"):
        device_of(rank(local_rank))
    assert current == []


def test_two_ranks_with_one_gpu_are_refused(gpus):
    gpus(1)
    store, device = HashStore(), torch.device("cuda", 0)
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(require_own_gpu, device, 2, store) for _ in range(2)]
    for error in [rank.exception() for rank in ranks]:  # on both: one alone would look like a lost peer
        assert isinstance(error, ConfigError)
        assert "the GPU 8f1e" in str(error)


def test_ranks_with_a_gpu_each_are_taken(gpus, monkeypatch):
    gpus(2)
    uuids = iter(("8f1e", "77aa"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=next(uuids)))
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(require_own_gpu, torch.device("cuda", index), 2, store) for index in range(2)]
    assert [rank.result() for rank in ranks] == [None, None]


@pytest.mark.parametrize(
    ("major", "is_supported"),
    [pytest.param(7, False, id="V100 and T4 emulate bf16"), pytest.param(8, True, id="A100"), pytest.param(9, True)],
)
def test_bf16_needs_a_gpu_that_has_it(gpus, major, is_supported):
    gpus(1, major)
    if is_supported:
        return require_supported("bfloat16")
    with pytest.raises(ConfigError, match="asks for bfloat16"):
        require_supported("bfloat16")
    require_supported("float32")


def test_seeded_generators_draw_what_manual_seed_gives():
    for seed in (0, 7, 2**63 - 1):
        torch.manual_seed(seed)
        expected = torch.rand(8)
        seed_generators(seed, torch.device("cpu"))
        assert torch.equal(torch.rand(8), expected)


def test_seeding_seeds_this_ranks_gpu(monkeypatch):
    generators = (torch.Generator(), torch.Generator())
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    seed_generators(5, torch.device("cuda", 1))
    assert generators[1].initial_seed() == torch.initial_seed() == 5 != generators[0].initial_seed()
