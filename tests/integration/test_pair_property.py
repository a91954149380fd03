"""Any requests on both sides of a running pair, against the most stupid model: two byte strings a volume.

``disk`` is what the primary holds, ``view`` what the guest of the secondary sees; a checkpoint copies one to the other.
Requests have any offset and length, preferably around the borders of blocks and the end of a volume whose size is no
multiple of anything; those of both sides are in flight at the same time. Blocks of 512 bytes to 1 MiB.

An example keeps to the first and the last quarter of the volume, so that the hidden disk does not fill up: else the
primary would take checkpoints that the model does not know of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from common.nbd_client import NbdClient
from deploy.pair import Pair, PairOptions
from tests import pairs
from tests.heart import pattern
from tests.pairs import MIB

SIZES = {512: 70_001, 4096: MIB + 1234, 65536: 3 * MIB + 65535, MIB: 24 * MIB + 1}
"""Of the volume, by block size."""
EXAMPLES = 8

Side = Literal["primary", "guest"]


class Step(NamedTuple):
    """One request. ``where`` and ``extent`` become offset and length once the volume is known, see ``place``."""

    side: Side
    kind: Literal["write", "zero", "trim", "read", "flush", "checkpoint"]
    where: tuple[float, int]
    extent: tuple[float, int]
    flag: bool


fractions = st.sampled_from((0.0, 0.125, 0.5, 0.75, 0.999)) | st.floats(0, 0.9999)
nudges = st.sampled_from((0, 0, 1, -1, 511, 512, -513))
steps = st.lists(
    st.builds(
        Step,
        st.sampled_from(("primary", "guest")),
        st.sampled_from(("write", "write", "write", "zero", "trim", "read", "flush", "checkpoint")),
        st.tuples(fractions, nudges),
        st.tuples(st.sampled_from((0.0, 0.01, 0.3)) | st.floats(0, 1), nudges),
        st.booleans(),
    ),
    min_size=1,
    max_size=40,
)


def place(step: Step, size: int, block: int) -> tuple[int, int]:
    """Offset and length: a border of blocks and a bit beside it, some blocks and a bit more or less.

    In the first or the last quarter, which begin and end with a border or with the volume.
    """
    quarter = size // block // 4
    start, end = (0, quarter * block) if step.where[0] < 0.5 else (3 * quarter * block, size)
    fraction = step.where[0] * 2 % 1
    offset = min(max(start, start + int(fraction * (end - start)) // block * block + step.where[1]), end - 1)
    longest = min(end - offset, MIB)
    return offset, min(max(1, int(step.extent[0] * longest) + step.extent[1]), longest)


class Model:
    """A running pair with a client on each side, and what both must see."""

    def __init__(self, pair: Pair, block: int, clients: dict[Side, NbdClient]) -> None:
        self.pair = pair
        self.block = block
        self.clients = clients
        self.size = clients["primary"].size
        self.seed = 0
        self.number = 0
        self.in_flight = 0
        self.contents: dict[Side, bytearray] = {}

    def begin(self) -> None:
        """Every example starts with the same contents on both sides, most of them a hole."""
        primary = self.clients["primary"]
        primary.trim(0, self.size)
        first = pattern(self.size // 8, 7)
        primary.write(0, first)
        self.contents["primary"] = bytearray(first + bytes(self.size - len(first)))
        self.seed = 0
        self.checkpoint()

    def checkpoint(self) -> None:
        self.settle()
        self.number = self.pair.checkpoint().number
        self.contents["guest"] = bytearray(self.contents["primary"])

    def settle(self) -> None:
        """Until everything in flight is answered, and well."""
        self.in_flight = 0
        for client in self.clients.values():
            for completion in client.collect_all():
                assert completion.error is None

    def do(self, step: Step) -> None:
        client, contents = self.clients[step.side], self.contents[step.side]
        offset, length = place(step, self.size, self.block)
        self.in_flight += length // self.block + 2
        if self.in_flight > self.size // self.block // 4:
            self.settle()  # blocks on their way count as if each were another one
        self.seed += 1
        match step.kind:
            case "write":
                data = pattern(length, self.seed)
                client.submit_write(offset, data, fua=step.flag)
                contents[offset : offset + length] = data
            case "zero":
                client.submit_zero(offset, length, no_hole=step.flag)
                contents[offset : offset + length] = bytes(length)
            case "trim":
                client.submit_trim(offset, length)
                if step.side == "primary":  # a hint: a file has a hole then, and the active disk knows no holes
                    contents[offset : offset + length] = bytes(length)
            case "flush":
                client.submit_flush()
            case "read":
                self.settle()
                assert client.read(offset, length) == contents[offset : offset + length]
            case "checkpoint":
                self.checkpoint()
        client.send()

    def check(self) -> None:
        """Everything, everywhere."""
        self.settle()
        assert self.pair.status()["secondary"]["checkpoint"] == self.number, "one that the model does not know of"
        for side, client in self.clients.items():
            assert pairs.read_all(client) == self.contents[side], side
        assert pairs.secondary_disk(self.pair).read_bytes() == self.contents["primary"]


@contextmanager
def model(directory: Path, block: int) -> Iterator[Model]:
    directory.mkdir(exist_ok=True)
    disks = [directory / f"{side}.raw" for side in "ab"]
    for disk in disks:
        with disk.open("wb") as file:
            file.truncate(SIZES[block])
    options = PairOptions(
        primary_disks=(disks[0],), secondary_disks=(disks[1],), assume_synced=True, block_size=block,
        buffer_bytes=64 * MIB,
    )  # fmt: skip
    with pairs.running(directory / "p", options) as pair, ExitStack() as stack:
        uris: dict[Side, str] = {"primary": pairs.primary_uri(pair), "guest": pairs.guest_uri(pair)}
        yield Model(pair, block, {side: stack.enter_context(NbdClient(uri)) for side, uri in uris.items()})


@pytest.mark.parametrize("block", sorted(SIZES))
def test_any_requests_on_both_sides(short_dir: Path, block: int) -> None:
    with model(short_dir / "m", block) as made:

        @settings(
            max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None,
            phases=(Phase.generate, Phase.shrink),
        )  # fmt: skip
        @given(steps)
        def check(taken: list[Step]) -> None:
            made.begin()
            for step in taken:
                made.do(step)
            made.check()

        check()
        assert made.pair.status()["secondary"]["error"] is None
        assert made.pair.status()["counters"]["primary"]["cuts"] == 0
