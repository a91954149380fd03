"""`tandemdisk bench`: our pair and its peers under the same load, in alternating rounds, on this machine.

    command.py    the click command                workloads.py  what is asked of every peer: jobs, goals
    runner.py     rounds, order, time bound        engines.py    who asks: fio's nbd engine, or the built-in client
    scratch.py    disks on a memory file system    servers.py    child processes: their life, CPU seconds and memory
    peers.py      tandemdisk, qemu-nbd, nbdkit     colo.py       QEMU's COLO block replication without guests
    probes.py     checkpoint latency, failover     ratios.py     medians, ratios of pairs, spread, goals
    report.py     the terminal's tables           page.py       the HTML report            plots.py   its SVG
    results.py    records of a run, as JSON        client.py     the built-in client
    hotpath.py    where each microsecond of a request goes (`tandemdisk bench --hot-path`)
    wayback.py    resyncs, and the write-intent bitmap (`tandemdisk bench --resync`)
    hosts*.py     across a network (`tandemdisk bench --hosts netns`); raw.py: what that network carries without us

The runner keeps every peer up for the whole run and gives each job to all of them in turn before it moves on, so that
whatever else the machine does hits neighbours in the same way; ratios are taken between neighbours only.
"""
