"""Where ranks meet."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest

from ecgscale.errors import InputError
from ecgscale_launch.rendezvous import meeting_point


def test_the_address_of_an_interface() -> None:
    assert meeting_point("lo", alone=False)[0] == "127.0.0.1"


def test_alone_nobody_else_can_reach_it() -> None:
    assert meeting_point("", alone=True)[0] == "127.0.0.1"


def test_with_others_the_address_is_one_that_they_reach_where_there_is_one() -> None:
    import psutil

    up = {name for name, about in psutil.net_if_stats().items() if about.isup}
    own = [one.address for name in up for one in psutil.net_if_addrs()[name] if one.family == socket.AF_INET]
    reachable = [address for address in own if not ip_address(address).is_loopback]
    address, _ = meeting_point("", alone=False)
    assert not reachable or not ip_address(address).is_loopback


def test_the_port_is_free_and_another_each_time() -> None:
    points = [meeting_point("", alone=True) for _ in range(20)]
    assert len({port for _, port in points}) > 10
    with socket.socket() as one:
        one.bind(points[0])


def test_an_unknown_interface_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"network\.interface ib9: .* has no such address; it has .*lo"):
        meeting_point("ib9", alone=False)
