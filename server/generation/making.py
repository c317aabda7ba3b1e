"""From an order to encoded images: submit, wait while the client is there, encode."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator

from fastapi import Request

from dd_core.errors import DDError
from server.api.responses import event
from server.api.streams import EventStream
from server.devices.pool import DevicePool
from server.devices.submission import Submission
from server.errors import MediaTypeError, error_body, internal_body
from server.generation.encoder import Encoder, Pixels
from server.generation.pictures import File, Form, Made, milliseconds, timings
from server.generation.request import Order
from server.generation.runner import Picture, Refinement
from server.observability.context import bind
from server.observability.record import RequestRecord
from server.state import state_of

log = logging.getLogger("dd_server")


def check_json(request: Request) -> None:
    """Whether the body may be JSON.

    Raises:
        MediaTypeError: it is declared to be something else.
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise MediaTypeError("send the body as JSON, with content-type: application/json")


async def make(
    request: Request, account: RequestRecord, engine: DevicePool, encoder: Encoder, order: Order, form: Form
) -> Made | None:
    """The images of an order, or None if the client left first: then nothing more is computed.

    Raises:
        ApiError: refused, dropped or failed.
    """
    job = order.job(order.rungs[0])
    submission = engine.submit(job)
    account.admitted(order)
    pixels = await _pixels_while_connected(request, submission)
    bind(request, queue_ms=milliseconds(job.queue_s), compute_ms=milliseconds(job.compute_s))
    if pixels is None:
        account.outcome = "canceled"
        return None
    started = time.perf_counter()
    receipts = [order.receipt(index, order.plan) for index in range(len(pixels))]
    data = await encoder.encode_all(pixels, form.image_format, receipts, form.quality)
    encoded = time.perf_counter()
    state_of(request).metrics.encode[form.image_format].observe(encoded - started)
    account.delivered(order.plan.name, len(data))
    account.outcome = "ok"
    files = [
        File(index, picture.shape[1], picture.shape[0], receipt, file)
        for index, (picture, receipt, file) in enumerate(zip(pixels, receipts, data, strict=True))
    ]
    return Made(files, timings(job, encoded - started, encoded - account.arrived))


async def _pixels_while_connected(request: Request, submission: Submission) -> list[Pixels] | None:
    leaving = asyncio.create_task(_client_leaves(request, submission))
    try:
        found = {sampled.index: sampled.pixels async for sampled in submission}
        return [found[index] for index in range(len(found))]
    except asyncio.CancelledError:
        if leaving.done():
            return None
        raise
    finally:
        leaving.cancel()
        submission.cancel()


async def _client_leaves(request: Request, submission: Submission) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    submission.cancel()


def begin_refinement(account: RequestRecord, engine: DevicePool, order: Order) -> Refinement:
    """The stream of an order, whose first pass waits already, so what is refused has its status.

    Raises:
        QueueFullError, DeadlineUnreachableError, DrainingError: refused.
    """
    refinement = Refinement(engine, order)
    refinement.begin()
    account.admitted(order)
    account.lasting = True
    return refinement


def streamed(
    request: Request, account: RequestRecord, refinement: Refinement, chunks: AsyncIterator[bytes]
) -> EventStream:
    """The reply that sends `chunks`, and an `error` event for what goes wrong on the way."""

    def over() -> None:
        refinement.end()
        account.close()

    return EventStream(_told(request.state.request_id, account, chunks), over)


async def _told(
    identity: str, account: RequestRecord, chunks: AsyncIterator[bytes]
) -> AsyncGenerator[bytes, None]:
    try:
        with account.watched():
            async for chunk in chunks:
                yield chunk
            account.outcome = "ok"
    except DDError as error:
        yield event("error", error_body(error))
    except Exception:  # the reply has begun, so the last resort could not answer any more
        log.exception("request %s: its stream failed", identity)
        yield event("error", internal_body())


async def files_of(
    refinement: Refinement, account: RequestRecord, encoder: Encoder, order: Order, form: Form
) -> AsyncIterator[tuple[Picture, File, dict[str, float]]]:
    """Each picture of a stream, encoded, with its milliseconds; counted as it goes."""
    async for picture in refinement.pictures():
        started = time.perf_counter()
        receipt = order.receipt(picture.index, picture.plan)
        [data] = await encoder.encode_all([picture.pixels], form.image_format, [receipt], form.quality)
        encoded = time.perf_counter()
        account.pictured(picture.plan.name, form.image_format, encoded - started)
        height, width = picture.pixels.shape[:2]
        times = timings(picture.job, encoded - started, encoded - account.arrived)
        yield picture, File(picture.index, width, height, receipt, data), times
