"""The engines: what fio is told, what is read out of its answer, and the order of the built-in client's requests."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest

from common.errors import OperationFailed
from deploy.bench.client import offsets
from deploy.bench.engines import Stream, fio_options, parse_fio
from deploy.bench.workloads import JOBS, Load

KIB, MIB = 1024, 1024 * 1024

FIO_JOB: dict[str, Any] = {
    # What fio 3.33 writes for one group with --unified_rw_reporting=1 --lat_percentiles=1, shortened.
    "jobname": "stream0",
    "error": 0,
    "mixed": {
        "io_bytes": 564420608,
        "iops": 137660.33966,
        "runtime": 1001,
        "total_ios": 137798,
        "lat_ns": {
            "min": 82583,
            "percentile": {"50.000000": 197632, "99.000000": 954368, "99.900000": 3063808},
        },
    },
}


def test_figures_of_fio_come_in_our_units() -> None:
    (figures,) = parse_fio({"jobs": [FIO_JOB]})
    assert (figures.requests, figures.bytes, figures.seconds) == (137798, 564420608, 1.001)
    assert (figures.p50_us, figures.p99_us, figures.p999_us) == (197.632, 954.368, 3063.808)
    assert figures.iops == pytest.approx(137660.34)
    assert figures.mib_s == pytest.approx(564420608 / 1.001 / MIB)


def test_each_group_of_fio_has_its_figures_in_order() -> None:
    second = copy.deepcopy(FIO_JOB)
    second["mixed"]["total_ios"] = 1
    assert [figures.requests for figures in parse_fio({"jobs": [FIO_JOB, second]})] == [137798, 1]


def test_a_failed_job_of_fio_is_an_error() -> None:
    failed = {**FIO_JOB, "error": 5}
    with pytest.raises(OperationFailed, match="errno 5"):
        parse_fio({"jobs": [FIO_JOB, failed]})


def test_a_job_without_any_reply_has_figures_of_zero() -> None:
    stalled = copy.deepcopy(FIO_JOB)
    stalled["mixed"] = {"io_bytes": 0, "runtime": 0, "total_ios": 0, "lat_ns": {}}
    (figures,) = parse_fio({"jobs": [stalled]})
    assert (figures.iops, figures.mib_s, figures.p99_us) == (0.0, 0.0, 0.0)


def test_fio_is_told_time_or_bytes() -> None:
    load = Load("random", 70, 4 * KIB, 32, connections=4)
    timed = fio_options("a", Stream(load, "nbd://x", 64 * MIB, 1.5))
    assert {"--time_based", "--runtime=1500ms", "--rw=randrw", "--rwmixread=70", "--numjobs=4"} <= set(timed)
    counted = fio_options("a", Stream(load, "nbd://x", 64 * MIB, 1.5, io_bytes=8 * MIB))
    assert "--time_based" not in counted
    assert f"--io_size={2 * MIB}" in counted  # of each of the four


@pytest.mark.parametrize(
    ("access", "read_percent", "name"),
    [("random", 0, "randwrite"), ("random", 100, "randread"), ("random", 70, "randrw"), ("sequential", 0, "write"),
     ("sequential", 100, "read")],
)  # fmt: skip
def test_access_patterns_have_fios_names(access: Any, read_percent: int, name: str) -> None:
    assert Load(access, read_percent, 4096, 1).fio_access == name


def test_the_built_in_client_writes_each_block_once_before_any_twice() -> None:
    stream = Stream(Load("random", 0, 4 * KIB, 32), "nbd://x", MIB, 1.0, seed=7)
    first = list(itertools.islice(offsets(stream, 0), 256))
    assert sorted(first) == list(range(0, MIB, 4 * KIB))
    assert first != sorted(first)
    assert first == list(itertools.islice(offsets(stream, 0), 256))  # the same seed, the same order


def test_sequential_offsets_wrap() -> None:
    stream = Stream(Load("sequential", 0, MIB, 8), "nbd://x", 3 * MIB, 1.0)
    assert list(itertools.islice(offsets(stream, 0), 4)) == [0, MIB, 2 * MIB, 0]


def test_jobs_have_names_of_their_own_and_repeat_earlier_ones() -> None:
    names = [job.name for job in JOBS]
    assert len(set(names)) == len(names)
    for place, job in enumerate(JOBS):
        assert job.repeats is None or job.repeats in names[:place]
