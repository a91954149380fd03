"""Keys: files that only their owner reads, that ZeroMQ itself reads too, and that nobody overwrites."""

from __future__ import annotations

import errno
import os
import random
import stat
from pathlib import Path

import pytest
import zmq
import zmq.auth

from common.errors import ConfigError
from common.keys import CurveKeys, generate_keys, load_keys


def test_two_sides_get_each_others_public_key(tmp_path: Path) -> None:
    a_public, a_secret = generate_keys(tmp_path / "x", "a")
    b_public, b_secret = generate_keys(tmp_path / "x", "b")
    a, b = load_keys(str(a_secret), str(b_public)), load_keys(str(b_secret), str(a_public))
    assert a.public == b.peer_public
    assert b.public == a.peer_public
    assert a.secret.decode() not in repr(a)
    assert stat.S_IMODE(a_secret.stat().st_mode) == 0o600


def test_zmq_reads_the_files(tmp_path: Path) -> None:
    public, secret = generate_keys(tmp_path, "a")
    keys = load_keys(str(secret), str(public))
    assert zmq.auth.load_certificate(secret) == (keys.public, keys.secret)
    assert zmq.auth.load_certificate(public) == (keys.public, None)


def test_never_overwrites(tmp_path: Path) -> None:
    _, secret = generate_keys(tmp_path, "a")
    before = secret.read_bytes()
    with pytest.raises(ConfigError, match="never overwritten"):
        generate_keys(tmp_path, "a")
    assert secret.read_bytes() == before


def test_half_of_a_pair_of_keys_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk; the secret alone would be in the way of the next try."""
    opened = os.open

    def full(path: Path, *args: int) -> int:
        if ".key" in path.suffixes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, *args)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(ConfigError, match="No space left"):
        generate_keys(tmp_path, "x")
    assert not list(tmp_path.iterdir())


def test_a_kill_in_the_middle_of_making_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a secret key counts as none, and a secret key that is alone gets its public one."""
    directory = tmp_path / "keys"

    class Killed(BaseException):
        pass

    def killed(*_args: object, **_options: object) -> None:
        raise Killed

    for name in ("x", "y"):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Path, "replace", killed)
            generate_keys(directory, name)
    first, _ = generate_keys(directory, "x")
    public, secret = generate_keys(directory, "y")
    before = load_keys(str(secret), str(first))
    public.unlink()
    assert generate_keys(directory, "y", keep=True) == (public, secret)
    assert load_keys(str(secret), str(first)) == before
    assert zmq.auth.load_certificate(public) == (before.public, None)
    assert generate_keys(directory, "y", keep=True) == (public, secret)
    assert load_keys(str(secret), str(first)) == before


def test_everything_wrong_is_named(tmp_path: Path) -> None:
    public, secret = generate_keys(tmp_path, "a")
    secret.chmod(0o644)
    public.write_text('public-key = "short"\n')
    with pytest.raises(ConfigError) as caught:
        load_keys(str(secret), str(public))
    assert len(caught.value.problems) == 2
    assert "other users" in caught.value.problems[0]
    assert "no valid public-key" in caught.value.problems[1]


def test_every_byte_of_the_files(tmp_path: Path) -> None:
    """Detected at the start. Or harmless: the keys are what they were. Of the peer's key that is for it to say, whom
    another one keeps outside (``test_a_wrong_key_stays_outside``): then it is one that ZeroMQ takes."""
    _, secret = generate_keys(tmp_path, "a")
    peer, _ = generate_keys(tmp_path, "b")
    good = load_keys(str(secret), str(peer))
    chance = random.Random(8)
    refused = 0
    for path in (secret, peer):
        data = path.read_bytes()
        for index in range(len(data)):
            path.write_bytes(data[:index] + bytes((data[index] ^ 1 << chance.randrange(8),)) + data[index + 1 :])
            try:
                found = load_keys(str(secret), str(peer))
            except ConfigError:
                refused += 1
                continue
            if path == secret:
                bits = zip(zmq.utils.z85.decode(found.secret), zmq.utils.z85.decode(good.secret), strict=True)
                clamped = [one ^ other for one, other in bits]  # Curve25519 does not look at five bits of a secret
                assert (clamped[0] & ~7, clamped[1:31], clamped[31] & ~192) == (0, [0] * 30, 0), index
                assert found == CurveKeys(good.public, found.secret, good.peer_public), index
            else:
                assert found == CurveKeys(good.public, good.secret, found.peer_public), index
                zmq.utils.z85.decode(found.peer_public)
        path.write_bytes(data)
    assert refused > 150
    assert load_keys(str(secret), str(peer)) == good
