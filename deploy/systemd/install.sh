#!/bin/sh
# Sets this machine up as host HOST of TandemDisk pair PAIR, out of the files beside this script. As root, and again
# after every new rendering: what is there already is replaced. `tandemdisk deploy render` made it.
#
# DESTDIR=DIR lays the files out below DIR, with their modes, and does nothing else.
set -eu
here=$(cd -- "$(dirname -- "$0")" && pwd)
root=${DESTDIR:-}

refuse() {
    echo "$1" >&2
    exit 1
}

put() {  # MODE OWNER GROUP PATH
    if [ -n "$root" ]; then
        install -D -m "$1" -- "$here$4" "$root$4"
    else
        install -D -m "$1" -o "$2" -g "$3" -- "$here$4" "$4"
    fi
}

if [ -z "$root" ]; then
    [ "$(id -u)" = 0 ] || refuse "This needs root: it makes a user, and starts services."
    [ -x COMMAND ] || refuse "There is no COMMAND: install TandemDisk there, or render again with --command."
    for disk in DISKS; do
        [ -f "$disk" ] || [ -b "$disk" ] || refuse "There is no disk $disk: make it, then run this again."
    done
    getent passwd tandemdisk >/dev/null ||
        useradd --system --user-group --no-create-home --home-dir /var/lib/tandemdisk --shell /usr/sbin/nologin \
            tandemdisk
fi

FILES
[ -z "$root" ] || exit 0

# Images belong to the service; to block devices it comes as a member of the group disk.
for disk in DISKS; do
    [ -b "$disk" ] || chown tandemdisk:tandemdisk -- "$disk"
done

systemctl daemon-reload
# Rules may be younger than those that are loaded.
systemctl restart tandemdisk-firewall@PAIR.service
AGENT
# A side that runs goes on as it is: `systemctl restart` it where its configuration has changed.
systemctl enable --now tandemdisk-ROLE@PAIR.service
