"""A trained network as an event-driven engine."""

from .network import EventNetwork, LayerStatistics

__all__ = ["EventNetwork", "LayerStatistics"]
