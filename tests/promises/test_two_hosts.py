"""Ranks on two hosts: the losses of one host under every launcher, whatever a host's own name resolves to."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
from faults_hosts import CABLE, DEAD_END, hosts_text

from megaft.base import parallel
from megaft.base.errors import ConfigError

pytestmark = pytest.mark.slow
pytest_plugins = ["two_hosts"]

BIN = Path(sys.executable).parent
PROGRAM = Path(__file__).parents[2] / "megaft" / "train.py"
STEPS = 3
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
TORCHRUN = [BIN / "torchrun", "--nnodes=2", "--nproc-per-node=1"]

LAUNCHERS = {
    "deepspeed --no_ssh": lambda host: [
        *(BIN / "deepspeed", "--hostfile=hostfile", "--no_ssh", f"--node_rank={host}", "--master_addr=node1"),
        *("--master_port=29500", PROGRAM),
    ],
    "torchrun c10d": lambda host: [
        *TORCHRUN,
        *("--rdzv-backend=c10d", "--rdzv-endpoint=node1:29501", "--rdzv-id=first", PROGRAM),
    ],
}
"""The same command on each host, as in docs/multinode.md."""
# Otherwise Open MPI may choose the interface that leads nowhere, and hang or abort.
OPENMPI = ["--mca", "oob_tcp_if_include", CABLE, "--mca", "btl_tcp_if_include", CABLE]
LAUNCHERS_FROM_ONE = {
    "deepspeed over ssh": ("pdsh", [BIN / "deepspeed", "--hostfile=hostfile", "--master_addr=node1", PROGRAM]),
    "mpirun": (
        "mpirun",
        ["mpirun", "--allow-run-as-root", *OPENMPI, "--hostfile", "hostfile", sys.executable, PROGRAM],
    ),
}
"""Required program, and the command on the first host."""


@pytest.fixture(scope="module")
def flags(two_hosts, toy_model, toy_texts):
    settings = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    (two_hosts.folder / "zero1.json").write_text(json.dumps(settings))
    (two_hosts.folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")

    def of(name):
        return [
            *("--deepspeed_config=zero1.json", f"--model.path={toy_model}", f"--data.train={toy_texts[0]}"),
            *("--data.context-length=32", "--model.dropout=0.1", "--run.export=none"),
            *(f"--run.max-steps={STEPS}", f"--run.dir={two_hosts.folder / name}"),
        ]

    return of


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"].hex()) for row in rows]


def trained_in(folder, flags):
    from megaft import train

    os.chdir(folder)
    return train.main(flags)


@pytest.fixture(scope="module")
def on_one_host(two_hosts, flags):
    codes = two_hosts.ranks(trained_in, two_hosts.folder, flags("one"), hosts=(0, 0))
    assert codes == [0, 0]
    expected = losses(two_hosts.folder / "one")
    assert [step for step, _ in expected] == [1, 2, 3]
    return expected


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_command_on_each_host(two_hosts, flags, on_one_host, launcher):
    codes, said = two_hosts.run_on(
        *(0, 1), command=lambda host: [*LAUNCHERS[launcher](host), *flags(launcher)], **ENVIRONMENT
    )
    assert codes == [0, 0], said
    assert losses(two_hosts.folder / launcher) == on_one_host


@pytest.mark.parametrize("launcher", LAUNCHERS_FROM_ONE)
def test_a_command_on_the_first_host(with_ssh, flags, on_one_host, launcher):
    program, command = LAUNCHERS_FROM_ONE[launcher]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    codes, said = with_ssh.run_on(0, command=lambda host: [*command, *flags(launcher.split()[0])], **ENVIRONMENT)
    assert codes == [0], said
    assert losses(with_ssh.folder / launcher.split()[0]) == on_one_host


def summed():
    import torch

    device = parallel.join(parallel.discover(os.environ))
    total = parallel.sum_over_ranks(torch.ones(1, device=device))
    parallel.leave()
    return total.item(), os.environ.get("GLOO_SOCKET_IFNAME")


@pytest.fixture
def own_name_is(two_hosts):
    """own_name_is("127.0.1.1") makes each host's own name resolve to that address, like /etc/hosts."""

    def write(where):
        for number, host in enumerate(two_hosts.hosts):
            address = where.format(number + 1)
            line = f"{host.address} {host.name}\n"
            text = hosts_text(two_hosts.hosts).replace(line, address and f"{address} {host.name}\n")
            host.hosts_file.write_text(text)

    yield write
    for host in two_hosts.hosts:
        host.hosts_file.write_text(hosts_text(two_hosts.hosts))


OWN_NAMES = {"loopback, as Debian writes it": "127.0.1.1", "an interface that leads nowhere": "10.78.{}.1"}


def test_the_interface_that_leads_to_the_other_host_is_taken(two_hosts, own_name_is):
    found = {}
    for case, address in OWN_NAMES.items():
        own_name_is(address)
        for master in ("10.77.0.1", "node1"):  # as the main rank is told
            found[case, master] = two_hosts.ranks(summed, own=({"MASTER_ADDR": master}, {}))
    own_name_is("")
    found["no address"] = two_hosts.ranks(summed)
    assert found == dict.fromkeys(found, [(2.0, CABLE)] * 2)


def test_one_host_keeps_its_own_choice(two_hosts):
    assert two_hosts.ranks(summed, hosts=(0, 0)) == [(2.0, None)] * 2


UNKNOWN, NOWHERE, LOOPBACK = ({"GLOO_SOCKET_IFNAME": name} for name in ("ib7", DEAD_END, "lo"))
WRONG = [
    ((UNKNOWN, UNKNOWN), r"GLOO_SOCKET_IFNAME names 'ib7', .*node\d has .* eth0"),
    ((NOWHERE, NOWHERE), r"rank 1 on node2 at 10\.78\.2\.1:.*GLOO_SOCKET_IFNAME is 'eth1'"),
    ((LOOPBACK, LOOPBACK), r"node2 at 127\.0\.0\.1:.*GLOO_SOCKET_IFNAME is 'lo'.*loopback"),
    (({}, NOWHERE), r"rank 1 on node2 at 10\.78\.2\.1:"),
]
"""Each rank's environment, and the message of both."""


def test_a_wrong_interface_is_named_by_both_ranks(two_hosts):
    for own, message in WRONG:
        for error in two_hosts.ranks(summed, own=own):
            assert isinstance(error, ConfigError)
            assert re.search(message, str(error)), error


def test_an_address_out_of_reach_is_named_in_time(two_hosts):
    began = time.monotonic()
    errors = two_hosts.ranks(summed, MASTER_ADDR="10.78.1.1", MEGAFT_RENDEZVOUS_SECONDS="2")
    assert time.monotonic() - began < 120  # gloo's own limit is half an hour
    assert [type(error) for error in errors] == [ConfigError] * 2
    assert all("waited 2 seconds at 10.78.1.1:" in str(error) for error in errors)
