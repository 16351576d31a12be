"""What a run's gradients do, step by step, and what `max_norm` should be: without waiting for the device."""

from .history import History, Suggestion, Summary
from .monitor import GradMonitor
from .record import Record

__all__ = ["GradMonitor", "History", "Record", "Suggestion", "Summary"]
