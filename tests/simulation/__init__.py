"""A deterministic simulation of whole pairs: see ``simulator`` for how it works and ``__main__`` for how to run it."""
