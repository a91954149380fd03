#!/bin/sh
# Does this host's side of the pair lead? "ready up" or "down", for HAProxy's agent check (see haproxy.cfg).
#
#   leads.sh /var/lib/tandemdisk/mail
#
# `agent = "HOST:10811"` in a pair file makes `tandemdisk deploy render` install it with units for systemd's socket activation.
exec python3 - "$1" <<'PYTHON'
import json, os, socket, sys

UNABLE = {"fenced", "refused"}


def status(path):
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(2)
        control.connect(path)
        control.sendall(b'{"id": 1, "command": "status", "args": {}}\n')
        return json.loads(control.makefile().readline())["result"]


answer = "down"
for process in ("primary", "secondary"):
    try:
        told = status(os.path.join(sys.argv[1], process + ".control"))
    except (OSError, ValueError, KeyError):
        continue
    if told["role"] == "primary" and told["state"] not in UNABLE:
        answer = "ready up"
print(answer)
PYTHON
