"""The bytes of a request's body as UTF-8, from the coding and the charset that they came in.

`Content-Encoding: gzip` is decoded, up to the limit of a body and no further. JSON in UTF-16 or UTF-32, with
or without a byte order mark, is understood as it is detected. Anything else that is declared is refused.
"""

from __future__ import annotations

import json
import re
import zlib

from starlette.datastructures import Headers

from server.errors import (
    BadRequestError,
    BodyTooLargeError,
    ContentEncodingError,
    InvalidJSONError,
    MediaTypeError,
    shortened,
)

_JSON = "application/json"
_CHARSETS = {"utf8", "utf16", "utf16le", "utf16be", "utf32", "utf32le", "utf32be", "usascii", "ascii"}
_CHARSET = re.compile(r';\s*charset="?([^";\s]*)', re.IGNORECASE)
_GZIP = 16 + zlib.MAX_WBITS  # the format with gzip's head and checksum


def decoded(headers: Headers, body: bytes, limit: int) -> bytes:
    """Return a body of JSON as UTF-8.

    Args:
        limit: most bytes of the body when it is no longer compressed.

    Raises:
        MediaTypeError: it is declared to be no JSON, or in a charset that JSON does not come in.
        ContentEncodingError: it is compressed in another way than by gzip.
        BodyTooLargeError: it is longer than `limit`.
        BadRequestError: it is declared to be gzip and is not, or is damaged.
        InvalidJSONError: its characters are damaged.
    """
    _check_type(headers.get("content-type", _JSON))
    codings = ",".join(headers.getlist("content-encoding")).lower().split(",")
    applied = [coding.strip() for coding in codings if coding.strip() not in ("", "identity")]
    if applied in (["gzip"], ["x-gzip"]):
        body = _unzipped(body, limit)
    elif applied:
        named = shortened(", ".join(applied))
        raise ContentEncodingError(f"content-encoding {named!r} is not read here: send gzip, or none")
    encoding = json.detect_encoding(body)
    if encoding == "utf-8":
        return body
    try:
        return body.decode(encoding).encode()
    except UnicodeError:
        name = encoding.removesuffix("-sig").upper()
        raise InvalidJSONError(f"the body is not valid JSON (it is not {name} throughout)") from None


def _check_type(content_type: str) -> None:
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != _JSON and not media_type.endswith("+json"):
        raise MediaTypeError(f"send the body as JSON, with content-type: {_JSON}")
    charset = _CHARSET.search(content_type)
    if charset and charset[1].lower().replace("-", "").replace("_", "") not in _CHARSETS:
        raise MediaTypeError(f"charset {shortened(charset[1])!r} is not read here: send the body as UTF-8")


def _unzipped(body: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj(_GZIP)
    try:
        text = stream.decompress(body, limit + 1)
    except zlib.error:
        text = b""
    if len(text) > limit:
        raise BodyTooLargeError(limit)
    if not stream.eof or stream.unused_data:
        raise BadRequestError(
            "content-encoding says gzip, and the body is not, or only a part of it", param="content-encoding"
        )
    return text
