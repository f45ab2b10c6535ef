"""Rows of the store as the objects of the OpenAI API, and what the store says when it cannot do something."""

from __future__ import annotations

import json
import secrets
import sqlite3
from dataclasses import dataclass
from typing import Any

from ooco_gym.errors import OocoError

PART_BYTES = 256 * 1024  # of a file's content per row
STAMPS = (
    "created_at",
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)
ENDED = ("failed", "completed", "expired", "cancelled")


class UnknownError(OocoError):
    """There is no object of that id."""


class ConflictError(OocoError):
    """The object is in a state that does not allow this."""


@dataclass(frozen=True)
class Request:
    """One line of a batch, claimed for the dispatcher; ``request_id`` stays the same however often it is tried."""

    batch: int
    line: int
    custom_id: str
    request_id: str
    endpoint: str
    body: str


@dataclass(frozen=True)
class Waiting:
    """A batch whose input file is to be validated."""

    number: int
    id: str
    endpoint: str
    input_file_id: str


@dataclass(frozen=True)
class Work:
    """What there is to do: batches to end, batches to validate, requests claimed, and how many are still pending."""

    ending: list[int]
    validating: list[Waiting]
    claimed: list[Request]
    pending: int


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def request_id(batch_id: str, line: int) -> str:
    return f"batch_req_{batch_id.removeprefix('batch_')}_{line}"


def file_object(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "expires_at": row["expires_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
        "status_details": None,
    }


def batch_object(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "errors": {"object": "list", "data": json.loads(row["errors"])} if row["errors"] else None,
        "input_file_id": row["input_file_id"],
        "completion_window": row["completion_window"],
        "status": row["status"],
        "output_file_id": row["output_file_id"],
        "error_file_id": row["error_file_id"],
        **{stamp: row[stamp] for stamp in STAMPS},
        "request_counts": {"total": row["total"], "completed": row["completed"], "failed": row["failed"]},
        "metadata": json.loads(row["metadata"]) if row["metadata"] else None,
    }


def response_line(request: Request, status_code: int, body: dict[str, Any]) -> str:
    """The output line of a request that was answered, whatever the status; raises ValueError for what is not JSON."""
    response = {"status_code": status_code, "request_id": request.request_id, "body": body}
    line = {"id": request.request_id, "custom_id": request.custom_id, "response": response, "error": None}
    return json.dumps(line, allow_nan=False)


def error_line(line_id: str, custom_id: str, code: str, message: str) -> str:
    """The error line of a request that was not answered."""
    return json.dumps(
        {"id": line_id, "custom_id": custom_id, "response": None, "error": {"code": code, "message": message}}
    )
