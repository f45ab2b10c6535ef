"""Hand-over of KV: which requests can be cut in two, and what each connector of vLLM wants to read in the two parts.

A request is otherwise forwarded as the bytes that came; only here its body is changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ooco_gym.bridge.gateway.instances import InstanceError
from ooco_gym.bridge.gateway.load import Request


def is_single(payload: Mapping[str, Any]) -> bool:
    """One prompt and one answer that may be cut after its first token, as a hand-over of KV needs it.

    An engine that has to call a tool refuses to be cut: the one token is no complete call.
    """
    prompt = payload.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    forced = payload.get("tool_choice") not in (None, "auto", "none")
    return not (several or forced) and payload.get("n", 1) in (1, None) and payload.get("best_of", 1) in (1, None)


def prefill_body(payload: Mapping[str, Any], connector: str) -> bytes:
    """The request to the prefill instance: the client's, cut to one token and one answer, not streamed."""
    body = {key: value for key, value in payload.items() if key not in ("stream", "stream_options", "min_tokens")}
    body["stream"] = False
    body["max_tokens"] = 1
    if "max_completion_tokens" in body:
        body["max_completion_tokens"] = 1
    if connector == "nixl":
        body["kv_transfer_params"] = {"do_remote_decode": True, "do_remote_prefill": False}
    return json.dumps(body, separators=(",", ":")).encode()


def decode_body(request: Request, payload: Mapping[str, Any], answer: Mapping[str, Any], connector: str) -> bytes:
    """The request to the decode instance; the client's bytes where the connector finds KV by itself.

    Raises InstanceError where the prefill instance gave no parameters of a transfer.
    """
    if connector == "example":  # looks prompts up in the shared folder
        return request.body
    params = answer.get("kv_transfer_params")
    if not isinstance(params, Mapping) or not params:
        raise InstanceError("the prefill instance sent no kv_transfer_params")
    body = {**payload, "kv_transfer_params": params}
    return json.dumps(body, separators=(",", ":")).encode()
