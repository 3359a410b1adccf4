"""How a node's log is written: lines for people, or one JSON object a line for machines."""

import json
import logging
import sys
import time
from types import TracebackType

from p2pfm.runtime.log_limit import LogLimit

PLAIN = ("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
"""What every record has; anything else was given as a field (`extra=`)."""

log = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, message; what was given as fields; error."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        told |= {key: value for key, value in record.__dict__.items() if key not in STANDARD and key not in told}
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def set_up_logging(level: int, *, as_json: bool) -> None:
    """Ours from `level` on, other libraries' warnings; to standard error. As JSON nothing else is written there."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if as_json else logging.Formatter(*PLAIN))
    handler.addFilter(LogLimit())  # strangers choose how often some lines are reached
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for ours in ("p2pfm", "nodes"):
        logging.getLogger(ours).setLevel(level)
    if as_json:
        logging.captureWarnings(capture=True)
        sys.excepthook = _log_exception


def is_json() -> bool:
    """Whether standard error is for machines."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("ended by an error that is a bug", exc_info=(kind, error, trace))
