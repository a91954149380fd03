"""Runnable examples and configurations to start from."""
