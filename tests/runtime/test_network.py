"""Which device leads to other machines, and which connections notice that one is gone."""

import os
import socket
import sys

import pytest

from rlhf.runtime import network

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
DEVICES = {("lo", "127.0.0.1"), ("lo", "::1"), ("eth0", "10.0.0.1"), ("eth0", "fd00::1"), ("ib0", "10.1.0.1")}


@pytest.fixture
def chosen(monkeypatch):
    """The device for a machine with these devices, which others see by this address."""

    def choose(devices, own):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it will be as it was
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
        monkeypatch.setattr(network, "_devices", lambda: devices)
        monkeypatch.setattr(network, "_own_address", lambda other: own)
        network.choose_device("host1")
        return os.environ["GLOO_SOCKET_IFNAME"]

    return choose


@pytest.mark.parametrize(("own", "device"), [("10.0.0.1", "eth0"), ("10.1.0.1", "ib0"), ("fd00::1", "eth0")])
def test_gloo_uses_the_device_that_leads_to_the_others(chosen, own, device):
    assert chosen(DEVICES, own) == device


@pytest.mark.parametrize("own", ["127.0.1.1", ""])
def test_a_name_that_stands_for_loopback_is_no_matter_where_there_is_one_device(chosen, own):
    assert chosen({pair for pair in DEVICES if pair[0] != "ib0"}, own) == "eth0"


def test_where_it_is_not_clear_the_choice_is_asked_for(chosen):
    with pytest.raises(ValueError, match=r"MASTER_ADDR=host1: .* set GLOO_SOCKET_IFNAME on .* to eth0 or ib0"):
        chosen(DEVICES, "127.0.1.1")


def test_a_choice_of_the_users_stays(chosen, monkeypatch):
    monkeypatch.setattr(network, "_devices", lambda: pytest.fail("looked"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    network.choose_device("host1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_devices_and_the_way_to_this_machine_are_found():
    assert ("lo", "127.0.0.1") in network._devices()
    assert network._own_address("127.0.0.1") == "127.0.0.1"


def test_connections_are_asked_whether_the_other_side_is_there():
    options = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT]
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        network.notice_lost_machines()
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle, between, probes, unconfirmed = (client.getsockopt(socket.IPPROTO_TCP, option) for option in options)
        assert idle + between * probes == unconfirmed / 1000 == network.GONE_AFTER_S < 30
        client.sendall(b"still open")
