"""Weights: from a spec's `source` to a directory on this node."""

from nearfield.weights.resolve import resolve

__all__ = ["resolve"]
