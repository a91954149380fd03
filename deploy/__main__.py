"""``python -m deploy`` is the command ``tandemdisk``."""

from deploy.cli import main

main(prog_name="tandemdisk")
