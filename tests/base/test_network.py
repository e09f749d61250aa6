"""Interfaces by name and by route, on an imagined host; tests/promises/test_two_hosts.py has the real ones."""

import socket
from types import SimpleNamespace

import psutil
import pytest

from megaft.base.errors import ConfigError
from megaft.base.network import address_of, interface_of, require_interfaces, source_address


@pytest.fixture(autouse=True)
def interfaces(monkeypatch):
    def has(*addresses):
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [SimpleNamespace(family=one, address=two) for one, two in zip(families, addresses, strict=True)]

    addresses = {
        "lo": has("127.0.0.1", "::1"),
        "ib0": has("fe80::1%ib0", "10.0.0.7"),
        "eth0": has("10.1.0.7"),
        "eth1": [],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)


@pytest.mark.parametrize(
    ("variable", "value", "backend", "wrong"),
    [
        pytest.param("GLOO_SOCKET_IFNAME", "ib0", "gloo", None, id="gloo"),
        pytest.param("GLOO_SOCKET_IFNAME", "eth0,ib0", "nccl", None, id="gloo, two of them"),
        pytest.param("GLOO_SOCKET_IFNAME", "", "gloo", None, id="gloo, empty"),
        pytest.param("GLOO_SOCKET_IFNAME", "eth", "gloo", "eth", id="gloo takes no prefix"),
        pytest.param("GLOO_SOCKET_IFNAME", "ib0,eth1", "gloo", "eth1", id="gloo, no address"),
        pytest.param("NCCL_SOCKET_IFNAME", "eth", "nccl", None, id="NCCL takes a prefix"),
        pytest.param("NCCL_SOCKET_IFNAME", "=eth", "nccl", "eth", id="NCCL, exact"),
        pytest.param("NCCL_SOCKET_IFNAME", "=eth0", "nccl", None, id="NCCL, exact and there"),
        pytest.param("NCCL_SOCKET_IFNAME", "bond0", "nccl", "bond0", id="NCCL, unknown"),
        pytest.param("NCCL_SOCKET_IFNAME", "bond0", "gloo", None, id="NCCL is not asked"),
        pytest.param("NCCL_SOCKET_IFNAME", "^docker,lo", "nccl", None, id="NCCL leaves these out"),
    ],
)
def test_interfaces_that_variables_name(variable, value, backend, wrong):
    if wrong is None:
        require_interfaces({variable: value}, backend)
        return
    with pytest.raises(ConfigError, match=rf"{variable} names '{wrong}', .*one of lo, ib0, eth0,"):
        require_interfaces({variable: value}, backend)


@pytest.mark.parametrize(
    ("address", "interface"),
    [("10.0.0.7", "ib0"), ("10.1.0.7", "eth0"), ("127.0.0.1", "lo"), ("fe80::1%ib0", "ib0"), ("10.9.9.9", None)],
)
def test_interface_of_an_address(address, interface):
    assert interface_of(address) == interface


def test_the_first_address_is_ipv4_as_gloo_takes_it():
    assert address_of("ib0") == "10.0.0.7"


def test_the_address_that_reaches_this_host_is_a_loopback_one():
    assert source_address("127.0.0.1") == "127.0.0.1"
