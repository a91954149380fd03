"""The faulty TCP proxy against an echo server: every fault, and that healing loses nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from deploy.proxy import Proxy, Target, target_of
from tests.conftest import wait_until


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that sends back what it gets, one thread a connection."""
    connections: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=quiet, args=(connection,), daemon=True).start()

    def quiet(connection: socket.socket) -> None:
        try:
            serve(connection)
        except OSError:
            return

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def receive(connection: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        data = connection.recv(length - len(found))
        if not data:
            break
        found += data
    return found


def nothing_comes(connection: socket.socket) -> bool:
    connection.settimeout(0.2)
    try:
        return connection.recv(1) == b"never"
    except TimeoutError:
        return True
    finally:
        connection.settimeout(10)


def test_bytes_go_through_and_the_end_as_well(echo: tuple[str, int]) -> None:
    with Proxy(echo) as proxy, socket.create_connection(proxy.address, timeout=10) as connection:
        data = bytes(range(256)) * 4096
        threading.Thread(target=connection.sendall, args=(data,)).start()
        assert receive(connection, len(data)) == data
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
        assert proxy.accepted == 1
        assert proxy.forwarded == 2 * len(data)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_cut_holds_back_and_healing_loses_nothing(echo: tuple[str, int], direction: str) -> None:
    with Proxy(echo) as proxy, socket.create_connection(proxy.address, timeout=10) as connection:
        connection.sendall(b"before")
        assert receive(connection, 6) == b"before"
        proxy.cut("forward" if direction == "forward" else "backward" if direction == "backward" else "both")
        connection.sendall(b"meanwhile")
        assert nothing_comes(connection)
        proxy.heal()
        assert receive(connection, 9) == b"meanwhile"


def test_delay_and_rate(echo: tuple[str, int]) -> None:
    with Proxy(echo) as proxy, socket.create_connection(proxy.address, timeout=10) as connection:
        proxy.delay_s = 0.05
        begun = time.monotonic()
        connection.sendall(b"x")
        assert receive(connection, 1) == b"x"
        assert time.monotonic() - begun >= 0.1, "once a direction"
        proxy.heal()
        proxy.rate = 1e6
        begun = time.monotonic()
        threading.Thread(target=connection.sendall, args=(bytes(300_000),)).start()
        assert len(receive(connection, 300_000)) == 300_000
        assert 0.15 < time.monotonic() - begun < 5


def test_reset_breaks_connections_and_new_ones_go_where_the_target_is_now(echo: tuple[str, int]) -> None:
    target: list[Target | None] = [None]
    with Proxy(lambda: target[0]) as proxy:
        with socket.create_connection(proxy.address, timeout=10) as refused:
            with contextlib.suppress(ConnectionResetError):
                assert refused.recv(1) == b""
        target[0] = echo
        with socket.create_connection(proxy.address, timeout=10) as connection:
            connection.sendall(b"x")
            assert receive(connection, 1) == b"x"
            proxy.reset()
            with pytest.raises(ConnectionError):
                wait_until(lambda: connection.send(b"y") == 0, 5, "the end of the connection")


def test_reset_breaks_a_connection_whose_target_is_not_chosen_yet(echo: tuple[str, int]) -> None:
    """What a client that reconnects in the moment of a failover meets: it must be told to come again."""
    choosing, chosen = threading.Event(), threading.Event()

    def choose() -> Target:
        choosing.set()
        chosen.wait(10)
        return echo

    with Proxy(choose) as proxy, socket.create_connection(proxy.address, timeout=10) as connection:
        try:
            assert choosing.wait(10)
            proxy.reset()
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        finally:
            chosen.set()


def test_target_of_uris() -> None:
    assert target_of("nbd+unix:///disk0?socket=/run/nbd.sock") == "/run/nbd.sock"
    assert target_of("nbd://10.0.0.1:1234/disk0") == ("10.0.0.1", 1234)
