"""Log lines, one a record: text for a terminal, JSON for machines.

Paths, methods and ids come from clients. In both forms every character that is not printable is
written as an escape, so that a request can neither begin a line of its own nor reach the terminal.
Prompts, labels, bodies, query strings and keys are not logged.

A record's `fields` (a dict, by `extra=`) become members of the JSON object and name=value in text,
where those named in `said` are left out because the message has them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, Literal

from server.observability.context import PROBES, context_of
from server.observability.writing import QueueHandler

access = logging.getLogger("dd_server.access")

_MOST_PATH = 200
_MOST_METHOD = 20
# ASCII alone: some readers take U+2028 and the like for the end of a line.
_encode = json.JSONEncoder(ensure_ascii=True, default=str).encode
# The customary status of a request whose client left; it was never sent.
CLIENT_LEFT = 499


def configure(level: str, form: Literal["text", "json"]) -> None:
    """Log to standard error from `level` on, unless the process has its own handlers already."""
    if not logging.root.handlers:
        handler = QueueHandler()
        handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
        logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    # Ours says when the server listens and what it does; uvicorn's own lines repeat it.
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def shown_path(path: str) -> str:
    """A path as logs and traces may hold it: a receipt has its prompt inside."""
    return "/images/{receipt}" if path.startswith("/images/") else path


def log_request(scope: MutableMapping[str, Any], status: int, sent: int) -> None:
    """The one line about a request that has ended.

    Args:
        scope: with `request_id`, `arrived` and the context in its state.
        status: as sent, or `CLIENT_LEFT`.
        sent: bytes of the reply's body.
    """
    path = shown_path(scope["path"])
    level = logging.DEBUG if path in PROBES and status == 200 else logging.INFO
    if not access.isEnabledFor(level):
        return
    state, client = scope["state"], scope.get("client")
    method, path = _cut(scope["method"], _MOST_METHOD), _cut(path, _MOST_PATH)
    fields = {
        "request_id": state["request_id"],
        "method": method,
        "path": path,
        "status": status,
        "seconds": round(time.perf_counter() - state["arrived"], 6),
        "bytes": sent,
        "client": client[0] if client else "",
        **context_of(scope),
    }
    extra = {"fields": fields, "said": {"method", "path", "status"}}
    access.log(level, "%s %s %d", method, path, status, extra=extra)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "…"


class JsonFormatter(logging.Formatter):
    """A JSON object a line: time, level, logger, message, a record's fields, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return _encode(line)


class TextFormatter(logging.Formatter):
    """A line for people: time, level, logger, message, fields as name=value; tracebacks indented."""

    def format(self, record: logging.LogRecord) -> str:
        said: set[str] = getattr(record, "said", set())
        fields: dict[str, Any] = getattr(record, "fields", {})
        parts = [self.formatTime(record), record.levelname, f"{record.name}:", record.getMessage().strip()]
        parts += [f"{name}={_value(value)}" for name, value in fields.items() if name not in said]
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        below = [*trace.splitlines(), *(record.stack_info or "").splitlines()]
        return "\n".join([_printable(" ".join(parts)), *("    " + _printable(line) for line in below)])


def _value(value: object) -> str:
    text = str(value)
    return text if text and not set(text) & {" ", '"', "="} else json.dumps(text, ensure_ascii=False)


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
