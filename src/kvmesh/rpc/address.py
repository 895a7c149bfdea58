"""What can be told of two addresses without asking anyone. Resolves no name."""

from __future__ import annotations

from ipaddress import ip_address


def host_of(address: str) -> str:
    """The host of host:port."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def same_host(one: str, other: str) -> bool:
    """True if nothing between the two addresses is a network: equal hosts, or a loopback address among them."""
    hosts = host_of(one), host_of(other)
    return hosts[0] == hosts[1] or any(map(is_loopback, hosts))
