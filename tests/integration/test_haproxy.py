"""HAProxy by the configuration in deploy/examples leads clients to whoever leads, before and after a failover."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigError, TandemDiskError
from common.nbd_client import NbdClient
from deploy.examples.haproxy import Haproxy, require_haproxy
from deploy.pair import PairOptions
from tests import pairs
from tests.conftest import wait_until


def test_clients_are_led_to_whoever_leads(short_dir: Path) -> None:
    """Never to the guest's view of a side that was not promoted, whatever a client tries in between."""
    try:
        require_haproxy()
    except ConfigError as error:
        pytest.skip(str(error))
    with pairs.running(short_dir / "p", PairOptions(size=8 * pairs.MIB, mode="sync")) as pair:
        pair.checkpoint()
        with Haproxy(pair, short_dir) as way:
            with NbdClient(way.uri()) as client:
                client.write(0, b"through HAProxy")
            before = pair.status()["buffer"]["active_bytes"]
            pairs.kill_primary(pair)
            with pytest.raises(TandemDiskError), NbdClient(way.uri()) as client:
                client.write(4096, b"nobody leads")
            assert pair.status()["buffer"]["active_bytes"] == before == 0
            pair.failover("latest")

            def served() -> bool:
                try:
                    with NbdClient(way.uri()) as client:
                        client.write(8192, b"goes on")
                        return client.read(0, 15) == b"through HAProxy"
                except TandemDiskError:
                    return False

            wait_until(served, 20, "being led to the promoted side")
        assert pairs.contents(pairs.guest_uri(pair))[8192:8199] == b"goes on"
