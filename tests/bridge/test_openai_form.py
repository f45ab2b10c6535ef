"""One rule set for bodies: an online request and a line of a batch are refused for the same, in the same words."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("uvicorn", reason="the bridge extra is not installed")
pytest.importorskip("aiohttp", reason="the bridge extra is not installed")
from fake_upstream import FakeUpstream, upstreams
from harness import config_for, gateway

from ooco_gym.bridge import openai_form
from ooco_gym.bridge.jobs import Limits
from ooco_gym.bridge.jobs.validation import Validator

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
NOT_JSON = {
    '{"prompt": NaN}': "NaN is not JSON",
    '{"prompt": "x", "temperature": Infinity}': "Infinity is not JSON",
    '{"prompt": "x", "temperature": -Infinity}': "-Infinity is not JSON",
    '{"prompt": "x", "temperature": 1e999}': "1e999 is larger than any float",
    '{"prompt": "x", "seed": ' + "1" * 5000 + "}": "Exceeds the limit",
    '{"prompt": ' + "[" * 200 + "]" * 200 + "}": "more than 128 lists and objects in each other",
    '{"prompt": ' + "[" * 9999 + "]" * 9999 + "}": "more than 128 lists and objects in each other",
    '{"prompt": "x"': "Expecting ',' delimiter at character",
    '{"prompt": "x",}': "at character",
}
WRONG = [
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": None}, "prompt"),
    (TEXT, {"prompt": 3}, "prompt"),
    (TEXT, {"prompt": {"text": "x"}}, "prompt"),
    (CHAT, {"prompt": "x"}, "messages"),
    (CHAT, {"messages": "x"}, "messages"),
    (CHAT, {"messages": {"role": "user"}}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}, "x"]}, "messages"),
    (TEXT, {"prompt": "x", "stream": "yes"}, "stream"),
    (TEXT, {"prompt": "x", "stream": 1}, "stream"),
    (TEXT, {"prompt": "x", "max_tokens": -1}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 2.5}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": [2]}, "max_tokens"),
    (CHAT, {"messages": [], "max_completion_tokens": -7}, "max_completion_tokens"),
]
RIGHT = [  # or the engine's to judge
    (TEXT, {"prompt": ""}),
    (TEXT, {"prompt": []}),
    (TEXT, {"prompt": [[]]}),
    (TEXT, {"prompt": [1, "a", [None]]}),
    (TEXT, {"prompt_embeds": "AA=="}),
    (TEXT, {"prompt": "x", "stream": None, "max_tokens": None}),
    (TEXT, {"prompt": "x", "stream": False, "max_tokens": 0}),
    (TEXT, {"prompt": "x", "max_tokens": 5.0}),
    (TEXT, {"prompt": "x", "max_tokens": "5"}),
    (CHAT, {"messages": [], "unknown": {"a": [1.5e300, -0.0]}}),
    (TEXT, {"prompt": "\ud800 [[[[{{{{"}),
]


def line(path, body):
    """A line of a batch, with ``body`` as it is spelt."""
    return f'{{"custom_id": "a", "method": "POST", "url": "{path}", "body": {body}}}'.encode()


def faults(path, body):
    validator = Validator(path, Limits())
    validator.feed(line(path, '{"prompt": "fine", "messages": []}').replace(b'"a"', b'"first"') + b"\n")
    validator.feed(line(path, body))
    validator.end()
    return validator.errors


def test_requests_and_lines_are_refused_alike():
    async def scenario():
        async with upstreams(FakeUpstream()) as (only,), gateway(config_for([only])) as client:
            for body, reason in NOT_JSON.items():
                status, answer, _ = await client.post(body.encode())
                error = json.loads(answer)["error"]
                assert (status, error["code"]) == (400, "invalid_json")
                (fault,) = faults(TEXT, body)
                assert (fault["code"], fault["line"]) == ("invalid_json_line", 2)
                assert reason in error["message"] and reason in fault["message"]
            for path, body, param in WRONG:
                status, answer, _ = await client.post(body, path)
                error = json.loads(answer)["error"]
                assert (status, error["code"], error["param"]) == (400, "invalid_value", param), body
                (fault,) = faults(path, json.dumps(body))
                assert (fault["code"], fault["line"], fault["param"]) == ("invalid_body", 2, f"body.{param}"), body
                assert fault["message"] == error["message"] + "."
            assert not only.log and client.bridge.gateway.refusals == {400: len(NOT_JSON) + len(WRONG)}

    asyncio.run(asyncio.wait_for(scenario(), 20))


@pytest.mark.parametrize(("path", "body"), RIGHT)
def test_what_an_engine_may_judge_is_passed_on(path, body):
    assert openai_form.fault(path, openai_form.parse(json.dumps(body).encode())) is None
    assert not faults(path, json.dumps(body))


def test_a_batch_does_not_stream():
    (fault,) = faults(TEXT, '{"prompt": "x", "stream": true}')
    assert fault["param"] == "body.stream" and "cannot stream" in fault["message"]


def test_json_is_utf8_with_or_without_its_mark():
    assert openai_form.parse(b'\xef\xbb\xbf{"prompt": "\xc3\xa4"}') == {"prompt": "ä"}
    with pytest.raises(ValueError, match="not UTF-8 at byte 2"):
        openai_form.parse(b'"\xff"')


def test_the_last_of_two_equal_keys_counts_as_it_does_in_the_engine():
    assert openai_form.parse(b'{"stream": 3, "stream": true}') == {"stream": True}


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (405, "invalid_request_error"),
                         (408, "timeout_error"), (429, "rate_limit_error"), (507, "server_error")])  # fmt: skip
def test_errors_have_openais_form(status, kind):
    error = json.loads(openai_form.error_body(status, "no", "prompt", "code"))["error"]
    assert error == {"message": "no", "type": kind, "param": "prompt", "code": "code"}
