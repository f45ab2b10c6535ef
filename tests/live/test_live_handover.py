"""Prefill on one real vLLM, decode on another: KV handed over through ExampleConnector's files."""

from dataclasses import replace

import pytest

from examples.live_cpu import servers

from .client import CHAT, COMPLETIONS, ask, chat, completion
from .conftest import ENGINE

PROMPT = "This prompt is computed on the relaxed instance, " * 8


@pytest.fixture(scope="module")
def handing(python, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("handing")
    engine = replace(ENGINE, more=servers.example_connector(folder / "kv"))
    with servers.vllm_servers(python, model, {"relaxed": engine, "strict": engine}, folder) as found:
        yield found, folder / "kv"


def test_hand_over_keeps_the_answer(handing, front, pair):
    found, kv = handing
    gateway = front([(found["relaxed"], "relaxed"), (found["strict"], "strict")], connector="example")
    cases = [(completion(PROMPT, 40), COMPLETIONS), (completion(PROMPT[::-1], 40, stream=True), COMPLETIONS),
             (chat(PROMPT, 40), CHAT), (chat(PROMPT.upper(), 40, stream=True), CHAT),
             (completion(PROMPT + "offline", 40, service_tier="flex"), COMPLETIONS)]  # fmt: skip
    for body, path in cases:
        plain = {key: value for key, value in body.items() if key != "service_tier"}
        expected = ask(pair["strict"].url, plain, path)  # no connector, nothing handed over
        answer = ask(gateway.url, body, path)
        assert answer.status == 200 and answer.error is None
        assert answer.text == expected.text
    handovers, recomputed = gateway.metrics("ooco_handovers_total", "ooco_recomputed_handovers_total")
    assert handovers >= len(cases) - 1 and recomputed == 0
    assert any(kv.rglob("*.safetensors"))
    # Each instance saw every prompt, and the relaxed one generated one token of each that it handed over.
    (generated,) = found["relaxed"].metrics("vllm:generation_tokens_total")
    assert generated <= len(cases) + 40
