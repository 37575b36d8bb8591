"""Where ranks meet."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest

from ecgscale.errors import InputError
from ecgscale_launch import rendezvous
from ecgscale_launch.rendezvous import meeting_environment, meeting_point


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
    assert all(20000 <= port < 32768 for _, port in points)  # from 32768 on, Linux hands them out
    with socket.socket() as one:
        one.bind(points[0])


@pytest.mark.parametrize("taken_at", ["127.0.0.1", ""])
def test_a_port_that_is_taken_is_not_chosen(monkeypatch, taken_at) -> None:
    free = meeting_point("", alone=True)[1]
    with socket.socket() as other:
        other.bind((taken_at, 0))
        other.listen()
        taken = other.getsockname()[1]
        monkeypatch.setattr(rendezvous, "PORTS", [taken, free])
        assert [meeting_point("", alone=True)[1] for _ in range(10)] == [free] * 10
        monkeypatch.setattr(rendezvous, "PORTS", [taken])
        assert meeting_point("", alone=True)[1] not in (0, taken)  # the kernel's choice


def test_what_ranks_are_told() -> None:
    env = meeting_environment(["n1", "n2"], "lo", 0.5)
    assert env.pop("MASTER_PORT").isdecimal()
    assert env == {"MASTER_ADDR": "127.0.0.1", "ECGSCALE_NODES": "n1,n2", "ECGSCALE_MEETING_TIMEOUT_S": "0.5"}


def test_an_unknown_interface_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"network\.interface ib9: .* has no such address; it has .*lo"):
        meeting_point("ib9", alone=False)
