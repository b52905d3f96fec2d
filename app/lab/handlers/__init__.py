"""What the Lab does when asked: measure, and open a cell's run on Explore."""

from .measure import FILE_NAME, LabHandlers, numbers
from .opening import OPENED, OpeningHandlers

__all__ = ["FILE_NAME", "OPENED", "LabHandlers", "OpeningHandlers", "numbers"]
