"""A receipt is everything that an image follows from, as one short word that fits a URL.

    receipt = "dd1." + base64url(JSON of the fields + a checksum)

It is no secret and is not signed: it grants nothing that `POST /generate` does not, and the same
image can be asked for without it. The checksum tells a mistyped receipt from a true one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
from dataclasses import dataclass

import orjson
from pydantic import TypeAdapter, ValidationError

from dd_core.noise import NoiseKey, Splice
from distilled_decoding.contract import MAX_SEED
from server.errors import BadRequestError

_PREFIX = "dd1."
_DIGEST = 16  # hexadecimal digits of the weights' SHA-256: enough to tell models apart
_CHECK = 6
LONGEST = 8192  # characters; a prompt is most of it
MOST_SPLICES = 8  # variations of variations

_Fields = tuple[str, str, int | str, str, int, int, list[tuple[int, int, int]]]
_FIELDS: TypeAdapter[_Fields] = TypeAdapter(_Fields)


@dataclass(frozen=True)
class Receipt:
    """The fields that an image follows from."""

    model: str
    weights: str  # first digits of `Manifest.identity`, of weights, settings and plan
    condition: int | str  # class index, or prompt
    plan: str  # name of the plan that made it
    key: NoiseKey  # its noise

    @classmethod
    def of(cls, model: str, identity: str, condition: int | str, plan: str, key: NoiseKey) -> Receipt:
        """The receipt of an image by a plan with the SHA-256 `identity`."""
        return cls(model, identity[:_DIGEST], condition, plan, key)

    def is_of(self, identity: str) -> bool:
        """True if it is of that identity."""
        return self.weights == identity[:_DIGEST]

    def lines(self, name: str | None = None) -> list[str]:
        """Its fields in words, a line each; `name` is that of its class, if it is known."""
        label = "class" if isinstance(self.condition, int) else "prompt"
        named = f" ({name})" if name else ""
        varied = [f"from block {s.block} on: seed {s.seed}, image {s.index}" for s in self.key.splices]
        return [
            f"model {self.model}, weights {self.weights}",
            f"{label} {self.condition}{named}, plan {self.plan}",
            f"seed {self.key.seed}, image {self.key.index}",
            *varied,
        ]

    def __str__(self) -> str:
        splices = [(s.block, s.seed, s.index) for s in self.key.splices]
        noise = (self.key.seed, self.key.index, splices)
        body = orjson.dumps([self.model, self.weights, self.condition, self.plan, *noise])
        return _PREFIX + base64.urlsafe_b64encode(body + _check(body)).decode("ascii").rstrip("=")


def parse_receipt(text: str) -> Receipt:
    """The receipt that `text` is.

    Raises:
        BadRequestError: it is none, or was damaged on its way; `param` is `receipt`.
    """
    if not text.startswith(_PREFIX) or len(text) > LONGEST:
        raise BadRequestError(
            f"receipt must be one of this server's, which begin with {_PREFIX}", param="receipt"
        )
    word = text.removeprefix(_PREFIX)
    try:
        raw = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
        body, check = raw[:-_CHECK], raw[-_CHECK:]
        if check != _check(body):
            raise ValueError("checksum")
        model, weights, condition, plan, seed, index, splices = _FIELDS.validate_json(body, strict=True)
    except (binascii.Error, ValueError, ValidationError):
        raise BadRequestError(
            "receipt is damaged: part of it is missing or changed", param="receipt"
        ) from None
    key = NoiseKey(seed, index, tuple(Splice(*splice) for splice in splices))
    if not _plausible(key):
        raise BadRequestError("receipt is damaged: its seeds are out of range", param="receipt")
    return Receipt(model, weights, condition, plan, key)


def _check(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECK).digest()


def _plausible(key: NoiseKey) -> bool:
    """False for numbers that no receipt has: anyone who computes a checksum may write what they like."""
    blocks = [splice.block for splice in key.splices]
    numbers = [key.seed, key.index, *blocks, *(n for s in key.splices for n in (s.seed, s.index))]
    return (
        all(0 <= number <= MAX_SEED for number in numbers)
        and all(a < b for a, b in itertools.pairwise(blocks))
        and len(blocks) <= MOST_SPLICES
    )
