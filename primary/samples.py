"""Samples of what both sides should have alike: where a resync would look at nothing.

A resync trusts that everything is equal that is not marked. Somebody may have broken that while a process was dead, and
no metadata tell: an older image restored in the place of a disk, say. So after a start that was not clean, of either
side, ``SAMPLES`` questions spread over the disks, outside the marks, come first. One answer "differs", and nothing is
trusted any more: the whole disks are compared.

That finds what changed much, not what changed little: a restored image is missed if it differs in no sample. Data are
sampled before holes, at places that are others each time. On a disk of up to 16 MiB the samples are all of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from common import limits
from common.disk import HOLE
from primary.mirror import MirroredDisk
from primary.questions import QUESTION_BYTES, Range

SAMPLES = 256
"""Questions of 64 KiB: 16 MiB are read and hashed on each side at most."""
LOOK_AHEAD: Final = 64 * limits.MIB
"""How far behind a place that is a hole data are looked for."""


def sample_ranges(volumes: Sequence[MirroredDisk], seed: int) -> list[Range]:
    """One question's range in each of ``SAMPLES`` equal parts of all volumes together, by ``seed``."""
    chance = random.Random(seed)
    total = sum(-(-volume.size // QUESTION_BYTES) for volume in volumes)
    count = min(SAMPLES, total)
    found: list[Range] = []
    for number in range(count):
        first, stop = total * number // count, total * (number + 1) // count
        place = chance.randrange(first, stop)
        for volume in volumes:
            questions = -(-volume.size // QUESTION_BYTES)
            if place < questions:
                found.append(_towards_data(volume, place, min(stop - first, questions - place)))
                break
            place -= questions
    return found


def _towards_data(volume: MirroredDisk, place: int, questions: int) -> Range:
    """The first of so many questions from ``place`` on that is not about a hole; ``place`` if all are."""
    offset = place * QUESTION_BYTES
    end = min(volume.size, (place + questions) * QUESTION_BYTES, offset + LOOK_AHEAD)
    length, flags = volume.disk.extents(offset, end - offset)[0]
    if flags & HOLE and offset + length < end:
        offset += length // QUESTION_BYTES * QUESTION_BYTES
    return volume.index, offset, min(QUESTION_BYTES, volume.size - offset)
