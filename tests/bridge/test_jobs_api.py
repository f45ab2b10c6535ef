"""Every route through the stock `openai` client, and what it refuses."""

from __future__ import annotations

import http.client
import json
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from ooco_gym.bridge.jobs import Limits
from tests.bridge.jobs_server import URL, Served, has_ended, jsonl, line, served

LIMITS = Limits(max_file_bytes=400_000, max_requests=50, max_line_bytes=2_000, max_errors=5)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("jobs") / "jobs.sqlite", LIMITS) as running:
        yield running


def test_a_batch_by_hand(server: Served) -> None:
    batch = server.start(jsonl("one", "bad", "two"), metadata={"who": "me"})
    assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", URL)
    assert batch.metadata == {"who": "me"}
    batch = server.wait(batch.id, has_ended)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
    now = int(server.clock.now)
    assert (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at) == (now,) * 4
    assert batch.expires_at == now + 24 * 3600
    request = f"batch_req_{batch.id.removeprefix('batch_')}"
    assert server.lines(batch.output_file_id) == [
        {
            "id": f"{request}_{number}",
            "custom_id": custom_id,
            "response": {
                "status_code": 200,
                "request_id": f"{request}_{number}",
                "body": {"id": f"{request}_{number}", "choices": [{"text": text}]},
            },
            "error": None,
        }
        for number, custom_id, text in ((1, "id-0", "ONE"), (3, "id-2", "TWO"))
    ]
    [refused] = server.lines(batch.error_file_id)
    assert (refused["custom_id"], refused["response"]["status_code"], refused["error"]) == ("id-1", 400, None)
    assert refused["response"]["body"]["error"]["message"] == "no"
    output = server.client.files.retrieve(batch.output_file_id)
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert output.bytes == len(server.client.files.content(output.id).content)


def test_files(tmp_path: Path) -> None:
    with served(tmp_path / "jobs.sqlite") as server:
        files = server.client.files
        content = bytes(range(256)) * 4000
        first = files.create(file=("näme.jsonl", content), purpose="batch")
        assert (first.object, first.filename, first.bytes, first.purpose) == ("file", "näme.jsonl", 1_024_000, "batch")
        assert first.expires_at is None
        assert files.content(first.id).content == content
        assert files.retrieve(first.id) == first
        ids = [first.id] + [server.upload(b"x") for _ in range(4)]
        assert [file.id for file in files.list(limit=2)] == ids[::-1]  # three pages
        assert [file.id for file in files.list(limit=2, order="asc")] == ids
        assert files.list(limit=2).data[0].id == ids[-1]
        assert [file.id for file in files.list(purpose="batch_output")] == []
        deleted = files.delete(ids[1])
        assert (deleted.id, deleted.deleted) == (ids[1], True)
        assert [file.id for file in files.list()] == [ids[4], ids[3], ids[2], ids[0]]
        for call in (files.retrieve, files.delete, files.content):
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                call(ids[1])
        with pytest.raises(openai.NotFoundError):
            files.list(after=ids[1])
        assert server.upload(b"") != ""


def test_a_file_goes_when_its_lifetime_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ooco_gym.bridge.jobs.runner.PURGE_S", 0.0)
    with served(tmp_path / "jobs.sqlite") as server:
        policy: Any = {"anchor": "created_at", "seconds": 3600}
        file = server.client.files.create(file=("a", b"x"), purpose="batch", expires_after=policy)
        assert file.expires_at == server.clock.now + 3600
        batch = server.finished(jsonl("one"), output_expires_after=policy)
        assert server.client.files.retrieve(batch.output_file_id).expires_at == server.clock.now + 3600
        server.clock.now += 3601
        _until(lambda: [entry.id for entry in server.client.files.list()], [batch.input_file_id])


def test_batches_are_listed_newest_first_page_by_page(tmp_path: Path) -> None:
    with served(tmp_path / "jobs.sqlite") as server:
        file_id = server.upload(jsonl("one"))
        create = server.client.batches.create
        ids = [create(input_file_id=file_id, endpoint=URL, completion_window="24h").id for _ in range(5)]
        assert [batch.id for batch in server.client.batches.list(limit=2)] == ids[::-1]
        page = server.client.batches.list(limit=2, after=ids[2])
        assert [batch.id for batch in page.data] == [ids[1], ids[0]]
        assert not page.has_next_page()
        for batch_id in ids:
            assert server.wait(batch_id, has_ended).status == "completed"


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint", "'/v1/chat/completions' and '/v1/completions' are accepted"),
        ({"completion_window": "1h"}, "completion_window", "'24h' is accepted"),
        ({"metadata": {"a": 1}}, "metadata", "at most 16 strings"),
        ({"metadata": {"a": "\ud800"}}, "metadata", "at most 16 strings"),
        ({"metadata": {"\ud800": "a"}}, "metadata", "at most 16 strings"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata", "at most 16 strings"),
        ({"input_file_id": None}, "input_file_id", "Missing required parameter"),
        ({"input_file_id": "\ud800"}, "input_file_id", "not a string"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after", "3600 to 2592000"),
    ],
)
def test_a_batch_that_cannot_be(server: Served, fields: dict[str, Any], param: str, sentence: str) -> None:
    whole = {"input_file_id": "file-none", "endpoint": URL, "completion_window": "24h", **fields}
    status, answer = _post(server, "/v1/batches", json.dumps(whole).encode(), "application/json")
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param
    assert sentence in answer["error"]["message"]


def test_a_batch_needs_an_input_file(server: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="No such File object: file-none"):
        server.client.batches.create(input_file_id="file-none", endpoint=URL, completion_window="24h")
    output_id = server.finished(jsonl("one")).output_file_id
    with pytest.raises(openai.BadRequestError, match="not for batches"):
        server.client.batches.create(input_file_id=output_id, endpoint=URL, completion_window="24h")
    with pytest.raises(openai.NotFoundError, match="No batch found"):
        server.client.batches.retrieve("batch_none")
    with pytest.raises(openai.NotFoundError, match="No batch found"):
        server.client.batches.cancel("batch_none")
    with pytest.raises(openai.NotFoundError):
        server.client.batches.list(after="batch_none")
    for wrong in (b"{", b"[]", b"\xff", b"[" * 100_000):
        assert _post(server, "/v1/batches", wrong, "application/json")[0] == 400
    assert _post(server, "/v1/batches", b" " * 300_000, "application/json")[0] == 413
    for wrong_query in ("limit=0", "limit=x", "limit=101", "limit=9999999999999999999"):
        assert _request(server, "GET", f"/v1/batches?{wrong_query}")[0] == 400
    assert _request(server, "GET", "/v1/files?order=up")[0] == 400


@pytest.mark.parametrize(
    ("content", "faults"),
    [
        (b"", [("empty_file", None)]),
        (b"\n \r\n\n", [("empty_file", None)]),
        (b"{not json\n", [("invalid_json_line", 1)]),
        (b"\n" + line("a").encode() + b"\n\xff\xfe{}\n[1]\n", [("invalid_json_line", 3), ("invalid_json_line", 4)]),
        (b'{"custom_id": NaN}', [("invalid_json_line", 1)]),
        (b"[" * 1_500, [("invalid_json_line", 1)]),
        (line("same") + "\n" + line("b") + "\n" + line("same"), [("duplicate_custom_id", 3)]),
        (line("a", method="GET"), [("invalid_method", 1)]),
        (line("a", url="/v1/embeddings"), [("invalid_url", 1)]),
        (line("a", url=["/v1/completions"]), [("invalid_url", 1)]),
        (line("a", url="/v1/chat/completions"), [("url_mismatch", 1)]),
        (line("a", body={"stream": True}), [("invalid_body", 1)]),
        (line("a", body=[1]), [("invalid_body", 1)]),
        (line(""), [("invalid_custom_id", 1)]),
        (line("x" * 513), [("invalid_custom_id", 1)]),
        (line("\ud800"), [("invalid_custom_id", 1)]),
        (line("a", **{"custom_id": 3}), [("invalid_custom_id", 1)]),
        (line("a", **{"custom_id": None}), [("missing_required_parameter", 1)]),
        ("{}\n" * 9, [("missing_required_parameter", number) for number in range(1, 6)]),  # max_errors
        (line("a") + "\n" + line("b", "x" * 2_000) + "\n{", [("line_too_long", 2), ("invalid_json_line", 3)]),
        (line("a") + "\n" + line("b", "x" * 390_000) + "\n{", [("line_too_long", 2), ("invalid_json_line", 3)]),
        ("\n".join(line(str(number)) for number in range(60)), [("too_many_tasks", 51)]),
    ],
)
def test_a_malformed_file_fails_its_batch_and_names_the_line(
    server: Served, content: bytes | str, faults: list[tuple[str, int | None]]
) -> None:
    before = len(server.dispatcher.calls)
    batch = server.finished(content.encode() if isinstance(content, str) else content)
    assert batch.status == "failed"
    assert [(error.code, error.line) for error in batch.errors.data] == faults
    assert all(error.message for error in batch.errors.data)
    assert (batch.output_file_id, batch.error_file_id, batch.request_counts.total) == (None, None, 0)
    assert batch.failed_at is not None
    assert len(server.dispatcher.calls) == before


def test_a_byte_order_mark_crlf_and_no_last_line_end_are_fine(server: Served) -> None:
    content = b"\xef\xbb\xbf" + line("a").encode() + b"\r\n\r\n" + line("b", "\ud800").encode()
    batch = server.finished(content)
    assert batch.status == "completed"
    assert [entry["custom_id"] for entry in server.lines(batch.output_file_id)] == ["a", "b"]


def test_cancellation_in_mid_run(tmp_path: Path) -> None:
    with served(tmp_path / "jobs.sqlite", window=4) as server:
        batch = server.start(jsonl("one", "hang", "hang", "bad", "hang", "hang", "never"))
        server.wait(batch.id, lambda now: now.request_counts.completed + now.request_counts.failed == 2)
        assert server.client.batches.cancel(batch.id).status == "cancelling"
        batch = server.wait(batch.id, has_ended)
        assert batch.status == "cancelled"
        assert None not in (batch.cancelling_at, batch.cancelled_at)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 6)
        assert server.dispatcher.cancelled == ["hang"] * 4
        assert "never" not in server.dispatcher.calls
        assert [entry["custom_id"] for entry in server.lines(batch.output_file_id)] == ["id-0"]
        errors = server.lines(batch.error_file_id)
        assert [entry["custom_id"] for entry in errors] == [f"id-{number}" for number in range(1, 7)]
        assert [entry["error"] and entry["error"]["code"] for entry in errors] == [
            *("batch_cancelled", "batch_cancelled", None),
            *("batch_cancelled", "batch_cancelled", "batch_cancelled"),
        ]
        assert server.client.batches.cancel(batch.id).status == "cancelled"
        done = server.finished(jsonl("one"))  # the window is free again
        with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'completed'"):
            server.client.batches.cancel(done.id)


def test_expiry(tmp_path: Path) -> None:
    with served(tmp_path / "jobs.sqlite", window=2) as server:
        batch = server.start(jsonl("one", "hang", "hang", "two"))
        server.wait(batch.id, lambda now: now.request_counts.completed == 1)
        server.clock.now += 24 * 3600 - 1
        time.sleep(0.1)  # several ticks
        assert server.client.batches.retrieve(batch.id).status == "in_progress"
        server.clock.now += 1
        batch = server.wait(batch.id, has_ended)
        assert (batch.status, batch.expired_at) == ("expired", batch.expires_at)
        assert [entry["custom_id"] for entry in server.lines(batch.output_file_id)] == ["id-0"]
        errors = server.lines(batch.error_file_id)
        assert [(entry["custom_id"], entry["error"]["code"]) for entry in errors] == [
            (f"id-{number}", "batch_expired") for number in (1, 2, 3)
        ]
        assert server.dispatcher.cancelled == ["hang", "hang"]


def _form(*parts: tuple[str, str | None, bytes]) -> bytes:
    form = b""
    for name, filename, content in parts:
        of_file = f'; filename="{filename}"' if filename is not None else ""
        form += f'--edge\r\nContent-Disposition: form-data; name="{name}"{of_file}\r\n\r\n'.encode() + content + b"\r\n"
    return form + b"--edge--\r\n"


FORM = "multipart/form-data; boundary=edge"


@pytest.mark.parametrize(
    ("form", "kind", "status", "sentence"),
    [
        (_form(("file", "a", b"x"), ("purpose", None, b"batch")), FORM, 200, ""),  # the file may come first
        (_form(("file", "a", b"x")), FORM, 400, "purpose is ''; 'batch' is accepted"),
        (_form(("purpose", None, b"fine-tune"), ("file", "a", b"x")), FORM, 400, "'batch' is accepted"),
        (_form(("purpose", None, b"batch")), FORM, 400, "no part 'file'"),
        (_form(("file", "a", b"x"), ("file", "b", b"y")), FORM, 400, "more than one part 'file'"),
        (_form(("purpose", None, b"batch" * 20_000), ("file", "a", b"x")), FORM, 413, "only 'file' may be large"),
        (_form(("file", "a", b"x" * 400_001), ("purpose", None, b"batch")), FORM, 413, "more than 400,000 bytes"),
        (_form(("file", "a", b"x" * 4_000_000)), FORM, 413, "more than 400,000 bytes"),
        (b"no form at all", FORM, 400, "not well-formed"),
        (_form(("purpose", None, b"batch"), ("file", "a", b"x"))[:-8], FORM, 400, "last boundary is missing"),
        (_form(("purpose", None, b"batch"), ("file", "a", b"x"))[:-20], FORM, 400, "last boundary is missing"),
        (b"{}", "application/json", 400, "multipart/form-data"),
        (b"{}", "multipart/form-data", 400, "boundary"),
        (
            _form(("purpose", None, b"batch"), ("expires_after[seconds]", None, b"9"), ("file", "a", b"x")),
            *(FORM, 400, "anchor 'created_at'"),
        ),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_forms(server: Served, form: bytes, kind: str, status: int, sentence: str, chunked: bool) -> None:
    before = _counts(server)
    answered, answer = _post(server, "/v1/files", form, kind, chunked)
    assert answered == status
    if status == 200:
        assert server.client.files.content(answer["id"]).content == b"x"
    else:
        assert sentence in answer["error"]["message"]
        assert _counts(server) == before  # nothing stays of what was refused


def test_a_client_that_goes_away_in_its_upload_leaves_nothing(server: Served) -> None:
    before = _counts(server)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\nContent-Length: 390000\r\n\r\n"
        connection.sendall(head.encode() + _form(("file", "a", b"x" * 300_000))[:-20])
        _until(lambda: _counts(server)[0], before[0] + 1)  # begun, and not to be seen
        assert len(list(server.client.files.list())) == _counts(server)[2]
    _until(lambda: _counts(server), before)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with served(tmp_path / "jobs.sqlite") as server:
        database = server.store._database
        kept = server.upload(b"x")

        def most_pages(pages: int) -> int:
            sql = f"PRAGMA max_page_count = {pages}"
            return int(database.write_now(lambda c: c.execute(sql).fetchone()[0]).result())

        before, unbounded = _counts(server), 1_000_000
        most_pages(most_pages(1) + 200)  # SQLite answers 1 with the pages there are
        with pytest.raises(openai.InternalServerError, match="disk is full") as refusal:
            server.upload(b"x" * 5_000_000)
        assert refusal.value.status_code == 507
        assert _counts(server) == before
        most_pages(unbounded)
        assert server.client.files.content(server.upload(b"x" * 5_000_000)).content == b"x" * 5_000_000
        assert server.client.files.content(kept).content == b"x"


def _until(observe: Callable[[], object], wanted: object, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while (seen := observe()) != wanted:
        assert time.monotonic() < end, f"saw {seen}, not {wanted}, for {seconds:g} s"
        time.sleep(0.01)


def _counts(server: Served) -> tuple[int, int, int]:
    connection = sqlite3.connect(server.store._database.path)
    try:
        sql = "SELECT (SELECT count(*) FROM files), (SELECT count(*) FROM file_parts), sum(complete) FROM files"
        files, parts, complete = connection.execute(sql).fetchone()
        return files, parts, complete or 0
    finally:
        connection.close()


def _post(server: Served, path: str, body: bytes, kind: str, chunked: bool = False) -> tuple[int, dict[str, Any]]:
    pieces = iter([body[start : start + 50_000] for start in range(0, len(body), 50_000)])
    return _request(server, "POST", path, pieces if chunked else body, {"Content-Type": kind})


def _request(
    server: Served, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before the whole body was sent: answered, too
            connection.request(method, path, body, headers or {}, encode_chunked=not isinstance(body, bytes))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()
