"""Where the ranks meet: an address of this node that the others reach, and a port that is free now."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import psutil

from ecgscale.errors import InputError


def meeting_point(interface: str, alone: bool) -> tuple[str, int]:
    """MASTER_ADDR and a fresh MASTER_PORT; ``alone`` where no other node takes part.

    Raises InputError that names the interfaces there are where ``interface`` is none of them or has no address.
    """
    if interface:
        address = _address_of(interface)
    elif alone:
        address = "127.0.0.1"
    else:
        address = _reachable()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        free.bind((address, 0))
        port: int = free.getsockname()[1]
    return address, port


def _address_of(interface: str) -> str:
    found = _addresses()
    if interface not in found:
        known = ", ".join(sorted(found)) or "none"
        raise InputError(f"network.interface {interface}: {socket.gethostname()} has no such address; it has {known}")
    return found[interface]


def _reachable() -> str:
    """What the host's name stands for, if others can reach that; else the first interface that is up."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if not ip_address(address).is_loopback:
        return address
    return next((one for one in _addresses().values() if not ip_address(one).is_loopback), address)


def _addresses() -> dict[str, str]:
    """The IPv4 address (or else the global IPv6 one) of each interface that is up."""
    up = {name for name, about in psutil.net_if_stats().items() if about.isup}
    found: dict[str, str] = {}
    for family in (socket.AF_INET6, socket.AF_INET):
        for name, addresses in psutil.net_if_addrs().items():
            own = [one.address for one in addresses if one.family == family and "%" not in one.address]
            if name in up and own:
                found[name] = own[0]
    return found
