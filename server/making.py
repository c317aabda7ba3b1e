"""From an order to encoded images: submit, wait while the client is there, encode off the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from fastapi import Request

from server.accounts import Account
from server.engine import Engine
from server.errors import MediaTypeError
from server.facts import note
from server.images import Encoder, Pixels
from server.jobs import Job
from server.orders import Order
from server.pictures import File, Form, Made, milliseconds, timings
from server.refine import Picture, Refinement, rungs
from server.state import state_of

CLIENT_LEFT = 499  # the customary status; nobody reads it


def check_json(request: Request) -> None:
    """Whether the body may be JSON.

    Raises:
        MediaTypeError: it is declared to be something else.
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise MediaTypeError("send the body as JSON, with content-type: application/json")


async def make(
    request: Request, account: Account, engine: Engine, encoder: Encoder, order: Order, form: Form
) -> Made | None:
    """The images of an order, or None if the client left first: then nothing more is computed.

    Raises:
        ApiError: refused, dropped or failed.
    """
    job = order.job(order.plan)
    pixels = await _pixels_while_connected(request, engine, job)
    note(request, queue_ms=milliseconds(job.queue_s), compute_ms=milliseconds(job.compute_s))
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


async def _pixels_while_connected(request: Request, engine: Engine, job: Job) -> list[Pixels] | None:
    answer = engine.submit(job)
    left = asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        left.cancel()
        engine.cancel(job)
        answer.cancel()


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def begin_refinement(engine: Engine, order: Order, previews: int | None) -> Refinement:
    """The stream of an order, whose first pass waits already, so what is refused has its status.

    Args:
        previews: most pictures of an image before the last one; None = all.

    Raises:
        QueueFullError, DeadlineUnreachableError, DrainingError: refused.
    """
    refinement = Refinement(engine, order, rungs(order.model.budgets.ladder, order.plan, previews))
    refinement.begin()
    return refinement


async def files_of(
    refinement: Refinement, account: Account, encoder: Encoder, order: Order, form: Form
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
