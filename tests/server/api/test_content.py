"""`Accept` and `format`: which bytes go out."""

from __future__ import annotations

import pytest

from server.api.content import ReplyForm, negotiate
from server.errors import NotAcceptableError


@pytest.mark.parametrize(
    ("accept", "image_format", "expected"),
    [
        (None, None, ReplyForm(False, "png")),
        ("", "webp", ReplyForm(False, "webp")),
        ("*/*", None, ReplyForm(False, "png")),
        ("application/json", "jpeg", ReplyForm(False, "jpeg")),
        ("application/json, image/png", None, ReplyForm(False, "png")),
        ("image/png", None, ReplyForm(True, "png")),
        ("IMAGE/JPEG", None, ReplyForm(True, "jpeg")),
        ("image/png, */*", None, ReplyForm(True, "png")),
        ("image/*", None, ReplyForm(True, "png")),
        ("image/*", "webp", ReplyForm(True, "webp")),
        ("image/png;q=0.5, image/webp", None, ReplyForm(True, "webp")),
        ("image/png;q=0.5, application/json", None, ReplyForm(False, "png")),
        ("image/png;q=0, */*;q=0.1", None, ReplyForm(False, "png")),
        ("image/avif, image/webp, */*;q=0.8", None, ReplyForm(True, "webp")),
    ],
)
def test_accept_chooses_json_or_raw_bytes(
    accept: str | None, image_format: str | None, expected: ReplyForm
) -> None:
    assert negotiate(accept, image_format, 1) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("accept", "image_format", "n", "param"),
    [
        ("text/html", None, 1, "accept"),
        ("image/png", None, 2, "n"),
        ("image/jpeg", "png", 1, "format"),
        ("application/json;q=0", None, 1, "accept"),
    ],
)
def test_what_cannot_be_sent_is_refused_not_ignored(
    accept: str, image_format: str | None, n: int, param: str
) -> None:
    with pytest.raises(NotAcceptableError) as caught:
        negotiate(accept, image_format, n)  # type: ignore[arg-type]
    assert caught.value.param == param
    assert caught.value.status == 406
