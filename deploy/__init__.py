"""Deployment: the command line, the launcher, the demo. Uses all the other packages; none of them uses it."""

__version__ = "0.1.0"
