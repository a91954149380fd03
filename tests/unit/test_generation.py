"""The decision of two standings, over the table of issue-sized situations."""

from __future__ import annotations

import itertools
import random

import pytest

from common.generation import (
    MAX_HISTORY,
    Decision,
    Generation,
    History,
    InSync,
    PrimaryAhead,
    Refused,
    Rejoin,
    SplitBrain,
    Standing,
    Unrelated,
    decide,
    extend,
)

G1 = Generation(101, 1, "a")
G2A = Generation(201, 2, "a")
G2B = Generation(202, 2, "b")
G3 = Generation(301, 3, "a")
ALIEN = Generation(999, 1, "b")


def primary(*history: Generation, side: str = "a", base: int = 0, blocks: int = 0) -> Standing:
    return Standing("p", side, "primary", history, True, base, blocks, blocks * 4096)


def secondary(*history: Generation, side: str = "b") -> Standing:
    return Standing("p", side, "secondary", history, bool(history))


TABLE: list[tuple[str, Standing, Standing, type, dict[str, object]]] = [
    ("running pair", primary(G1), secondary(G1), InSync, {}),
    ("new secondary", primary(G1), secondary(), PrimaryAhead, {"full": True}),
    ("both new", primary(), secondary(), PrimaryAhead, {"full": True}),
    ("primary went on alone", primary(G1, G2A, base=101), secondary(G1), PrimaryAhead, {"full": False}),
    ("bitmap lost", primary(G1, G2A), secondary(G1), PrimaryAhead, {"full": True}),
    ("bitmap starts later", primary(G1, G2A, G3, base=201), secondary(G1), PrimaryAhead, {"full": True}),
    ("bitmap starts earlier", primary(G1, G2A, G3, base=101), secondary(G1, G2A), PrimaryAhead, {"full": False}),
    ("bitmap from a forgotten past", primary(G2A, G3, base=101), secondary(G2A), PrimaryAhead, {"full": True}),
    ("primary disk replaced", primary(), secondary(G1), Refused, {}),
    ("former primary returns", primary(G1), primary(G1, G2B, side="b"), Rejoin, {"side": "a"}),
    ("former primary, long gone", primary(G1), primary(G1, G2B, G3, side="b"), Rejoin, {"side": "a"}),
    ("old copy as primary", primary(G1), secondary(G1, G2B), Rejoin, {"side": "a"}),
    ("both promoted", primary(G1, G2A, blocks=7), primary(G1, G2B, side="b"), SplitBrain, {"ancestor": G1}),
    ("demoted after split", primary(G1, G2A), secondary(G1, G2B), SplitBrain, {"ancestor": G1}),
    ("no common past", primary(G1), secondary(ALIEN), Unrelated, {}),
    ("two strangers", primary(G1), primary(ALIEN, side="b"), Unrelated, {}),
    ("new disk called primary, too", primary(G1), primary(side="b"), Refused, {}),
    ("dual primary", primary(G1), primary(G1, side="b"), Refused, {}),
    ("dual primary, new disks", primary(), primary(side="b"), Refused, {}),
    ("dual secondary", secondary(G1, side="a"), secondary(G1), Refused, {}),
    ("same side", primary(G1), secondary(G1, side="a"), Refused, {}),
    ("other pair", primary(G1), secondary(G1)._replace(pair_id="q"), Unrelated, {}),
]


@pytest.mark.parametrize(("name", "mine", "theirs", "verdict", "fields"), TABLE, ids=[row[0] for row in TABLE])
def test_table(name: str, mine: Standing, theirs: Standing, verdict: type, fields: dict[str, object]) -> None:
    decision: Decision = decide(mine, theirs)
    assert type(decision) is verdict, name
    assert {key: getattr(decision, key) for key in fields} == fields
    assert decide(theirs, mine) == decision
    assert decision.sentence


def test_split_brain_says_what_each_side_would_lose() -> None:
    decision = decide(primary(G1, G2A, blocks=7), primary(G1, G2B, side="b", blocks=2))
    assert isinstance(decision, SplitBrain)
    assert "7 blocks (28672 bytes)" in decision.sentence
    assert "2 blocks (8192 bytes)" in decision.sentence
    left = decide(primary(G1, blocks=3), primary(G1, G2B, side="b"))
    assert "3 blocks (12288 bytes) that it alone wrote" in left.sentence


@pytest.mark.parametrize("seed", range(8))
def test_an_older_copy_is_behind_unless_it_wrote_by_itself(seed: int) -> None:
    """A pair whose link flaps, whose roles change, and of which copies are taken: whatever is restored, either time or
    both, is judged by what happened. The oracle knows each copy's life without a bound."""
    chance = random.Random(seed)
    history = extend((), chance.getrandbits(64), "a")
    copies: list[tuple[int, History]] = []
    for _ in range(2 * MAX_HISTORY):
        history = extend(history, chance.getrandbits(64), chance.choice("aaab"))
        if chance.random() < 0.03:
            copies.append((history[-1].number, history))
    for role, (number, copy) in itertools.product(("primary", "secondary"), copies):
        leads = Standing("p", "a", "primary", history, True, history[-1].identity)
        remembered = number >= history[0].number
        restored = Standing("p", "b", role, copy, True, copy[-1].identity)
        behind: type = Rejoin if role == "primary" else PrimaryAhead
        if number == history[-1].number:
            behind = Refused if role == "primary" else InSync
        assert type(decide(leads, restored)) is (behind if remembered else Unrelated)
        alone = restored._replace(history=extend(copy, chance.getrandbits(64), "b"))
        wrote = decide(leads, alone)
        assert type(wrote) is (SplitBrain if number != history[-1].number and remembered else
                               Unrelated if not remembered else Rejoin)
        if not remembered:
            assert f"before {history[0].number}" in decide(leads, restored).sentence


def test_symmetry_and_totality_over_all_histories() -> None:
    """Both sides of any meeting come to the same verdict, and data flows only from a superset of the past."""
    generations = (G1, G2A, G2B)
    histories: list[History] = [h for n in range(4) for h in itertools.permutations(generations, n)]
    for one, two in itertools.product(histories, repeat=2):
        for roles in itertools.product(("primary", "secondary"), repeat=2):
            mine, theirs = (Standing("p", side, role, history, True, 101) for side, role, history in
                            zip("ab", roles, (one, two), strict=True))
            decision = decide(mine, theirs)
            assert decision == decide(theirs, mine)
            if isinstance(decision, InSync):
                assert one[-1] == two[-1]
            if isinstance(decision, PrimaryAhead):
                source, target = (one, two) if roles[0] == "primary" else (two, one)
                assert not target or target[-1] in source


def test_histories_count_up_and_forget_the_oldest() -> None:
    history: History = ()
    for identity in range(1, MAX_HISTORY + 10):
        history = extend(history, identity, "a")
    assert len(history) == MAX_HISTORY
    assert history[-1] == Generation(MAX_HISTORY + 9, MAX_HISTORY + 9, "a")
    assert "generation 1033 (0000000000000409, started by side a)" in str(history[-1])
