"""Structured logs: one JSON object a line, with the request's and the trace's ids.

Nothing a caller sent is ever logged: no prompt, no body, no header beyond the request id.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

LOGGER = "nearfield"
"""The root of our loggers. Other libraries' logs are left as their owners set them up."""

_EXTRA = ("tenant", "route", "status", "code", "duration_s", "input_tokens", "output_tokens")

_ids: ContextVar[tuple[str, str, str] | None] = ContextVar("nearfield_log_ids", default=None)


def bind(request_id: str, trace_id: str, span_id: str) -> None:
    """Put these ids on every line that the current task (and what it starts) logs from now on."""
    _ids.set((request_id, trace_id, span_id))


class JsonFormatter(logging.Formatter):
    """Renders `ts, level, logger, msg, model` and, where known, ids, error and request fields."""

    def __init__(self, model: str | None = None) -> None:
        super().__init__()
        self._model = model

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        if self._model is not None:
            line["model"] = self._model
        if (ids := _ids.get()) is not None:
            line["request_id"], line["trace_id"], line["span_id"] = ids
        for name in _EXTRA:
            if (value := getattr(record, name, None)) is not None:
                line[name] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(*, model: str | None = None, level: int = logging.INFO) -> None:
    """Send this process's `nearfield.*` logs to standard error as JSON lines.

    To the real one: Serve replaces `sys.stderr` in replicas by a buffer that it writes out a
    thousand lines at a time. May be called again: the last call counts.
    """
    logger = logging.getLogger(LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonFormatter(model))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
