"""HEAD, wherever there is GET: the same status and headers, and no body."""

from __future__ import annotations

import pytest

from tests.server.helpers import Running

CHANGING = {"date", "x-request-id", "content-length"}


def counted(live: Running) -> float:
    return live.metric("dd_batch_size_count")


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/docs", "/healthz", "/readyz", "/metrics", "/models", "/v1/models", "/v1/models/tiny"),
        *("/nothing", "/openapi.json", "/favicon.ico", "/static/app.js", "/v1/models/none"),
        "/images/dd1.none",
    ],
)
def test_head_is_get_without_its_body(server: Running, path: str) -> None:
    got, head = server.client.get(path), server.client.head(path)
    assert head.status_code == got.status_code and head.content == b""
    assert {k: v for k, v in head.headers.items() if k not in CHANGING} == {
        k: v for k, v in got.headers.items() if k not in CHANGING
    }


def test_head_of_an_image_computes_nothing(server: Running) -> None:
    receipt = server.post({"label": "ship", "seed": 7}).json()["images"][0]["receipt"]
    got, before = server.client.get(f"/images/{receipt}"), counted(server)
    head = server.client.head(f"/images/{receipt}")
    assert (head.status_code, head.content) == (200, b"") and counted(server) == before
    times = {f"x-dd-{part}-ms" for part in ("queue", "compute", "encode", "total")}
    ignored = CHANGING | times | {"x-dd-id"}
    assert got.headers.keys() - head.headers.keys() == {"content-length", *times}
    assert {k: v for k, v in head.headers.items() if k not in ignored} == {
        k: v for k, v in got.headers.items() if k not in ignored
    }
    assert head.headers["content-disposition"] == 'inline; filename="ship-7-0.png"'
    unchanged = server.client.head(f"/images/{receipt}", headers={"if-none-match": got.headers["etag"]})
    assert unchanged.status_code == 304


def test_head_of_what_has_no_get(server: Running) -> None:
    assert server.client.head("/generate").status_code == 405
