"""A gateway on a real socket in the test's own event loop, in front of fake instances."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import aiohttp

from ooco_gym.bridge.gateway.config import parse_config
from ooco_gym.bridge.gateway.serve import Bridge, make_server
from ooco_gym.policy import ConstantPolicy

# A busy machine must not look like an instance that is gone or a policy that hangs.
PATIENT = {"connect_s": 20.0, "probe_s": 20.0}
SCENARIO = {"model": "qwen2.5-7b", "hardware": "a100", "slo": {"ttft_s": 0.5, "tpot_s": 0.05}}


def config_for(relaxed, strict=(), environment=None, **settings):
    instances = [{"url": fake.url, "role": "relaxed"} for fake in relaxed]
    instances += [{"url": fake.url, "role": "strict"} for fake in strict]
    for fake, entry in zip([*relaxed, *strict], instances, strict=True):
        entry["max_num_seqs"] = fake.max_num_seqs
    values = {"instances": instances, "scenario": SCENARIO, "listen": {"port": 0}, "scrape_interval_s": 0.05,
              "control_interval_s": 0.05, "policy_time_s": 20.0, **settings}  # fmt: skip
    values["timeouts"] = {**PATIENT, **settings.get("timeouts", {})}
    return parse_config(values, environment or {})


class Client:
    """What a test says to the gateway."""

    def __init__(self, session, base, bridge, server):
        self.session, self.base, self.bridge, self.server = session, base, bridge, server

    @property
    def scheduler(self):
        return self.bridge.scheduler

    @property
    def totals(self):
        return self.bridge.ledger.totals

    async def post(self, payload, path="/v1/completions", headers=None, base=None):
        """(status, body, headers)."""
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        async with self.session.post((base or self.base) + path, data=data, headers=headers or {}) as answer:
            return answer.status, await answer.read(), answer.headers

    async def get(self, path):
        async with self.session.get(self.base + path) as answer:
            return answer.status, await answer.read()

    async def text(self, payload, path="/v1/completions", **more):
        """The text of a streamed or whole answer."""
        status, body, _ = await self.post(payload, path, **more)
        assert status == 200, body
        return text_of(body)

    async def until(self, condition, seconds=15.0):
        """Wait for something to become true."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not condition():
            assert loop.time() < end, "waited in vain"
            await asyncio.sleep(0.005)

    async def rounds(self, count=2):
        """Wait for more rounds of the control loop: what must not happen had the occasion to."""
        seen = self.bridge.control.decisions
        await self.until(lambda: self.bridge.control.decisions >= seen + count)


def text_of(body):
    if not body.startswith(b"data:"):
        choice = json.loads(body)["choices"][0]
        return choice["message"]["content"] if "message" in choice else choice["text"]
    text = ""
    for line in body.decode().split("\n\n"):
        if line.startswith("data: {"):
            for choice in json.loads(line[6:]).get("choices", []):
                text += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    return text


async def _shut_down(server):
    """What uvicorn does at its end, but waiting for its connections to go instead of 0.1 s."""
    for listener in server.servers:
        listener.close()
    for connection in list(server.server_state.connections):
        connection.shutdown()
    while server.server_state.connections or server.server_state.tasks:
        await asyncio.sleep(0.001)
    await server.lifespan.shutdown()


@asynccontextmanager
async def gateway(config, policy=None, signals=False):
    """A client of a running gateway whose policy has decided once.

    ``signals``: under the server's own loop, which ends it (and costs 0.2 s).
    """
    bridge = Bridge(config, policy or ConstantPolicy(name="ooco"))
    server = make_server(bridge)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    task = asyncio.create_task(server.serve()) if signals else None
    if task is None:
        await server.startup()
    while not server.started:
        assert task is not None and not task.done(), "the gateway did not start"
        await asyncio.sleep(0.005)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        client = Client(session, f"http://127.0.0.1:{server.port()}", bridge, server)
        try:
            await client.until(lambda: bridge.control.decisions)
            yield client
        finally:
            server.should_exit = True
            await session.close()
            await asyncio.wait_for(_shut_down(server) if task is None else task, 10)
