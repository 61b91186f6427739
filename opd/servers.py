"""A server that a run depends on: asked over HTTP, with bounded waiting, and a line if it fails."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from http import HTTPStatus
from typing import Any, TypeVar

import urllib3
from urllib3.exceptions import HTTPError, ReadTimeoutError

from opd.errors import LostServer, UserError
from opd.world import together

T = TypeVar("T")

log = logging.getLogger(__name__)

ATTEMPTS = 4  # at what can be asked again, 1, 2 and 4 seconds apart
BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE)
CONNECT_SECONDS = 10.0
REPORT_SECONDS = 15.0  # of waiting, before a line says so


class Server:
    """A server, asked for JSON; from whatever thread.

    Args:
        url: As http://HOST:PORT.
        what: Which option names it, for messages.
        timeout: Seconds to wait for an answer.

    Raises:
        UserError: The address is none.
    """

    def __init__(self, url: str, *, what: str, timeout: float) -> None:
        if not re.fullmatch(r"https?://[^\s/]+/?", url):
            raise UserError(f"{what}: {url!r} is no address of a server, as http://HOST:PORT")
        self.url = url.rstrip("/")
        self.what = what
        self.timeout = timeout
        self._pool = urllib3.PoolManager(maxsize=1024, retries=False)

    def get(self, path: str) -> Any:
        """Ask for a path.

        Raises:
            UserError: There is no answer, or another than hoped for.
        """
        return self._ask("GET", path, None, ATTEMPTS)

    def post(self, path: str, body: Mapping[str, Any], *, again: bool = False) -> Any:
        """Send JSON.

        Args:
            path: Where to.
            body: What.
            again: Whether it may be sent twice, where nobody answers.

        Raises:
            UserError: There is no answer, or another than hoped for.
        """
        return self._ask("POST", path, body, ATTEMPTS if again else 1)

    def post_for_bytes(self, path: str, body: Mapping[str, Any]) -> urllib3.BaseHTTPResponse:
        """Send JSON, again where nobody answers, and return what comes as it is.

        Raises:
            UserError: There is no answer, or another than hoped for.
        """
        return self._answer("POST", path, body, ATTEMPTS)

    def post_many(
        self, path: str, bodies: Sequence[Mapping[str, Any]], *, at_once: int
    ) -> list[Any]:
        """Send several, some at a time, each again where nobody answers.

        Returns:
            The answers, in the order of the bodies.

        Raises:
            UserError: One of them has failed; those that had not begun are not sent.
        """
        if not bodies:
            return []
        with ThreadPoolExecutor(min(at_once, len(bodies)), "ask") as pool:
            asked = [pool.submit(self.post, path, body, again=True) for body in bodies]
            try:
                wait(asked, return_when=FIRST_EXCEPTION)
                for one in asked:
                    if one.done():
                        one.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [one.result() for one in asked]

    def wait_until_ready(self, seconds: float) -> None:
        """Wait for a server that is still starting.

        Raises:
            UserError: It is not there in time.
        """
        start, told = time.monotonic(), False
        while (problem := self._problem()) is not None:
            waited = time.monotonic() - start
            if waited >= seconds:
                raise UserError(
                    f"{self.what}: no server at {self.url} within {seconds:g} s ({problem})"
                )
            if waited > REPORT_SECONDS and not told:
                told = True
                log.warning("%s: waiting for the server at %s (%s)", self.what, self.url, problem)
            time.sleep(min(1.0, seconds / 10))

    def _problem(self) -> str | None:
        """Say why it is not ready; None: it is."""
        try:
            answer = self._send("GET", "/health", None, CONNECT_SECONDS)
        except HTTPError as error:
            return _plainly(error)
        return None if answer.status == HTTPStatus.OK else f"HTTP {answer.status}"

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, attempts: int) -> Any:
        answer = self._answer(method, path, body, attempts)
        return answer.json() if answer.data else None

    def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None, attempts: int
    ) -> urllib3.BaseHTTPResponse:
        for attempt in range(attempts):
            last = attempt == attempts - 1
            try:
                answer = self._send(method, path, body, self.timeout)
            except ReadTimeoutError as error:
                raise UserError(
                    f"{self.what}: no answer from {self.url}{path} within {self.timeout:g} s: it "
                    "hangs, or needs a longer timeout"
                ) from error
            except HTTPError as error:
                if last:
                    raise UserError(
                        f"{self.what}: the server at {self.url} is gone or cannot be reached "
                        f"({_plainly(error)})"
                    ) from error
            else:
                if answer.status == HTTPStatus.OK:
                    return answer
                if last or answer.status not in BUSY:
                    raise UserError(
                        f"{self.what}: {self.url}{path} answers with HTTP {answer.status}: "
                        f"{_message(answer.data)}"
                    )
            time.sleep(2.0**attempt)
        raise AssertionError

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float
    ) -> urllib3.BaseHTTPResponse:
        timeout = urllib3.Timeout(connect=min(CONNECT_SECONDS, seconds), read=seconds)
        content: dict[str, Any] = {} if body is None else {"json": body}
        return self._pool.request(method, self.url + path, timeout=timeout, **content)


def or_lost(function: Callable[[], T]) -> T:
    """Do what needs a server, on every rank; if it fails on one, it fails on all.

    Raises:
        LostServer: It has failed, somewhere.
    """
    try:
        return together(function)
    except UserError as error:
        raise LostServer(str(error)) from error


def _plainly(error: Exception) -> str:
    """Say why nobody answers, without the library's objects."""
    text = str(error.__cause__ or error)
    return re.sub(r"^.*?object at 0x[0-9a-f]+>:? ?|\[Errno -?\d+\] ", "", text).strip() or str(
        error
    )


def _message(content: bytes) -> str:
    """Find what a server says is wrong, in a line."""
    text = content.decode(errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    for key in ("error", "message", "detail"):
        if isinstance(found, Mapping) and key in found:
            found = found[key]
    return " ".join(str(found).split())[:300]
