"""A judge at an OpenAI-compatible endpoint: POST {url}/chat/completions.

A request is repeated with exponential back-off, or after the time in Retry-After, when the connection fails, when the
status is 408, 429 or 5xx, and when the body is no completion. The number of attempts is bounded. An endpoint that
refuses a field (400 or 422) gets the request without the JSON schema, then without the temperature.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from typing import Any

from dataloaders.errors import reason
from pite.evaluate.qa.prompts import Prompt
from pite.evaluate.qa.replies import verdict

LONGEST_WAIT = 120.0
"""Seconds; no Retry-After and no back-off takes longer."""

FAILURES_IN_A_ROW = 10
"""After as many failed prompts without a reply in between, the endpoint counts as down."""

log = logging.getLogger(__name__)

_BUSY = {408, 409, 429}
_REFUSED = {400, 422}


class _TryAgainError(Exception):
    """An attempt failed that another one may mend; `wait` is the seconds that the endpoint wants, if any."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class _RefusedError(Exception):
    """The endpoint does not accept this request."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirection an error: a second host would get the key, and a GET instead of the POST."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """Replies of `model` at `url`, several requests at a time.

    key      sent as a bearer token, if given
    timeout  seconds for each attempt
    retries  attempts after the first one
    backoff  seconds before the first retry; doubled for each further one
    """

    rounds = 3
    """How often a prompt with malformed replies is sent."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 5,
        concurrency: int = 8,
        backoff: float = 1.0,
    ) -> None:
        self.name = model
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._key, self._timeout = key, timeout
        self._retries, self._concurrency, self._backoff = retries, concurrency, backoff
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._plainness = 0
        self._stop = threading.Event()

    def check(self, prompt: Prompt) -> None:
        """Raise ValueError unless the endpoint replies to a prompt; warn if the reply is no verdict."""
        reply, error = self._reply(prompt)
        if reply is None:
            raise ValueError(f"the judge at {self._url} does not reply ({error}): check --judge-url and --judge-model")
        if verdict(reply, prompt.axis) is None:
            log.warning("the judge at %s gives no verdict on a trial question, but %r", self._url, reply[:200])

    def replies(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | None]]:
        """(Index of a prompt, reply) as replies come; None for a prompt that failed.

        Raises ValueError for a wrong address, model or key, and when the endpoint seems to be down.
        """
        failures = 0
        with ThreadPoolExecutor(self._concurrency) as pool:
            futures = {pool.submit(self._reply, prompt): i for i, prompt in enumerate(prompts)}
            try:
                for future in as_completed(futures):
                    reply, error = future.result()
                    failures = 0 if reply is not None else failures + 1
                    if failures == 1:
                        log.warning("the judge at %s failed for a prompt: %s", self._url, error)
                    if failures >= FAILURES_IN_A_ROW:
                        raise ValueError(
                            f"the judge at {self._url} failed for {failures} prompts in a row ({error}); repeat the "
                            "command when it is up, which keeps the replies so far"
                        )
                    yield futures[future], reply
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                self._stop.clear()

    def _reply(self, prompt: Prompt) -> tuple[str | None, str]:
        """The reply, or None and the last reason."""
        wait, error = self._backoff, ""
        for attempt in range(self._retries + 1):
            try:
                return self._plainer(prompt), ""
            except _TryAgainError as fault:
                error = str(fault)
                pause = min(LONGEST_WAIT, wait if fault.wait is None else fault.wait)
                if attempt == 0 and self._retries:
                    log.info("the judge at %s: %s; trying again", self._url, error)
                if attempt < self._retries and self._stop.wait(pause):
                    break
                wait *= 2
            except _RefusedError as fault:
                return None, str(fault)
        return None, error

    def _plainer(self, prompt: Prompt) -> str:
        """The reply to the first form of the request that the endpoint accepts."""
        forms = _forms(prompt)
        for plainness in range(self._plainness, len(forms)):
            try:
                reply = self._post({"model": self.name, "messages": prompt.messages, **forms[plainness]})
            except _RefusedError:
                if plainness == len(forms) - 1:
                    raise
            else:
                self._plainness = max(self._plainness, plainness)
                return reply
        raise AssertionError("the last form returns or raises")

    def _post(self, body: Mapping[str, Any]) -> str:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return _content(_read(response, time.monotonic() + self._timeout))
        except urllib.error.HTTPError as error:
            with error:
                raise self._of_status(error) from None
        except urllib.error.URLError as error:
            raise _TryAgainError(reason(error.reason if isinstance(error.reason, OSError) else error)) from None
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgainError(reason(error)) from None

    def _of_status(self, error: urllib.error.HTTPError) -> Exception:
        message = f"{error.code} {error.reason}{_detail(error)}"
        if error.code in _BUSY or error.code >= 500:
            return _TryAgainError(message, _retry_after(error.headers.get("Retry-After")))
        if error.code in _REFUSED:
            return _RefusedError(message)
        return ValueError(
            f"the judge at {self._url} answers {message}: check --judge-url, --judge-model and the key in the variable "
            "of --judge-key"
        )


def _forms(prompt: Prompt) -> list[dict[str, Any]]:
    """Optional fields of a request, from all to none."""
    schema = {"name": "verdict", "strict": True, "schema": prompt.schema}
    structured = {"response_format": {"type": "json_schema", "json_schema": schema}}
    return [{**structured, "temperature": 0}, {"temperature": 0}, {}]


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body. Raises TimeoutError at the deadline, which a socket's own timeout does not have."""
    parts = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return b"".join(parts)


def _content(body: bytes) -> str:
    """The text of a completion. Raises _TryAgainError for a body that is none."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError):
        raise _TryAgainError("the reply's body is not valid JSON") from None
    except (LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise _TryAgainError("the reply's body has no choices[0].message.content")
    return content


def _detail(error: urllib.error.HTTPError) -> str:
    """The endpoint's own reason, as ` (REASON)`; empty if it gives none."""
    try:
        message = json.loads(error.read(10_000))["error"]["message"]
    except (ValueError, LookupError, TypeError, OSError, RecursionError, http.client.HTTPException):
        return ""
    return f" ({' '.join(str(message).split())[:200]})"


def _retry_after(value: str | None) -> float | None:
    """Seconds in a Retry-After header, which holds them or a date; None without one."""
    try:
        return max(0.0, float(value or ""))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value or "").timestamp() - time.time())
    except (ValueError, TypeError):
        return None
