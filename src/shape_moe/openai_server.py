"""The OpenAI protocol as far as this package speaks it: one client for every part that asks a server."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import httpx

from shape_moe.errors import ShapeMoeError, first_line

_TIMEOUT_SECONDS = 600.0
T = TypeVar("T")


class OpenAIServer:
    """An OpenAI-compatible server; use it as a context manager.

    Args:
        url: base address, up to and including ``/v1`` or without it. A key in the environment variable
            ``OPENAI_API_KEY`` is sent along.
    """

    def __init__(self, url: str) -> None:
        base = url.rstrip("/")
        self.base = base if base.endswith("/v1") else f"{base}/v1"
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(timeout=_TIMEOUT_SECONDS, trust_env=False, headers=headers)

    def __enter__(self) -> OpenAIServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def model(self) -> str:
        """Name of the first model that the server has."""
        return self.call("GET", "models", None, lambda reply: str(reply["data"][0]["id"]))

    def post(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """Send a request and read its reply with ``read``."""
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
            detail = " ".join(error.response.text.split())[:200]
            raise ShapeMoeError(f"The endpoint {url} refused with status {reply.status_code}: {detail}") from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            kind = f"{type(error).__name__}: " if isinstance(error, LookupError) else ""
            raise ShapeMoeError(
                f"The endpoint {url} did not answer as an OpenAI-compatible server does ({kind}{first_line(error)})."
            ) from error
