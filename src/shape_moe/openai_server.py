"""The OpenAI protocol as far as this package speaks it: one client for every part that asks a server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import httpx

from shape_moe.errors import ShapeMoeError, UsageError, first_line

TIMEOUT_SECONDS = 600.0
"""A server that has not answered after this time is given up."""
KEY_VARIABLE = "OPENAI_API_KEY"
PAUSES = (0.5, 2.0, 5.0)
"""Seconds before a question is asked again that a busy or restarting server did not take: three times at most."""
_BUSY = frozenset({429, 500, 502, 503, 504})
_LONGEST_DETAIL = 200
T = TypeVar("T")


class OpenAIServer:
    """An OpenAI-compatible server; use it as a context manager.

    Args:
        url: base address, up to and including ``/v1`` or without it. A key in the environment variable
            ``OPENAI_API_KEY`` is sent along, and never shown.
        timeout: seconds after which an answer is no longer waited for.
    """

    def __init__(self, url: str, timeout: float = TIMEOUT_SECONDS) -> None:
        base = url.rstrip("/")
        self.base = base if base.endswith("/v1") else f"{base}/v1"
        self.timeout = timeout
        self._key = os.environ.get(KEY_VARIABLE) or ""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(timeout=timeout, trust_env=False, headers=headers)

    def __enter__(self) -> OpenAIServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def models(self) -> list[str]:
        """Names of the models that the server has."""
        return self.call("GET", "models", None, lambda reply: [str(entry["id"]) for entry in reply["data"]])

    def model(self, wanted: str | None = None) -> str:
        """The name to ask for: the one that is wanted, which must be there, else the server's first.

        Raises:
            UsageError: when the server has no model of that name.
            ShapeMoeError: when it cannot be reached, or has none at all.
        """
        known = self.models()
        if wanted is not None and wanted not in known:
            raise UsageError(f"The endpoint {self.base} has no model {wanted!r}; it has {', '.join(known) or 'none'}.")
        if not known:
            raise ShapeMoeError(f"The endpoint {self.base} has no model.")
        return wanted or known[0]

    def post(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """Send a request and read its reply with ``read``; one that is not taken is sent again (:data:`PAUSES`)."""
        for pause in PAUSES:
            try:
                return self.call("POST", path, body, read)
            except ShapeMoeError as error:
                if not _is_passing(error.__cause__):
                    raise
                time.sleep(pause)
        return self.call("POST", path, body, read)

    def call(self, method: str, path: str, body: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        """Send a request and read its reply.

        Raises:
            ShapeMoeError: when the server cannot be reached, refuses, or its reply cannot be read.
        """
        url = f"{self.base}/{path}"
        try:
            reply = self._client.request(method, url, json=body)
            reply.raise_for_status()
            return read(reply.json())
        except httpx.HTTPStatusError as error:
            raise ShapeMoeError(self._refusal(url, error.response)) from error
        except httpx.TimeoutException as error:
            raise ShapeMoeError(f"The endpoint {url} did not answer within {self.timeout:g} seconds.") from error
        except httpx.TransportError as error:
            raise ShapeMoeError(
                f"The endpoint {url} did not answer ({self._hidden(first_line(error))}): is the server there, and the "
                "address right?"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            kind = f"{type(error).__name__}: " if isinstance(error, LookupError) else ""
            raise ShapeMoeError(
                f"The endpoint {url} did not answer as an OpenAI-compatible server does "
                f"({kind}{self._hidden(first_line(error))})."
            ) from error

    def _refusal(self, url: str, reply: httpx.Response) -> str:
        """Why a request was refused, and what to do, in a sentence."""
        detail = self._hidden(" ".join(reply.text.split()))[:_LONGEST_DETAIL]
        text = f"The endpoint {url} refused with status {reply.status_code}: {detail or reply.reason_phrase}"
        if reply.status_code in {401, 403}:
            why = (
                f"does not accept the key in {KEY_VARIABLE}" if self._key else f"needs a key: put it in {KEY_VARIABLE}"
            )
            return f"{text} (it {why})"
        if reply.status_code == 404:
            return f"{text} (is the address right, up to and including /v1?)"
        return text

    def _hidden(self, text: str) -> str:
        """A text of the server without the key, should it tell it back."""
        return text.replace(self._key, "***") if self._key else text


def _is_passing(cause: BaseException | None) -> bool:
    """Whether a request may succeed when it is sent again; one that took too long is not sent again."""
    if isinstance(cause, httpx.HTTPStatusError):
        return cause.response.status_code in _BUSY
    return isinstance(cause, httpx.TransportError) and not isinstance(cause, httpx.TimeoutException)
