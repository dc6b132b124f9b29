"""How changes of a graph are run, one or many."""

from .run import run_passes

__all__ = ["run_passes"]
