"""A replica by URL: any server of the OpenAI API (vLLM, SGLang, llama.cpp's server, another gateway)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

import aiohttp
from pydantic import Field, field_validator

from steersman.runtime.config import Model
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import ReplicaGroup
from steersman.runtime.replica import Progress, Replica, Scraped
from steersman.runtime.replica._metrics import scrape


class OpenAIBackend(Model):
    """Options of a replica by URL."""

    url: str = Field(description="scheme, host and port, with or without /v1")
    model: str | None = Field(default=None, description="the model's name there, if not the client's")
    api_key_env: str | None = Field(default=None, description="environment variable that holds its API key")
    metrics_url: str | None = Field(default=None, description="Prometheus metrics; default: url/metrics")
    start_timeout_s: float = Field(default=5.0, gt=0, description="how long to wait for it at the start")

    @field_validator("url")
    @classmethod
    def _has_scheme(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return url.rstrip("/").removesuffix("/v1")

    def open(self, name: str, group: ReplicaGroup) -> Replica:
        """The replica `name`.

        Raises:
            UserError: the environment variable of its key is not set, or holds none.
        """
        headers = {}
        if self.api_key_env is not None:
            if not self.api_key_env.isidentifier():  # most likely the key itself, which is not shown
                raise UserError(f"replica {name!r}: api_key_env names the environment variable, not the key itself")
            key = os.environ.get(self.api_key_env, "").strip()  # of a secret's file, with the end of its line
            if not key:
                raise UserError(f"replica {name!r}: environment variable {self.api_key_env} (its API key) is not set")
            if not (key.isascii() and key.isprintable()):
                raise UserError(f"replica {name!r}: {self.api_key_env} holds no API key: it has odd characters")
            headers["Authorization"] = f"Bearer {key}"
        return OpenAIReplica(name, self, headers)


class OpenAIReplica:
    """A server that somebody else runs."""

    def __init__(self, name: str, options: OpenAIBackend, headers: dict[str, str]) -> None:
        self.name = name
        self._options = options
        self._headers = headers
        # Who has no /health is asked for its models; what answered comes first.
        self._asked: tuple[str, ...] = ("/health", "/v1/models")

    @property
    def base_url(self) -> str:
        return self._options.url

    @property
    def headers(self) -> Mapping[str, str]:
        return self._headers

    @property
    def served_model(self) -> str | None:
        return self._options.model

    async def start(self, session: aiohttp.ClientSession, progress: Progress) -> None:
        progress(f"waiting for {self.base_url}")
        deadline = asyncio.get_running_loop().time() + self._options.start_timeout_s
        while (problem := await self._problem(session)) is not None:
            if asyncio.get_running_loop().time() >= deadline:
                raise UserError(
                    f"replica {self.name!r}: {self.base_url} does not answer ({problem}); "
                    "start that server or correct backend.options.url in the fleet file"
                )
            await asyncio.sleep(0.25)
        progress("up")

    async def healthy(self, session: aiohttp.ClientSession) -> bool:
        return await self._problem(session) is None

    async def _problem(self, session: aiohttp.ClientSession) -> str | None:
        """What is wrong, or None."""
        problem = "no answer"
        for path in self._asked:
            try:
                async with session.get(
                    self.base_url + path, headers=self._headers, timeout=aiohttp.ClientTimeout(total=1.0)
                ) as response:
                    if response.status == 200:
                        self._asked = (path, *(other for other in self._asked if other != path))
                        return None
                    problem = f"{path} gave status {response.status}"
                    if response.status != 404:
                        return problem
            except aiohttp.ClientConnectorError as error:
                return str(error.os_error.strerror or error.os_error or "no connection").lower()
            except (aiohttp.ClientError, OSError) as error:
                return str(error) or type(error).__name__
            except TimeoutError:
                return "no answer within 1 s"
        return problem

    async def scrape(self, session: aiohttp.ClientSession) -> Scraped | None:
        url = self._options.metrics_url or self.base_url + "/metrics"
        return await scrape(session, url, None, self._headers)

    async def stop(self) -> None:
        """Nothing: it is not ours."""


BACKEND = OpenAIBackend
