"""Chaos: a pair of real processes under verified load, broken at random, healed, and compared byte by byte.

    variety        what a pair is like
    expectation    what each block may hold, in a file outside of the pair
    writer         the load: writes over one connection, and what was acknowledged
    beside         the load on a second volume
    guest          writes on the follower, between checkpoints
    takeover       a failover from a leader that lives, with a client left on either side
    kinds          what can be drawn
    judgement      what a failover has to have brought
    campaign       cycles of faults, recovery and comparison, all drawn from one seed
    tally          the report
    entry          ``tandemdisk chaos``

The simulation (``tests.simulation``) replays a seed exactly; here only the choices follow from it, the instants are the
machine's. What this finds that the simulation cannot is in processes, sockets, shared memory and files.
"""
