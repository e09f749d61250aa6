"""Network interface between hosts: choose the one that reaches the other hosts, and test it before training.

gloo carries the collectives of CPU tensors. By default it uses the address of the host's own name, which on Debian is
127.0.1.1 and elsewhere may belong to another network, and the ranks would then hang silently. So megaft selects the
interface that reaches another host. NCCL selects interfaces itself and may use several; its choice is unchanged.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import psutil

from megaft.base.errors import ConfigError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
KEY = "megaft/network"
TRIAL_SECONDS = 10.0
"""Timeout in seconds of a trial connection."""


class RankHost(NamedTuple):
    """Host of a rank, and the address from which it reaches MASTER_ADDR."""

    host_id: str
    host_name: str
    address: str


def connect_hosts(rank: int, world_size: int, master_addr: str, store: Any) -> None:
    """Choose gloo's interface if the ranks are on several hosts, and test the connection from each host to the next.

    All ranks call this with the store of their rendezvous.

    Raises:
        ConfigError: On all ranks, if a host cannot connect to the next host.
    """
    own_host = RankHost(host_id(), socket.gethostname(), source_address(master_addr))
    main, other = _main_and_other(rank, world_size, store, own_host)
    if other is None:
        return
    if GLOO not in os.environ:
        source = source_address(other.address if own_host.host_id == main.host_id else master_addr)
        if (name := interface_of(source)) and not ipaddress.ip_address(source).is_loopback:
            os.environ[GLOO] = name
    if error := _connection_error(rank, world_size, store, own_host):
        raise ConfigError(error)


def _main_and_other(rank: int, world_size: int, store: Any, own_host: RankHost) -> tuple[RankHost, RankHost | None]:
    """Return the main rank's host and the first other host."""
    _say(store, f"host/{rank}", own_host)
    if rank == 0:
        hosts = [RankHost(*_hear(store, f"host/{number}")) for number in range(world_size)]
        others = [host for host in hosts if host.host_id != own_host.host_id]
        _say(store, "hosts", [own_host, *others[:1]])
    main, *others = (RankHost(*host) for host in _hear(store, "hosts"))
    return main, others[0] if others else None


def _connection_error(rank: int, world_size: int, store: Any, own_host: RankHost) -> str:
    """Connect every rank to its neighbor on another host; return the first error of any rank, or an empty text."""
    name = os.environ.get(GLOO, "")
    address = address_of(name.partition(",")[0]) if name else own_host.address
    # The operating system accepts connections while this socket is open.
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        _say(store, f"listens/{rank}", [own_host, name, address, listener.getsockname()[1]])
        _say(store, f"tried/{rank}", _try_connection(rank, (rank + 1) % world_size, store, own_host))
        if rank == 0:
            errors = [_hear(store, f"tried/{number}") for number in range(world_size)]
            _say(store, "error", next(filter(None, errors), ""))
        first_error = _hear(store, "error")
    _say(store, f"heard/{rank}", True)
    if rank == 0:  # the store lives in this process: wait until all have read it
        for number in range(world_size):
            _hear(store, f"heard/{number}")
    return first_error


def _try_connection(rank: int, neighbor: int, store: Any, own_host: RankHost) -> str:
    host, name, address, port = _hear(store, f"listens/{neighbor}")
    host = RankHost(*host)
    if host.host_id == own_host.host_id:
        return ""
    try:
        if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            raise OSError("a loopback address is each host's own")
        socket.create_connection((address, port), timeout=TRIAL_SECONDS).close()
    except OSError as error:
        return (
            f"rank {rank} on {own_host.host_name} cannot reach rank {neighbor} on {host.host_name} at "
            f"{address}:{port} ({GLOO} is {name!r} there): {error.strerror or error}. On every host set "
            f"{GLOO} to an interface that reaches the other hosts, or unset it to use the one that reaches "
            "MASTER_ADDR. The firewall must allow connections between the hosts on every port."
        )
    return ""


def require_interfaces(environment: Mapping[str, str], backend: str) -> None:
    """Raise ConfigError if gloo's or NCCL's variable names an interface that does not exist or has no address."""
    names = [name for name in environment.get(GLOO, "").split(",") if name]
    _require(GLOO, names, str.__eq__)
    pattern = environment.get(NCCL, "")
    if backend == "nccl" and not pattern.startswith("^"):  # ^ excludes interfaces, so these names need not exist
        names = [name.partition(":")[0] for name in pattern.removeprefix("=").split(",") if name]
        _require(NCCL, names, str.__eq__ if pattern.startswith("=") else str.startswith)


def _require(variable: str, names: list[str], matches: Callable[[str, str], bool]) -> None:
    interfaces = [interface for interface, addresses in psutil.net_if_addrs().items() if _ip_addresses(addresses)]
    for name in names:
        if not any(matches(interface, name) for interface in interfaces):
            raise ConfigError(
                f"{variable} names {name!r}, but {socket.gethostname()} has no such interface with an address; "
                f"set it to one of {', '.join(interfaces)}, or unset it."
            )


def source_address(destination: str) -> str:
    """Return the address of this host from which packets to `destination` go out; nothing is sent."""
    error = OSError(f"{destination} has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(destination, 9, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)
                return probe.getsockname()[0]
            except OSError as caught:
                error = caught
    raise error


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has this address; None if no interface has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in _ip_addresses(addresses):
            return name
    return None


def address_of(interface: str) -> str:
    """Return an interface's first address, IPv4 before IPv6, as gloo does."""
    return _ip_addresses(psutil.net_if_addrs()[interface])[0]


def _ip_addresses(addresses: list[Any]) -> list[str]:
    families = (socket.AF_INET, socket.AF_INET6)
    return [entry.address for family in families for entry in addresses if entry.family == family]


def host_id() -> str:
    """Return an ID shared by ranks that can connect over loopback: boot ID and network namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}-{os.stat('/proc/self/ns/net').st_ino}"


def _say(store: Any, name: str, value: Any) -> None:
    store.set(f"{KEY}/{name}", json.dumps(value))


def _hear(store: Any, name: str) -> Any:
    return json.loads(store.get(f"{KEY}/{name}"))
