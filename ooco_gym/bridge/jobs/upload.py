"""A multipart upload, streamed piece by piece into the store: memory stays small and a broken upload leaves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from ooco_gym.bridge.jobs.records import PART_BYTES
from ooco_gym.bridge.jobs.store import Store
from ooco_gym.bridge.jobs.validation import Limits
from ooco_gym.errors import OocoError

MOST_FIELD_BYTES = 64 * 1024  # all form fields and part headers together
FORM_BYTES = MOST_FIELD_BYTES + 64 * 1024  # what a form may add to its file


class TooLargeError(OocoError):
    """More bytes than the limit."""


class SilentError(OocoError):
    """The client did not go on, or went away."""


class _Form:
    """What the parser has found: small fields by name, and the file's bytes since they were last taken."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.is_whole = False
        self.content = bytearray()
        self._name = ""
        self._is_file = False
        self._value = bytearray()
        self._header, self._disposition = bytearray(), bytearray()
        self._small = 0

    def callbacks(self) -> dict[str, Any]:
        parts = ("part_begin", "part_data", "part_end", "end")
        headers = ("header_field", "header_value", "header_end", "headers_finished")
        return {f"on_{name}": getattr(self, f"_{name}") for name in parts + headers}

    def _part_begin(self) -> None:
        self._name, self._is_file = "", False
        self._value.clear()
        self._disposition.clear()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += self._counted(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition += self._counted(data[start:end])

    def _header_end(self) -> None:
        self._header.clear()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = self._name == "file" and b"filename" in options
        if self._is_file:
            if self.filename is not None:
                raise OocoError("the form has more than one part 'file'; one file per upload is accepted")
            self.filename = options[b"filename"].decode("utf-8", "replace")[:255] or "upload"

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.content += data[start:end]
        else:
            self._value += self._counted(data[start:end])

    def _part_end(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self.is_whole = True

    def _counted(self, data: bytes) -> bytes:
        self._small += len(data)
        if self._small > MOST_FIELD_BYTES:
            raise TooLargeError(
                f"the form's fields have more than {MOST_FIELD_BYTES:,} bytes; only 'file' may be large"
            )
        return data


async def receive(request: Request, store: Store, limits: Limits) -> tuple[int, int, str, dict[str, str]]:
    """Stream the form's part 'file' into the store; returns the upload's number, size, name and the other fields.

    The upload is not a file yet: that is ``Store.complete_file``. Raises TooLargeError, SilentError, or OocoError for
    what is not such a form; then nothing stays.
    """
    max_bytes = limits.max_file_bytes
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise OocoError("the upload is not multipart/form-data with a boundary, which is what is accepted")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes + FORM_BYTES:
        raise _too_large(max_bytes)
    form, part, size, received = _Form(), 0, 0, 0
    number = await store.begin_file()
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())  # type: ignore[arg-type]
        async for piece in pieces(request, limits.body_s):
            received += len(piece)
            if received > max_bytes + FORM_BYTES:
                raise _too_large(max_bytes)
            parser.write(piece)
            if size + len(form.content) > max_bytes:
                raise _too_large(max_bytes)
            while len(form.content) >= PART_BYTES:
                await store.add_part(number, part, bytes(form.content[:PART_BYTES]))
                del form.content[:PART_BYTES]
                part, size = part + 1, size + PART_BYTES
        if not form.is_whole:  # the parser does not mind a form that breaks off
            raise OocoError("the upload is not well-formed multipart/form-data: its last boundary is missing")
        if form.filename is None:
            raise OocoError("the form has no part 'file' with a file name")
        if form.content:
            await store.add_part(number, part, bytes(form.content))
            size += len(form.content)
    except FormParserError as error:
        await store.discard_file(number)
        raise OocoError(f"the upload is not well-formed multipart/form-data: {error}") from error
    except BaseException:
        await store.discard_file(number)
        raise
    return number, size, form.filename, form.fields


async def pieces(request: Request, silent_s: float) -> AsyncIterator[bytes]:
    """The body as it comes; raises SilentError where it does not go on for ``silent_s``."""
    stream = request.stream()
    try:
        while True:
            async with asyncio.timeout(silent_s):
                piece = await anext(stream, None)
            if piece is None:
                return
            if piece:
                yield piece
    except TimeoutError:
        raise SilentError(f"the body did not go on within timeouts.body_s ({silent_s:g} s)") from None
    except ClientDisconnect:
        raise SilentError("the client went away before its request was whole") from None


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"the file has more than {max_bytes:,} bytes, the most that is accepted")
