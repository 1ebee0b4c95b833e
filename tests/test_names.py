"""Which address of a name answers, and when a name is looked up again."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from detcoll import names
from detcoll.names import answering, is_temporary, look_up
from detcoll.rendezvous import sockets
from detcoll.rendezvous.sockets import OwnHost, own_host
from detcoll.testing import ThreadFabric, pattern
from detcoll.transport import TicketStatus
from detcoll_slotted import SlottedTransport
from detcoll_tcp import TcpTransport

Leads = Callable[..., None]


@pytest.fixture
def leads(monkeypatch: pytest.MonkeyPatch) -> Leads:
    """Let a name lead to addresses, or fail first; all others as before."""
    ask = socket.getaddrinfo

    def lead(name: str, addresses: Sequence[str], failures: Sequence[int] = ()) -> None:
        left = list(failures)

        def answer(host: str, *rest: Any, **more: Any) -> list[Any]:
            if host != name:
                return ask(host, *rest, **more)
            if left:
                raise socket.gaierror(left.pop(0), "no answer")
            return [one for address in addresses for one in ask(address, *rest, **more)]

        monkeypatch.setattr(socket, "getaddrinfo", answer)
        monkeypatch.setattr(names, "_ASK_AGAIN_S", 0)

    return lead


@pytest.fixture
def port() -> Iterator[int]:
    """Where somebody listens at 127.0.0.1 alone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_resolver_that_fails_for_now_is_asked_again(leads: Leads) -> None:
    leads("late", ["127.0.0.1"], [socket.EAI_AGAIN] * 3)
    assert look_up("late", 5, 60) == [(socket.AF_INET, ("127.0.0.1", 5))]
    leads("late", ["127.0.0.1"], [socket.EAI_AGAIN] * 2)
    with pytest.raises(OSError, match="no answer") as failed:
        look_up("late", 5, 0)
    assert is_temporary(failed.value)


@pytest.mark.parametrize("name", ["nosuch", "a..b", "x" * 70])
def test_a_name_that_does_not_exist_is_not_asked_for_again(leads: Leads, name: str) -> None:
    leads("nosuch", ["127.0.0.1"], [socket.EAI_NONAME])
    with pytest.raises(OSError, match=r"no answer|no name of a host") as failed:
        look_up(name, 5, 1000)
    assert not is_temporary(failed.value)


@pytest.mark.parametrize("others", [["::1"], ["127.9.9.9", "::1"], ["192.0.2.1"]])
def test_the_address_that_accepts_is_taken(leads: Leads, port: int, others: list[str]) -> None:
    here = (socket.AF_INET, ("127.0.0.1", port))
    leads("both", [*others, "127.0.0.1"])
    assert answering("both", port, 60) == here
    leads("both", ["127.0.0.1", *others])
    assert answering("both", port, 60) == here


def test_where_none_accepts_the_first_is_taken(leads: Leads, port: int) -> None:
    leads("none", ["127.9.9.8", "127.9.9.9"])
    assert answering("none", port, 60)[1][0] == "127.9.9.8"


def test_one_address_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_first_to_accept", None)
    assert answering("127.0.0.1", 9, 60) == (socket.AF_INET, ("127.0.0.1", 9))


@pytest.mark.parametrize(
    ("transport", "address"),
    [(TcpTransport(), "both:{}"), (SlottedTransport(), "tcp://both:{}")],
    ids=["tcp", "slotted"],
)
def test_a_peer_whose_name_leads_to_two_families_is_reached(leads: Leads, transport: Any, address: str) -> None:
    leads("both", ["::1", "127.0.0.1"])
    fabric = ThreadFabric(transport, 2, {})
    fabric.needed = ()
    with fabric:
        for rank in range(2):
            told: Any = fabric[rank]
            told._addresses[1 - rank] = address.format(fabric[1 - rank].address.rpartition(":")[2])
        received = fabric[1].recv(0, 7, 1000)
        sent = fabric[0].send(1, 7, memoryview(pattern(0, 1000)))
        while TicketStatus.PENDING in (sent.status, received.status):
            for rank in range(2):
                fabric[rank].poll(0)
        assert received.view == pattern(0, 1000), received.error


def test_an_advertised_name_is_looked_up_again_until_the_deadline(leads: Leads) -> None:
    leads("late", ["127.0.0.1"], [socket.EAI_AGAIN] * 3)
    assert own_host({"DETCOLL_ADVERTISE": "late"}, 2**62, is_local=True) == OwnHost("late", "127.0.0.1")


def test_a_name_of_both_families_is_listened_for_in_both(leads: Leads) -> None:
    """At addresses that are not of this host."""
    leads("outside", ["203.0.113.5", "2001:db8::5"])
    has_ipv6 = sockets._is_here(socket.AF_INET6, ("::", 0))
    assert own_host({"DETCOLL_ADVERTISE": "outside"}) == OwnHost("outside", "::" if has_ipv6 else "0.0.0.0")
