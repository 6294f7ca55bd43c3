"""Requests to a judge's server: bounded in time, size and attempts, with errors that say how to start it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import httpx2

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
FIRST_PAUSE_S = 0.5  # before the first further attempt; doubled each time
MAX_PAUSE_S = 10.0
MAX_REPLY_BYTES = 64 * 2**20


class ServerError(ConnectionError):
    """A server that is down, too slow, or answers nonsense."""


@dataclass
class Server:
    """One address.

    Connection errors, timeouts, and the statuses 429 and 5xx are tried again after a pause; other statuses are not.
    The environment's proxies are not used: judges live on this machine or beside it.

    Args:
        url: base address.
        start_command: what starts such a server, for error messages.
        timeout_s: for one attempt, from connecting to the last byte.
        retries: further attempts.
        headers: sent with every request.
    """

    url: str
    start_command: str
    timeout_s: float = 120.0
    retries: int = 3
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        try:
            address = httpx2.URL(self.url)
        except httpx2.InvalidURL:
            address = httpx2.URL("")
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError(f"server address {self.url!r}: expected http://HOST:PORT/...")
        if self.timeout_s <= 0 or self.retries < 0:
            raise ValueError(
                f"server_timeout_s is {self.timeout_s} and server_retries {self.retries}: more than 0, and 0 or more"
            )
        timeout = httpx2.Timeout(self.timeout_s, connect=min(CONNECT_TIMEOUT_S, self.timeout_s))
        limits = httpx2.Limits(max_connections=None)
        headers = {"Accept-Encoding": "identity", **self.headers}
        self._client = httpx2.Client(timeout=timeout, trust_env=False, headers=headers, limits=limits)

    def post(self, path: str, content: bytes, content_type: str) -> bytes:
        """The body of a 200 reply.

        Raises:
            ServerError: after the last attempt; the message names address, cause and start command.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._request("POST", path, content=content, headers={"Content-Type": content_type})
            except _Retryable as error:
                reason = str(error)
                if attempt < self.retries:
                    pause = min(FIRST_PAUSE_S * 2**attempt, MAX_PAUSE_S)
                    logger.warning("%s: %s; attempt %d in %.1f s", self.url, reason, attempt + 2, pause)
                    time.sleep(pause)
        raise self.error(f"{reason}, {self.retries + 1} attempts of {self.timeout_s:g} s")

    def get(self, path: str) -> bytes:
        """The body of a 200 reply, in one attempt."""
        try:
            return self._request("GET", path)
        except _Retryable as error:
            raise self.error(str(error)) from None

    def check(self, path: str = "") -> None:
        """Raise ServerError unless something at this address speaks HTTP, whatever it says."""
        try:
            with self._client.stream("GET", self._address(path)):
                pass
        except httpx2.HTTPError as error:
            raise self.error(f"no answer ({_describe(error)})") from None

    def error(self, reason: str) -> ServerError:
        """A ServerError about this server."""
        return ServerError(f"the server at {self.url}: {reason}. Start it with\n    {self.start_command}")

    def _address(self, path: str) -> str:
        return self.url.rstrip("/") + "/" + path.lstrip("/")

    def _request(self, method: str, path: str, **options) -> bytes:
        deadline = time.monotonic() + self.timeout_s
        try:
            with self._client.stream(method, self._address(path), **options) as reply:
                body = bytearray()
                for piece in reply.iter_raw():  # as sent: nothing is decompressed
                    body += piece
                    if time.monotonic() > deadline:
                        raise _Retryable(f"no complete answer within {self.timeout_s:g} s")
                    if len(body) > MAX_REPLY_BYTES:
                        raise self.error(f"an answer of more than {MAX_REPLY_BYTES} bytes, refused")
        except httpx2.HTTPError as error:
            raise _Retryable(_describe(error)) from None
        if reply.status_code == 200:
            return bytes(body)
        text = bytes(body).decode("utf-8", errors="replace").strip()
        reason = f"status {reply.status_code}: {text[-300:] or 'no text'}"
        if reply.status_code == 429 or reply.status_code >= 500:
            raise _Retryable(reason)
        raise self.error(reason)


class _Retryable(Exception):
    pass


def _describe(error: httpx2.HTTPError) -> str:
    kind = type(error).__name__
    return f"{kind}: {error}" if str(error) else kind
