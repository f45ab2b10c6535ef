"""What OpenAI's API fixes for the gateway and the job store alike: the form of an error, and bodies of requests.

A body is refused here only for what no engine could answer or what the gateway itself has to know; the rest is the
engine's to judge, whose words reach the client. One rule set serves a request and a line of a batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

MOST_DEPTH = 128  # of lists and objects in each other: far above any use, far below where a parser gives up
_TYPES = {408: "timeout_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """An error in OpenAI's form."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


def parse(raw: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8, without NaN and infinity. Raises ValueError that says what is wrong where."""
    try:
        content = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # those below, and Python's for a number of thousands of digits, which adds advice
        raise ValueError(str(error).partition(";")[0]) from None
    _check_depth(content, raw)
    return content


def fault(path: str, body: Mapping[str, Any]) -> tuple[str, str] | None:
    """(parameter, sentence) of what is certainly wrong with a request to ``path``; None where the engine may judge."""
    if path.endswith("chat/completions"):
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            return "messages", "'messages' must be a list of objects"
    elif not isinstance(body.get("prompt"), (str, list)) and "prompt_embeds" not in body:
        return "prompt", "'prompt' must be a text or a list"
    if not isinstance(body.get("stream"), (bool, type(None))):
        return "stream", "'stream' must be true or false"
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if isinstance(value, (list, dict)) or (isinstance(value, (int, float)) and (value < 0 or value % 1)):
            return name, f"'{name}' must be a whole number of at least 0"
    return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:20]} is larger than any float")
    return value


def _check_depth(content: Any, raw: bytes) -> None:
    """What is parsed here is written again elsewhere, further down the stack, where less depth is left."""
    if raw.count(b"[") + raw.count(b"{") <= MOST_DEPTH or not isinstance(content, (dict, list)):
        return
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise _too_deep()
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]


def _too_deep() -> ValueError:
    return ValueError(f"more than {MOST_DEPTH} lists and objects in each other")
