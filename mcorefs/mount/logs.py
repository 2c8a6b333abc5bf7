"""The daemon's log: one line of JSON for each event.

Its keys: `time` (UTC, RFC 3339), `level` (INFO, WARNING, ERROR, CRITICAL), `logger`, `message`;
`path` where the event is about one: within the mount, or where that is; `trace` where it is a bug.
Names in a checkpoint are a stranger's: JSON escapes what could make a second line of them.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime


class JsonLines(logging.Formatter):
    """Formats a record as one line."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
        }
        path = getattr(record, "path", None)
        if path:
            line["path"] = str(path)
        line["message"] = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)
