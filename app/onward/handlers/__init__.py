"""What the panel under the answers does when asked: search, ask on, bring an earlier run back."""

from .going_on import OnwardHandlers
from .history import RESTORED, HistoryHandlers

__all__ = ["RESTORED", "HistoryHandlers", "OnwardHandlers"]
