"""How replies are written: what belongs together leaves together, in order, and nothing stays behind."""

from __future__ import annotations

import asyncio
from typing import cast

from server.middleware.connection import JoinedWrites


class _Wire:
    """A transport that remembers each segment."""

    def __init__(self) -> None:
        self.segments: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed, "written to a closed transport"
        self.segments.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def _joined() -> tuple[JoinedWrites, _Wire]:
    wire = _Wire()
    return JoinedWrites(cast(asyncio.Transport, wire), asyncio.get_running_loop()), wire


def test_a_head_and_its_body_are_one_segment() -> None:
    async def scenario() -> None:
        joined, wire = _joined()
        joined.write(b"head ")
        joined.write(b"body")
        assert wire.segments == [b"head body"]
        await asyncio.sleep(0)
        assert wire.segments == [b"head body"], "nothing is sent twice"

    asyncio.run(scenario())


def test_what_nothing_follows_leaves_with_the_round() -> None:
    async def scenario() -> None:
        joined, wire = _joined()
        joined.write(b"head")
        assert wire.segments == []
        await asyncio.sleep(0)
        assert wire.segments == [b"head"]
        joined.write(b"event")
        await asyncio.sleep(0)
        assert wire.segments == [b"head", b"event"]

    asyncio.run(scenario())


def test_closing_sends_what_is_held_first() -> None:
    async def scenario() -> None:
        joined, wire = _joined()
        joined.write(b"head")
        joined.close()
        assert wire.segments == [b"head"] and joined.is_closing()
        await asyncio.sleep(0)
        assert wire.segments == [b"head"]

    asyncio.run(scenario())


def test_an_empty_body_holds_nothing_up() -> None:
    async def scenario() -> None:
        joined, wire = _joined()
        joined.write(b"")
        assert wire.segments == []
        joined.write(b"head")
        joined.write(b"")
        assert wire.segments == [b"head"]

    asyncio.run(scenario())
