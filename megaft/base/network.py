"""Network interface between hosts: choose the one that leads to the other hosts, and try it before training.

gloo, which carries what ranks on CPUs and the hosts of GPUs say to each other, takes the address that the host's own
name has. On Debian that is 127.0.1.1, elsewhere it can be another network's: the ranks would then wait for each other
without a word. So the interface that leads to another host is taken. NCCL looks at the interfaces itself and may use
several; its choice is left alone.
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


class Place(NamedTuple):
    """A rank's host, and the address by which that host reaches MASTER_ADDR."""

    host_id: str
    host_name: str
    address: str


def connect_hosts(rank: int, world_size: int, master_addr: str, store: Any) -> None:
    """Choose gloo's interface where the ranks are on several hosts, and connect each host to the next one.

    All ranks call this, with the store at which they met.

    Raises:
        ConfigError: On all ranks, if one host does not reach the next one's interface.
    """
    mine = Place(host_id(), socket.gethostname(), source_address(master_addr))
    main, other = _main_and_other(rank, world_size, store, mine)
    if other is None:
        return
    if GLOO not in os.environ:
        source = source_address(other.address if mine.host_id == main.host_id else master_addr)
        if (name := interface_of(source)) and not ipaddress.ip_address(source).is_loopback:
            os.environ[GLOO] = name
    if trouble := _trouble(rank, world_size, store, mine):
        raise ConfigError(trouble)


def _main_and_other(rank: int, world_size: int, store: Any, mine: Place) -> tuple[Place, Place | None]:
    """Return the main rank's place and the first one on another host."""
    _say(store, f"place/{rank}", mine)
    if rank == 0:
        places = [Place(*_hear(store, f"place/{number}")) for number in range(world_size)]
        others = [place for place in places if place.host_id != mine.host_id]
        _say(store, "places", [mine, *others[:1]])
    main, *others = (Place(*place) for place in _hear(store, "places"))
    return main, others[0] if others else None


def _trouble(rank: int, world_size: int, store: Any, mine: Place) -> str:
    """Let every rank whose neighbour is on another host connect to it; return the first failure of all, or nothing."""
    name = os.environ.get(GLOO, "")
    address = address_of(name.partition(",")[0]) if name else mine.address
    # The kernel accepts what comes while this is open.
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        _say(store, f"listens/{rank}", [mine, name, address, listener.getsockname()[1]])
        _say(store, f"tried/{rank}", _try(rank, (rank + 1) % world_size, store, mine))
        if rank == 0:
            tried = [_hear(store, f"tried/{number}") for number in range(world_size)]
            _say(store, "trouble", next(filter(None, tried), ""))
        trouble = _hear(store, "trouble")
    _say(store, f"heard/{rank}", True)
    if rank == 0:  # the store is gone with it
        for number in range(world_size):
            _hear(store, f"heard/{number}")
    return trouble


def _try(rank: int, neighbour: int, store: Any, mine: Place) -> str:
    place, name, address, port = _hear(store, f"listens/{neighbour}")
    place = Place(*place)
    if place.host_id == mine.host_id:
        return ""
    try:
        if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            raise OSError("a loopback address is each host's own")
        socket.create_connection((address, port), timeout=TRIAL_SECONDS).close()
    except OSError as error:
        return (
            f"rank {rank} on {mine.host_name} does not reach rank {neighbour} on {place.host_name} at {address}:{port} "
            f"({GLOO} is {name!r} there): {error.strerror or error}. On every host set {GLOO} to an interface that "
            f"leads to the others, or leave it unset to take the one that leads to MASTER_ADDR; a firewall must let "
            "the hosts connect to each other at every port."
        )
    return ""


def require_interfaces(environment: Mapping[str, str], backend: str) -> None:
    """Raise ConfigError where gloo's or NCCL's variable names no interface that has an address."""
    names = [name for name in environment.get(GLOO, "").split(",") if name]
    _require(GLOO, names, str.__eq__)
    pattern = environment.get(NCCL, "")
    if backend == "nccl" and not pattern.startswith("^"):  # these would be left out
        names = [name.partition(":")[0] for name in pattern.removeprefix("=").split(",") if name]
        _require(NCCL, names, str.__eq__ if pattern.startswith("=") else str.startswith)


def _require(variable: str, names: list[str], matches: Callable[[str, str], bool]) -> None:
    interfaces = [interface for interface, addresses in psutil.net_if_addrs().items() if _ip_addresses(addresses)]
    for name in names:
        if not any(matches(interface, name) for interface in interfaces):
            raise ConfigError(
                f"{variable} names {name!r}, and {socket.gethostname()} has no such interface with an address; "
                f"it has {', '.join(interfaces)}."
            )


def source_address(destination: str) -> str:
    """Return the address of this host from which packets to `destination` go out; nothing is sent."""
    error = OSError(f"{destination} has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(destination, 9, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, protocol) as asked:
            try:
                asked.connect(address)
                return asked.getsockname()[0]
            except OSError as caught:
                error = caught
    raise error


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in _ip_addresses(addresses):
            return name
    return None


def address_of(interface: str) -> str:
    """Return an interface's first address, IPv4 before IPv6, as gloo does."""
    return _ip_addresses(psutil.net_if_addrs()[interface])[0]


def _ip_addresses(addresses: list[Any]) -> list[str]:
    families = (socket.AF_INET, socket.AF_INET6)
    return [one.address for family in families for one in addresses if one.family == family]


def host_id() -> str:
    """Return an id that ranks which reach each other over loopback share: boot id and network namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}-{os.stat('/proc/self/ns/net').st_ino}"


def _say(store: Any, name: str, value: Any) -> None:
    store.set(f"{KEY}/{name}", json.dumps(value))


def _hear(store: Any, name: str) -> Any:
    return json.loads(store.get(f"{KEY}/{name}"))
