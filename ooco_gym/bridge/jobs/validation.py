"""Whether an uploaded file is a batch: each fault names its line. Codes are OpenAI's where OpenAI has one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ooco_gym.bridge import openai_form
from ooco_gym.errors import shown

METHOD = "POST"
ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
MOST_ID_CHARACTERS = 512


@dataclass(frozen=True)
class Limits:
    """What a user may ask of the job store; the first two are OpenAI's."""

    max_file_bytes: int = 200 * 1024 * 1024
    max_requests: int = 50_000
    max_line_bytes: int = 4 * 1024 * 1024
    max_errors: int = 100  # listed in a failed batch; the file is not read any further
    completion_window_s: int = 24 * 3600
    body_s: float = 30.0  # that a client may be silent in the middle of a body


class _LineError(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class Validator:
    """Takes a file piece by piece (``feed``, then ``end``), gives back its requests and collects what is wrong."""

    def __init__(self, endpoint: str, limits: Limits) -> None:
        self.errors: list[dict[str, Any]] = []
        self._endpoint = endpoint
        self._limits = limits
        self._rest = b""
        self._is_skipping = False  # inside a line already known to be too long
        self._line = 0
        self._lines_of_ids: dict[str, int] = {}

    @property
    def is_over(self) -> bool:
        """Whether reading on would tell nothing more."""
        return len(self.errors) >= self._limits.max_errors or len(self._lines_of_ids) > self._limits.max_requests

    def feed(self, piece: bytes) -> list[tuple[int, str, str]]:
        """The requests (line, custom_id, body) of the lines that ``piece`` completes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        found = list(self._requests(lines))
        if len(self._rest) > self._limits.max_line_bytes:
            if not self._is_skipping:
                self._too_long(self._line + 1)
            self._is_skipping, self._rest = True, b""
        return found

    def end(self) -> list[tuple[int, str, str]]:
        """The request of a last line without line end; an empty file is an error, too."""
        found = list(self._requests([self._rest]))
        if not self._lines_of_ids and not self.errors:
            self._fault("empty_file", "The input file has no requests.", None)
        return found

    def _requests(self, lines: list[bytes]) -> Iterator[tuple[int, str, str]]:
        for raw in lines:
            self._line += 1
            if self._is_skipping:
                self._is_skipping = False
                continue
            if self.is_over:
                return
            line = raw.removeprefix(b"\xef\xbb\xbf") if self._line == 1 else raw
            if not line.strip():
                continue
            if len(line) > self._limits.max_line_bytes:
                self._too_long(self._line)
                continue
            try:
                custom_id, body = self._request(line)
            except _LineError as error:
                self._fault(error.code, str(error), self._line, error.param)
            else:
                yield self._line, custom_id, body

    def _request(self, line: bytes) -> tuple[str, str]:
        request = _json_object(line)
        for key in ("custom_id", "method", "url", "body"):
            if request.get(key) is None:
                raise _LineError("missing_required_parameter", f"Missing required parameter: '{key}'.", key)
        custom_id = self._custom_id(request["custom_id"])
        if request["method"] != METHOD:
            raise _LineError("invalid_method", f"method is {shown(request['method'])}; 'POST' is accepted.", "method")
        if request["url"] not in ENDPOINTS:
            known = " and ".join(f"'{url}'" for url in ENDPOINTS)
            raise _LineError("invalid_url", f"url is {shown(request['url'])}; {known} are accepted.", "url")
        if request["url"] != self._endpoint:
            message = f"url is '{request['url']}', which is not the batch's endpoint '{self._endpoint}'."
            raise _LineError("url_mismatch", message, "url")
        body = request["body"]
        if not isinstance(body, dict):
            raise _LineError("invalid_body", "body must be a JSON object.", "body")
        if fault := openai_form.fault(self._endpoint, body):
            raise _LineError("invalid_body", f"{fault[1]}.", f"body.{fault[0]}")
        if body.get("stream"):
            raise _LineError("invalid_body", "'stream' is true; a batch cannot stream, leave it out.", "body.stream")
        return custom_id, json.dumps(body)

    def _custom_id(self, custom_id: Any) -> str:
        if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MOST_ID_CHARACTERS:
            raise _LineError(
                "invalid_custom_id", f"custom_id must be a string of 1 to {MOST_ID_CHARACTERS} characters.", "custom_id"
            )
        try:
            custom_id.encode()
        except UnicodeEncodeError:
            raise _LineError("invalid_custom_id", "custom_id holds half a surrogate pair.", "custom_id") from None
        first = self._lines_of_ids.setdefault(custom_id, self._line)
        if first != self._line:
            message = f"The custom_id {custom_id!r} was used before, on line {first}; each must be unique in its batch."
            raise _LineError("duplicate_custom_id", message, "custom_id")
        if len(self._lines_of_ids) > self._limits.max_requests:
            raise _LineError("too_many_tasks", f"A batch has at most {self._limits.max_requests:,} requests.")
        return custom_id

    def _too_long(self, line: int) -> None:
        self._fault("line_too_long", f"A line has at most {self._limits.max_line_bytes:,} bytes.", line)

    def _fault(self, code: str, message: str, line: int | None, param: str | None = None) -> None:
        if len(self.errors) < self._limits.max_errors:
            self.errors.append({"code": code, "line": line, "message": message, "param": param})


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        value = openai_form.parse(line)
    except ValueError as error:
        raise _LineError("invalid_json_line", f"This line is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise _LineError("invalid_json_line", "This line is not a JSON object.")
    return value
