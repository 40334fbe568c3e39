"""Logs that an operator reads and that never say what a person typed, who it was, or a token.

Lines of ours name an event and its numbers: role, request id, seconds, outcome. Three things make the promise hold for
everything else too. Libraries are heard from INFO upwards only, whatever the level (at DEBUG, discord.py and
python-telegram-bot write out whole messages; httpx writes the Telegram token at INFO, so it is heard from WARNING).
Of an exception only types and places are written, never its message: `ValueError: could not parse '...'` quotes what
it could not parse. And where python-telegram-bot reports trouble with an update it fills the whole update into its
line ("Received data was %s"), so of its lines the blanks stay blank.
"""

import asyncio
import json
import logging
import sys
import threading
import traceback
from collections.abc import Iterable
from copy import copy
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

import structlog
from pydantic import SecretStr
from structlog.typing import EventDict, ExcInfo, WrappedLogger

from bot.settings import Settings


def get(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of one module: `log = logs.get("queue")`, then `log.info("answered", id=..., seconds=...)`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(f"guppy.{name}")
    return logger


def configure(settings: Settings, role: str) -> None:
    """Send every log line of this process to stderr, one line each, from here on."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _places,
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    people = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    renderer = structlog.dev.ConsoleRenderer() if people else structlog.processors.JSONRenderer(ensure_ascii=False)

    def add_role(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        return {"role": role, **event}

    handler = _Handler(sys.stderr)
    handler.setFormatter(
        _Redacting(
            _secrets(settings),
            foreign_pre_chain=[*shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, add_role, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.INFO, logging.getLevelNamesMapping()[settings.log_level]))
    logging.getLogger("guppy").setLevel(settings.log_level)
    for chatty in ("httpx", "httpcore", "tornado.access", "aiohttp.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Its warnings are of flood limits and name the chat, in the address of the call. The adapter counts them.
    logging.getLogger("discord.http").setLevel(logging.ERROR)
    for name in list(logging.Logger.manager.loggerDict):  # a library that set a level of its own is quietened as well
        if not name.startswith("guppy") and logging.getLogger(name).level == logging.DEBUG:
            logging.getLogger(name).setLevel(logging.INFO)

    crash = get("crash")
    sys.excepthook = lambda kind, error, trace: crash.critical("crashed", exc_info=(kind, error, trace))
    threading.excepthook = lambda args: crash.error("a thread crashed", exc_info=args.exc_value or args.exc_type)
    sys.unraisablehook = lambda args: crash.error("an error nobody could catch", exc_info=args.exc_value)


def loop_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Log what reaches the event loop unhandled as everything else: asyncio's own line quotes the exception."""
    crash = get("crash")
    loop.set_exception_handler(
        lambda _, context: crash.error("a task crashed", exc_info=context.get("exception"), at=context["message"])
    )


def _places(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Write the exception of a line as types and places."""
    info: ExcInfo | BaseException | bool | None = event.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()  # type: ignore[assignment]
    error = info[1] if isinstance(info, tuple) else info
    if isinstance(error, BaseException):
        event["error"] = type(error).__qualname__
        event["trace"] = " < ".join(_chain(error))
    return event


def _chain(error: BaseException | None) -> Iterable[str]:
    """`TypeError at module:12 in function`, innermost frames of the error and of what caused it."""
    while error is not None:
        frames = traceback.StackSummary.extract(_walk(error.__traceback__), lookup_lines=False)[-6:]
        yield f"{type(error).__qualname__} at " + ", ".join(
            f"{f.filename}:{f.lineno} {f.name}" for f in reversed(frames)
        )
        error = error.__cause__ or error.__context__


def _walk(trace: TracebackType | None) -> Any:
    return traceback.walk_tb(trace)


def _secrets(settings: Settings) -> list[str]:
    values = [getattr(settings, name) for name in Settings.model_fields]
    secrets = [value.get_secret_value() for value in values if isinstance(value, SecretStr)]
    if settings.redis_url is not None and (password := urlsplit(settings.redis_url.get_secret_value()).password):
        secrets += [password, unquote(password)]
    return secrets


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say that a line could not be written, and where it was; logging's own report quotes its arguments."""
        at = f"{record.pathname}:{record.lineno}"
        self.stream.write(json.dumps({"event": "a log line could not be written", "at": at}) + "\n")


class _Redacting(structlog.stdlib.ProcessorFormatter):
    """The last word on every line: no secret of the settings leaves in it, whoever wrote the line."""

    def __init__(self, secrets: list[str], **options: Any) -> None:
        super().__init__(**options)
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        if record.name.split(".")[0] == "telegram":
            record = copy(record)
            record.args = ()
        line = super().format(record)
        for secret in self._secrets:
            line = line.replace(secret, "[secret]")
        return line
