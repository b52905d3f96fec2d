"""The log: one JSON object a line on stderr, with what happened and never with what was read,
asked or answered.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
OURS = ("app", "dynamickv")
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JSONLines(logging.Formatter):
    """A record as one line of JSON. Of an error only its kind and where it was raised: its text may
    quote a visitor's.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(
                timespec="milliseconds"
            ),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in STANDARD}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["error"] = type(error).__name__
            line["at"] = [
                f"{frame.f_globals.get('__name__', '?')}:{number}"
                for frame, number in traceback.walk_tb(error.__traceback__)
            ][-6:]
        return json.dumps(line, default=str)


def set_up(level: str) -> None:
    """Send this project's log to stderr; other libraries' warnings keep their way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
