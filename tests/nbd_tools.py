"""The NBD clients that people use, run against any export URI: libnbd's tools, qemu-img, qemu-io, fio.

Every function raises ClientFailed with the command's output if the client is not content. ``require`` skips a test
whose client is not installed, naming it; in continuous integration (CI=true) that is a failure, since everything is
there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 60.0
SYSTEM_PYTHON = "/usr/bin/python3"
"""Where a distribution's python3-libnbd can be imported."""


class ClientFailed(AssertionError):
    """A client ended with another status than was expected, or said something else."""


def require(*tools: str) -> None:
    """Skip the test, naming the first of ``tools`` that is not installed; fail instead where CI=true."""
    for tool in tools:
        if shutil.which(tool) is None:
            _missing(f"{tool} is not installed")


def require_libnbd_python() -> None:
    """Like ``require`` for the module ``nbd`` of the system's Python."""
    require(SYSTEM_PYTHON)
    if subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, check=False).returncode:
        _missing(f"python3-libnbd is not importable by {SYSTEM_PYTHON}")


def _missing(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def run(command: Sequence[str | Path], *, status: int | None = 0, timeout_s: float = TIMEOUT_S) -> str:
    """Run ``command``; its standard output. Any status but ``status`` is ClientFailed; None allows all."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ClientFailed(f"{words} did not end within {timeout_s:g} s: {error.stdout!r} {error.stderr!r}") from None
    if status is not None and done.returncode != status:
        raise ClientFailed(f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def nbdinfo(uri: str) -> dict[str, Any]:
    """What ``nbdinfo --json`` says about the export."""
    require("nbdinfo")
    export: dict[str, Any] = json.loads(run(["nbdinfo", "--json", uri]))["exports"][0]
    return export


def nbdinfo_list(uri: str) -> list[str]:
    """The names that ``nbdinfo --list`` finds at the server of ``uri``."""
    require("nbdinfo")
    return [export["export-name"] for export in json.loads(run(["nbdinfo", "--list", "--json", uri]))["exports"]]


def nbdinfo_map(uri: str) -> list[tuple[int, int, int]]:
    """(offset, length, flags) of all extents that ``nbdinfo --map`` tells."""
    require("nbdinfo")
    extents = json.loads(run(["nbdinfo", "--map", "--json", uri]))
    return [(extent["offset"], extent["length"], extent["type"]) for extent in extents]


def nbdcopy(
    source: str | Path, target: str | Path, *, connections: int = 4, requests: int = 16, flush: bool = True
) -> None:
    """Copy between files and URIs with several connections."""
    require("nbdcopy")
    options = [f"--connections={connections}", f"--requests={requests}", *(["--flush"] if flush else [])]
    run(["nbdcopy", *options, source, target])


def qemu_img_convert(source: str | Path, target: str | Path, *, sparse: bool = True) -> None:
    """``qemu-img convert`` of raw images; ``-n`` when the target is a URI, which exists already."""
    require("qemu-img")
    existing = ["-n"] if "://" in str(target) else []
    run(["qemu-img", "convert", *existing, "-f", "raw", "-O", "raw", *([] if sparse else ["-S", "0"]), source, target])


def qemu_img_compare(one: str | Path, other: str | Path) -> None:
    """ClientFailed unless both hold the same bytes."""
    require("qemu-img")
    run(["qemu-img", "compare", "-f", "raw", "-F", "raw", one, other])


def qemu_img_map(uri: str | Path) -> list[dict[str, Any]]:
    """What ``qemu-img map`` tells of the extents."""
    require("qemu-img")
    extents: list[dict[str, Any]] = json.loads(run(["qemu-img", "map", "--output=json", "-f", "raw", uri]))
    return extents


def qemu_img_bench(uri: str, *, count: int = 2000, depth: int = 32, write: bool = True) -> None:
    """``qemu-img bench``: many requests of 4 KiB, a flush now and then while writing."""
    require("qemu-img")
    writing = ["-w", "--flush-interval=500"] if write else []
    run(["qemu-img", "bench", "-f", "raw", "-c", str(count), "-d", str(depth), "-s", "4096", *writing, uri])


def qemu_io(uri: str, *commands: str, read_only: bool = False, fails: bool = False) -> str:
    """Run ``commands`` in one ``qemu-io``; its output. What fails is ClientFailed; with ``fails``, what does not."""
    require("qemu-io")
    words: list[str] = [word for command in commands for word in ("-c", command)]
    output = run(["qemu-io", "-f", "raw", *(["-r"] if read_only else []), *words, uri], status=None)
    failed = "verification failed" in output or "failed:" in output or "error" in output.lower()
    if failed != fails:
        raise ClientFailed(f"qemu-io {commands} on {uri}:\n{output}")
    return output


def fio_verify(
    uri: str, *, size: int, depth: int = 32, block: str = "4k", pattern: str = "randwrite", directory: Path
) -> None:
    """fio writes ``size`` bytes with crc32c headers at ``depth`` and reads all of them back."""
    require("fio")
    words = [
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", f"--rw={pattern}", f"--bs={block}",
        f"--size={size}", f"--iodepth={depth}", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
        "--verify_state_save=0", "--group_reporting", "--output-format=json", f"--output={directory / 'fio.json'}",
    ]  # fmt: skip
    run(words)
    text = (directory / "fio.json").read_text()
    job = json.loads(text[text.index("{") :])["jobs"][0]  # fio may print a line before its JSON
    if job["error"] or not job["write"]["total_ios"] or not job["read"]["total_ios"]:
        counts = f"wrote {job['write']['total_ios']}, read {job['read']['total_ios']}"
        raise ClientFailed(f"fio {counts}, error {job['error']}")


def libnbd_python(uri: str, script: str) -> str:
    """Run ``script`` under the system's Python with ``h``, a libnbd handle connected to ``uri``; its output."""
    require_libnbd_python()
    lines = [
        "import nbd, errno, os",
        "h = nbd.NBD()",
        "h.add_meta_context('base:allocation')",
        f"h.connect_uri({uri!r})",
    ]
    return run([SYSTEM_PYTHON, "-c", "\n".join([*lines, script, "h.shutdown()"])])
