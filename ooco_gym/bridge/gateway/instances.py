"""One vLLM instance as the gateway sees it: its address, its health, its scraped metrics. Nothing here decides."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from ooco_gym.bridge.gateway.config import InstanceConfig, Timeouts
from ooco_gym.bridge.gateway.load import DECODE, Load
from ooco_gym.errors import OocoError

PATHS = ("/v1/completions", "/v1/chat/completions")
FAILURES_TO_DOWN = 2  # health checks in a row
KEEPALIVE_S = 3.0  # below the 5 s after which vLLM closes an idle connection


class InstanceError(Exception):
    """An instance did not answer, or broke off, or said 5xx: the request may be tried elsewhere.

    ``lost``: nothing listens there. ``answer``: its own words, where it had any.
    """

    def __init__(self, reason: str, lost: bool = False, answer: Any = None) -> None:
        super().__init__(reason)
        self.lost, self.answer = lost, answer
        self.instance: Instance | None = None


class RefusalError(Exception):
    """An instance declined a request that another one may take; ``status`` and ``body`` are its answer."""

    def __init__(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.body, self.content_type = status, body, content_type
        self.instance: Instance | None = None


@dataclass
class Scrape:
    """What /metrics said, by vLLM's names; ``at_s`` is the monotonic clock."""

    at_s: float
    running: float
    waiting: float
    kv_usage: float
    first_tokens: float | None = None  # count of the TTFT histogram: requests that got their first token
    gaps: float = 0.0  # count and seconds of the gaps between two tokens of a request
    gaps_s: float = 0.0
    preemptions: float = 0.0
    prompt_tokens: float = 0.0
    generation_tokens: float = 0.0
    kv_blocks: int | None = None
    block_tokens: int | None = None


_SUMS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:time_to_first_token_seconds_count": "first_tokens",
    "vllm:inter_token_latency_seconds_count": "gaps",
    "vllm:inter_token_latency_seconds_sum": "gaps_s",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
}


def parse_scrape(text: str, at_s: float) -> Scrape:
    """Read a page of vLLM metrics, summed over engines and models; raises OocoError where it is not one."""
    sums: dict[str, float] = {}
    engines = 0
    blocks: int | None = None
    block_tokens: int | None = None
    # Only the families that are needed: the page has some 400 lines of histogram buckets.
    wanted = (*_SUMS, "vllm:cache_config_info")
    lines = [line for line in text.splitlines() if line.startswith(wanted)]
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                if sample.name == "vllm:cache_config_info":
                    blocks = _whole(sample.labels.get("num_gpu_blocks")) or blocks
                    block_tokens = _whole(sample.labels.get("block_size")) or block_tokens
                elif sample.name in _SUMS:
                    key = _SUMS[sample.name]
                    sums[key] = sums.get(key, 0.0) + sample.value
                    engines += key == "kv_usage"
    except ValueError as error:
        raise OocoError(f"metrics page cannot be read ({error})") from None
    missing = [name for name, key in _SUMS.items() if key in ("running", "waiting", "kv_usage") and key not in sums]
    if missing:
        raise OocoError(f"metrics page has no {missing[0]}")
    sums["kv_usage"] /= max(engines, 1)
    return Scrape(at_s=at_s, kv_blocks=blocks, block_tokens=block_tokens, **sums)


def _whole(label: str | None) -> int | None:
    return int(label) if label is not None and label.isdigit() and int(label) > 0 else None


class Instance:
    """One vLLM server: where it is, how it is, and what the gateway has sent to it."""

    def __init__(
        self,
        index: int,
        config: InstanceConfig,
        kv_blocks: int,
        block_tokens: int,
        max_seqs: int,
        saturation_batch: int,
    ) -> None:
        self.index = index
        self.config = config
        self.role = config.role
        self.name = f"{config.role}{index}"
        self.urls = {path: URL(config.url + path) for path in (*PATHS, "/health", "/metrics", "/v1/models")}
        self.load = Load()
        self.up = False
        self.failures = 0
        self.scrape: Scrape | None = None
        self.scrape_error = ""
        self.tokens_at_scrape = 0
        self.decodes_at_scrape = (0, 0)  # and their tokens in context
        self.gaps: tuple[float, float] | None = None  # mean seconds and count of gaps between tokens, not yet learned
        self.kv_blocks = kv_blocks
        self.block_tokens = block_tokens
        self.max_seqs = config.max_num_seqs or max_seqs
        self.saturation_batch = saturation_batch
        self.refused_until_s = 0.0
        self.next_pull_s = 0.0
        self.reserved = 0  # offline decodes on their way here
        self.reserved_tokens = 0
        self.first_streamed = 0  # first tokens seen in streams since the last scrape
        self.blind_ended = 0  # requests that ended since the last scrape while their first token was not known

    @property
    def kv_tokens(self) -> int:
        """Size of the KV cache in tokens."""
        return self.kv_blocks * self.block_tokens

    def kv_demand(self) -> float:
        """KV wanted as a share of the cache: the last scrape, moved on by what was sent and what ended since."""
        usage = self.scrape.kv_usage if self.scrape is not None else 0.0
        since = self.load.tokens - (self.tokens_at_scrape if self.scrape is not None else 0)
        return usage + since / self.kv_tokens

    def kv_usage(self) -> float:
        """The same as a share of what there is."""
        return min(max(self.kv_demand(), 0.0), 1.0)

    def take_scrape(self, scrape: Scrape) -> None:
        """Book a scrape: KV size where it is not configured, and which unstreamed requests have begun to decode."""
        before = self.scrape
        self.scrape, self.scrape_error = scrape, ""
        self.tokens_at_scrape = self.load.tokens
        if self.config.kv_blocks is None and scrape.kv_blocks:
            self.kv_blocks, self.block_tokens = scrape.kv_blocks, scrape.block_tokens or self.block_tokens
        if before is not None and scrape.gaps > before.gaps:
            count = scrape.gaps - before.gaps
            self.gaps = ((scrape.gaps_s - before.gaps_s) / count, count)
        if before is not None and before.first_tokens is not None and scrape.first_tokens is not None:
            self._promote(int(scrape.first_tokens - before.first_tokens) - self.first_streamed - self.blind_ended)
        self.first_streamed = self.blind_ended = 0

    def _promote(self, known: int) -> None:
        """The engine is first come, first served: the oldest unstreamed requests are those whose prefill ended."""
        if known <= 0:
            return
        for request in list(self.load.requests):
            if request.blind and request.phase != DECODE:
                self.load.prefilled(request)
                known -= 1
                if known == 0:
                    return

    def fail(self, reason: str) -> None:
        """A request or a probe found it dead; it is up again with the next good health check."""
        self.up = False
        self.scrape_error = reason

    async def probe(self, session: aiohttp.ClientSession, timeouts: Timeouts, headers: Mapping[str, str]) -> None:
        """One health check and one scrape."""
        limit = aiohttp.ClientTimeout(total=timeouts.probe_s)
        try:
            async with session.get(self.urls["/health"], timeout=limit, headers=headers) as response:
                if response.status != 200:
                    raise InstanceError(f"/health says {response.status}")
        except (InstanceError, aiohttp.ClientError, OSError, TimeoutError) as error:
            self.failures += 1
            if self.failures >= FAILURES_TO_DOWN or not self.up:
                self.fail(reason(error))
            return
        self.failures = 0
        self.up = True
        try:
            async with session.get(self.urls["/metrics"], timeout=limit, headers=headers) as response:
                text = await response.text()
            self.take_scrape(parse_scrape(text, time.monotonic()))
        except (OocoError, aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError) as error:
            self.scrape_error = reason(error)


def reason(error: Exception) -> str:
    """What went wrong with an instance, in words."""
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno:
        return f"cannot connect to {error.host}:{error.port} ({os.strerror(error.os_error.errno)})"
    return str(error) or type(error).__name__


def make_session(timeouts: Timeouts) -> aiohttp.ClientSession:
    """The one client session; connections are kept, nothing is decoded, limits are the scheduler's business."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept-Encoding"),
        read_bufsize=2**18,
        trust_env=False,
    )
