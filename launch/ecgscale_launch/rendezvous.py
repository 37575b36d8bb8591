"""Where the ranks meet: an address of this node that the others reach, and a port that is free now."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address

import psutil

from ecgscale.errors import InputError
from ecgscale.training.environment import MEETING_TIMEOUT_S, NODES

PORTS = range(20000, 32768)  # below those that the kernel hands to anyone, perhaps before rank 0 listens
_TRIES = 50


def meeting_environment(nodes: Sequence[str], interface: str, timeout_s: float) -> dict[str, str]:
    """What the ranks on ``nodes`` need to find each other: a fresh meeting point on this node, the first one.

    Raises InputError that names the interfaces there are where ``interface`` is none of them or has no address.
    """
    address, port = meeting_point(interface, alone=len(nodes) == 1)
    env = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return env | {NODES: ",".join(nodes), MEETING_TIMEOUT_S: f"{timeout_s:g}"}


def meeting_point(interface: str, alone: bool) -> tuple[str, int]:
    """An address of this node and a port that is free on it; ``alone`` where no other node takes part."""
    if interface:
        address = _address_of(interface)
    elif alone:
        address = "127.0.0.1"
    else:
        address = _reachable()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        for port in random.SystemRandom().sample(PORTS, min(_TRIES, len(PORTS))):
            with suppress(OSError):  # taken
                free.bind(("", port))  # on all addresses, as rank 0 will
                break
        else:
            free.bind(("", 0))
        chosen: int = free.getsockname()[1]
    return address, chosen


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
