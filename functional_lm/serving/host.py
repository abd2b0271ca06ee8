"""Where the application lives: a listening socket from the first moment, a door while there is nobody behind it, an
orderly end, and a log of one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

import waitress
from waitress.channel import HTTPChannel

from functional_lm.errors import UsageError
from functional_lm.serving.service import Service

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
BODY_SECONDS = 30.0  # longest time for a request to arrive


class Door:
    """Stands before an application that is still being made: 503 and why, until `app` is set."""

    def __init__(self) -> None:
        self.reason = "the server is starting"
        self.app: Application | None = None

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self.app is not None:
            return self.app(environ, start_response)
        error = {"message": self.reason, "type": "server_error", "param": None, "code": "unavailable"}
        body = json.dumps({"error": error}).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Retry-After", "5")]
        start_response("503 Service Unavailable", headers)
        return [body]


class Channel(HTTPChannel):
    """A connection whose requests have to arrive in time: one that drips in holds no thread, but a connection."""

    began = 0.0

    def received(self, data: bytes) -> bool:
        if self.request is None:
            self.began = time.monotonic()
        whole: bool = super().received(data)
        if self.request is not None and time.monotonic() - self.began > BODY_SECONDS:
            self.will_close = True
        return whole


class Host:
    """waitress on a thread of its own."""

    def __init__(self, app: Application, host: str, port: int, threads: int, body_bytes: int) -> None:
        """Listen. Raises UsageError where the address cannot be had."""
        try:
            self._server: Any = waitress.create_server(
                app,
                host=host,
                port=port,
                threads=threads,
                connection_limit=4 * threads,  # beyond the queue's limit they are told to come back, not left alone
                backlog=1024,
                asyncore_use_poll=True,
                max_request_body_size=body_bytes,
                channel_timeout=60,
                channel_request_lookahead=1,  # lets a stream notice that its reader has gone
                ident="functional_lm",
            )
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; try another --port"
            ) from error
        except ValueError as error:  # waitress' word for a name that has no address
            raise UsageError(
                f"--host is {host!r}, which is no address of this machine; give one such as 127.0.0.1"
            ) from error
        self._server.channel_class = Channel
        self._thread = threading.Thread(target=self._server.run, name="http", daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self._server.effective_port
        return port

    def start(self) -> Host:
        self._thread.start()
        return self

    def close(self, seconds: float = 5.0) -> None:
        """Let what has been written go out, then end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(
            channel.requests or channel.total_outbufs_len for channel in list(self._server.active_channels.values())
        ):
            time.sleep(0.02)
        self._server.close()


def drain(service: Service, seconds: float) -> None:
    """Refuse what is new, finish what is there, and after `seconds` give up what is not finished."""
    service.draining = True
    late = threading.Timer(seconds, service.engine.close, kwargs={"drain": False})
    late.daemon = True
    late.start()
    service.engine.close(drain=True)
    late.cancel()


class Lines(logging.Formatter):
    """A record as one JSON object: a line break in a value cannot begin another record."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        made = {"time": f"{stamp}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        made |= {"logger": record.name, "event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            made["exception"] = self.formatException(record.exc_info)
        return json.dumps(made, ensure_ascii=False)


def log_to(stream: TextIO = sys.stderr) -> None:
    """All loggers, as lines of JSON."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
