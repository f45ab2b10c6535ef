"""The status page as a browser shows it, in front of a real gateway: headless Chromium, both colour schemes."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("uvicorn", reason="the bridge extra is not installed")
pytest.importorskip("aiohttp", reason="the bridge extra is not installed")
from browser import BINARY, chromium, tab
from fake_upstream import FakeUpstream, upstreams
from harness import SCENARIO, config_for, gateway

from ooco_gym.policy import ConstantPolicy

pytestmark = pytest.mark.skipif(BINARY is None, reason="there is no chromium on PATH")

PATIENT = ConstantPolicy("patient", knobs={"preempt_slack": 0.5, "gate_batch": 0.1})

#: Every text with less contrast to what is behind it than 4.5 (WCAG 2, level AA).
PALE = """
(() => {
  const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length === 3 ? [...n, 1] : n; };
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => {
    const c = rgba(getComputedStyle(e).backgroundColor);
    return c[3] === 1 ? c : behind(e.parentElement);
  };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !e.checkVisibility()) continue;
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    texts += 1;
    if ((a + .05) / (b + .05) < 4.5) found.push(walk.currentNode.textContent + ": " + (a + .05) / (b + .05));
  }
  return texts > 10 ? found : ["only " + texts + " texts"];
})()
"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as address:
        yield address


def run(scene):
    asyncio.run(asyncio.wait_for(scene, 30))


async def refresh(page):
    """The page asks the gateway now instead of in two seconds."""
    await page.evaluate("ask()")


async def state(page):
    return await page.evaluate("document.body.dataset.state")


TILE = """
(title => {
  const tile = [...document.querySelectorAll(".tile")].find(t => t.firstChild.textContent.startsWith(title));
  const lines = [...tile.querySelectorAll("dl div")].map(d => [d.firstChild.innerText, d.lastChild.innerText]);
  return [tile.querySelector("b").innerText, Object.fromEntries(lines)];
})
"""


async def tile(page, title):
    """(the big figure, the lines below as a dictionary) of the tile with that title."""
    return await page.evaluate(f"{TILE}({json.dumps(title)})")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_answers_whether_where_and_why(browser, scheme):
    async def scene():
        fakes = [FakeUpstream(decode_s=0.02, max_num_seqs=8), FakeUpstream(decode_s=0.02, max_num_seqs=8)]
        async with upstreams(*fakes) as (relaxed, strict), gateway(config_for([relaxed], [strict]), PATIENT) as client:
            await client.text({"prompt": "p", "stream": True, "max_tokens": 3})
            work = [{"prompt": "p", "stream": True, "max_tokens": 2000}] * 2
            work += [{"prompt": "q", "service_tier": "flex", "max_tokens": 2000}]
            tasks = [asyncio.create_task(client.post(payload)) for payload in work]
            await client.until(lambda: relaxed.running + strict.running == 3)
            decisions = client.bridge.control.decisions
            await client.until(lambda: client.bridge.control.decisions > decisions + 1)
            async with tab(browser) as page:
                await page.open(client.base + "/status", scheme)
                await page.until("document.body.dataset.state !== 'waiting'")
                client.bridge.ledger.start_s -= 2.0  # the second in which the first answer ended is over
                await client.until(lambda: client.bridge.control.last.at_s > 2.0)
                await refresh(page)
                assert await state(page) == "kept"
                assert (await page.text("#verdict")).startswith("Objectives kept")
                assert await page.evaluate("document.title") == "Objectives kept \u2013 ooco-gym gateway"
                figure, lines = await tile(page, "Within objectives")
                assert figure == "100 %" and lines["since the start"] == "100 % of 1"
                figure, lines = await tile(page, "Online")
                assert figure == "2" and lines["finished"] == "1" and lines["failed"] == "0"
                assert (await tile(page, "Offline"))[0] == "1"
                figure, lines = await tile(page, "Policy")
                assert figure == "patient" and lines["preempt_slack"] == "0.5, ooco 0"
                assert "pull_kv" not in lines  # as in ooco
                rows = await page.text("#instances")
                assert relaxed.url in rows and strict.url in rows and "of 8" in rows
                assert rows.count("\tup\t") == 2
                knobs = await page.text("#knobs")
                assert "abort offline prefills when an online TTFT is predicted above 250 ms" in knobs
                assert "no effect: the engine cuts prompts" in knobs
                await refresh(page)  # the second point of every line
                assert await page.evaluate("document.querySelectorAll('svg path').length") == 3
                assert await page.evaluate(PALE) == []
                for width in (1280, 800, 390, 320):
                    await page.resize(width)
                    assert await page.evaluate("document.documentElement.scrollWidth") <= width
                assert page.problems == []
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(scene())


class Broken(ConstantPolicy):
    def decide(self, telemetry):
        raise ValueError("weights are <b>gone</b>")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_says_what_is_wrong(browser, scheme):
    """Missed objectives, an instance that is down, a policy that fails, a dry run; text is never taken for markup."""

    async def scene():
        slow = {**SCENARIO, "slo": {"ttft_s": 0.01, "tpot_s": 0.05}}
        fakes = [FakeUpstream(prefill_s_per_token=0.03), FakeUpstream(healthy=False)]
        async with upstreams(*fakes) as (relaxed, strict):
            config = config_for([relaxed], [strict], scenario=slow, dry_run=True)
            async with gateway(config, Broken("<i>learned</i>")) as client, tab(browser) as page:
                await client.text({"prompt": "p", "stream": True, "max_tokens": 3})
                client.bridge.ledger.start_s -= 2.0
                await client.until(lambda: client.bridge.control.last.at_s > 2.0)
                await page.open(client.base + "/status", scheme)
                await page.until("document.body.dataset.state === 'missed'")
                assert "0 % of 1 online request of the last minute within TTFT 10 ms" in await page.text("#detail")
                assert (await tile(page, "Within objectives"))[1]["late: TTFT / TPOT / deadline"] == "1 / 0 / 0"
                alerts = (await page.text("#alerts")).split("\n")
                assert [line for line in alerts if line] == [
                    "the whole strict pool is down",
                    "strict1 is down: /health says 503",
                    "<i>learned</i> failed, ooco decides: the policy raised ValueError: weights are <b>gone</b>",
                    "dry run: decisions are logged, nothing is enforced",
                ]
                assert (await tile(page, "Policy"))[0] == "ooco, for <i>learned</i>"
                assert await page.evaluate("document.querySelectorAll('i:not(.bar i), #alerts b').length") == 0
                assert "down\n/health says 503" in await page.text("#instances")
                assert await page.evaluate(PALE) == []
                relaxed.healthy = False
                await client.until(lambda: not any(instance.up for instance in client.scheduler.instances))
                await refresh(page)
                assert await state(page) == "down"
                assert (await page.text("#verdict")).startswith("No instance is up")
                assert page.problems == []

    run(scene())


def test_page_says_that_the_gateway_is_silent_and_how_old_its_figures_are(browser):
    async def scene():
        async with upstreams(FakeUpstream()) as (relaxed,), tab(browser) as page:
            async with gateway(config_for([relaxed], control_interval_s=60)) as client:
                await page.open(client.base + "/status")
                await page.until("document.body.dataset.state === 'idle'")
                client.bridge.control.last = None
                await refresh(page)
                assert "No decision yet" in await page.text("#decision")
                assert not await page.evaluate("document.querySelector('#settings').checkVisibility()")
                assert page.problems == []

                await page.evaluate("getSelection().selectAllChildren(document.querySelector('#instances small'))")
                await refresh(page)
                assert await page.evaluate("String(getSelection())") == relaxed.url  # it can still be copied

                real = client.bridge.gateway.status
                client.bridge.gateway.status = lambda: {"uptime_s": 1.0}
                await refresh(page)
                assert (await page.text("#verdict")).startswith("No figures for ")
                assert "load it again" in await page.text("#detail")
                client.bridge.gateway.status = real
                await refresh(page)
                assert await state(page) == "idle"

                await page.evaluate(
                    "AbortSignal.timeout = () => AbortSignal.abort(new DOMException('', 'TimeoutError'))"
                )
                await refresh(page)
                assert "it took more than 5 s" in await page.text("#detail")
                await page.evaluate("AbortSignal.timeout = () => undefined")
            await page.evaluate("heardMs -= 90000")
            await refresh(page)  # nobody listens any more
            assert await state(page) == "silent"
            assert await page.text("#headline") == "No answer from the gateway for 1 min"
            assert await page.text("#detail") == "it cannot be reached; what is below was seen 1 min ago"
            assert relaxed.url in await page.text("#instances")
            assert await page.evaluate(PALE) == []

    run(scene())
