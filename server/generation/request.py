"""From a validated body to a GenerationRequest: which images, by which plan, of what noise.

    body ─▶ resolve_model ─▶ model, Redeemed ─▶ resolve ─▶ GenerationRequest ─▶ a Job for each step

A body asks for new images (a label or a prompt, and a seed), or names a receipt to repeat, refine or vary.
Settings, catalog and forecasts are arguments: nothing here knows the server's state or a device.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from dd_core.noise import NoiseKey
from dd_core.plan import Plan, Preset
from distilled_decoding.contract import GenerateRequest, Priority
from server.errors import BadRequestError, DeadlineUnreachableError, OtherWeightsError, shortened
from server.generation import planner
from server.generation.receipts import MOST_SPLICES, Receipt, parse_receipt
from server.models.catalog import Catalog, ServedModel
from server.scheduling.backlog import Forecast
from server.scheduling.jobs import Job
from server.settings import Settings

# Seeds that the server draws fit a JavaScript number and are short enough to type.
_DRAWN_SEEDS = 2**32
_PRIORITIES: dict[Priority, int] = {"low": -1, "normal": 0, "high": 1}


@dataclass(frozen=True)
class GenerationRequest:
    """Images that were asked for, and how they are made."""

    model: ServedModel
    condition: int | str  # class index, or prompt
    seed: int  # as the reply reports it
    keys: tuple[NoiseKey, ...]  # the noise of each image
    choice: planner.PlanChoice
    refinement: tuple[planner.RefinementStep, ...]  # steps to run: one, or for a stream one after the other
    priority: int  # of two that wait the higher goes first
    deadline: float | None  # when it must be done, on `time.perf_counter`
    streamed: bool  # each image is wanted as it comes, not all together

    @property
    def plan(self) -> Plan:
        """The plan that is applied."""
        return self.choice.applied.plan

    @property
    def requested_plan(self) -> str:
        """Name of the plan that an idle server would apply."""
        return self.choice.requested.plan.name

    @property
    def logged(self) -> dict[str, Any]:
        """Fields for the record of the request."""
        prompt = self.condition if isinstance(self.condition, str) else ""
        plans = {"plan": self.plan.name, "requested_plan": self.requested_plan}
        return {**plans, "steps": self.plan.cost, "n": len(self.keys), "prompt": prompt}

    def job(self, step: planner.RefinementStep) -> Job:
        """Return the images of one step as a job to submit now."""
        return Job(
            self.model.name,
            step.plan,
            self.condition,
            self.keys,
            time.perf_counter(),
            self.priority,
            self.deadline,
            previews=step.preview is not None,
        )

    def forecast(self, of_job: Callable[[Job], Forecast]) -> Forecast:
        """Predict when all steps would be done, one after the other, the first from now on."""
        times = [of_job(self.job(step)) for step in self.refinement]
        rest = sum(later.alone for later in times[1:])
        return Forecast(times[0].start, times[0].finish + rest, times[0].alone + rest)

    def receipt(self, index: int, plan: Plan) -> str:
        """Return the receipt of image `index` as `plan` makes it."""
        identity = self.model.identities[plan.name]
        return str(Receipt.of(self.model.name, identity, self.condition, plan.name, self.keys[index]))


class Redeemed(NamedTuple):
    """A receipt of a loaded model: its condition, its noise, and the plan that made its image."""

    condition: int | str
    key: NoiseKey
    preset: Preset


def resolve_model(
    body: GenerateRequest, catalog: Catalog, max_images: int, *, streamed: bool
) -> tuple[ServedModel, Redeemed | None]:
    """Find the model that a body is for, and redeem its receipt if it has one.

    Raises:
        BadRequestError: fields that contradict one another, or a text that is no receipt.
        UnknownModelError: no model of that name.
        OtherWeightsError: a receipt of other weights, or of a plan that is not offered.
    """
    check_fields(body, max_images, streamed=streamed)
    if body.receipt is not None:
        return _redeem(parse_receipt(body.receipt), catalog)
    # Of both or neither of label and prompt the model itself says what is wrong.
    by_text = None if (body.label is None) == (body.prompt is None) else body.prompt is not None
    return catalog.find(body.model, by_text), None


def _redeem(receipt: Receipt, catalog: Catalog) -> tuple[ServedModel, Redeemed]:
    model = catalog.models.get(receipt.model)
    if model is None:
        raise OtherWeightsError(
            f"the receipt is of the model {receipt.model[:64]!r}, which is not loaded", param="receipt"
        )
    preset = model.offered.get(receipt.plan)
    if preset is None:
        message = f"model {model.name} offers no plan {shortened(receipt.plan)!r} any more"
        raise OtherWeightsError(message, param="receipt")
    if not receipt.is_of(model.identities[preset.plan.name]):
        raise OtherWeightsError(
            f"the receipt is of other weights or settings than those of {model.name} that are loaded: this "
            "image cannot be made here",
            param="receipt",
        )
    splices = receipt.key.splices
    if splices and not 0 < splices[0].block <= splices[-1].block < model.blocks:
        raise BadRequestError("receipt is damaged: the model has no such block", param="receipt")
    return model, Redeemed(model.condition_again(receipt.condition), receipt.key, preset)


def resolve(
    body: GenerateRequest,
    model: ServedModel,
    redeemed: Redeemed | None,
    settings: Settings,
    forecast: Callable[[Job], Forecast],
    arrived: float,
    *,
    streamed: bool = False,
) -> GenerationRequest:
    """Resolve a validated body into a GenerationRequest.

    Args:
        model, redeemed: from `resolve_model`.
        forecast: when a job would be done, were it submitted now.
        arrived: when the request came, on `time.perf_counter`.
        streamed: the default is then the best plan with a student in it, not the cheapest.

    Raises:
        BadRequestError: fields that contradict the model.
        DeadlineUnreachableError: a stream whose steps would not all be done in time.
    """
    query = _query(body, settings.auto_latency_ms, arrived)
    deadline = None if body.deadline_ms is None else arrived + body.deadline_ms / 1e3
    seed, keys = _keys(body, redeemed, model.blocks)
    condition = model.condition(body.label, body.prompt) if redeemed is None else redeemed.condition

    def by(choice: planner.PlanChoice) -> GenerationRequest:
        plan, max_fid = choice.applied.plan, body.min_quality
        refinement: tuple[planner.RefinementStep, ...] = (planner.RefinementStep(plan),)
        if streamed:
            shown = [preset for preset in model.budgets.ladder if max_fid is None or preset.reaches(max_fid)]
            refinement = planner.refinement_steps(shown, plan, body.partial_images)
        priority = _PRIORITIES[body.priority]
        return GenerationRequest(
            model, condition, seed, keys, choice, refinement, priority, deadline, streamed=streamed
        )

    if body.plan is not None:
        named = model.preset(body.plan)
        choice = planner.PlanChoice(named, named)
    elif redeemed is not None and body.steps is None and body.quality is None and query.latency is None:
        choice = planner.choose_again(redeemed.preset, body.min_quality)
    else:
        default = model.refined if streamed else model.budgets.ladder[0]
        max_wait = settings.brownout_ms / 1e3
        choice = planner.choose(
            model.budgets, query, default, max_wait, lambda p: by(planner.PlanChoice(p, p)).forecast(forecast)
        )
    generation = by(choice)
    if deadline is not None and len(generation.refinement) > 1:  # the scheduler checks each step by itself
        start, finish, _ = generation.forecast(forecast)
        if time.perf_counter() + finish > deadline:
            raise DeadlineUnreachableError.after(
                start,
                f"this stream would start in {1e3 * start:.0f} ms and be done in {1e3 * finish:.0f} ms, "
                "after its deadline_ms",
            )
    return generation


def check_fields(body: GenerateRequest, max_images: int, *, streamed: bool) -> None:
    """Check that the fields go together, on whatever model.

    Raises:
        BadRequestError: they contradict one another, or `n` is above `max_images`.
    """
    if body.label is not None and body.prompt is not None:
        raise BadRequestError("send either label or prompt, not both", param="prompt")
    if body.n > max_images:
        raise BadRequestError(f"n must be from 1 to {max_images}", param="n")
    _check_budget(body)
    if body.partial_images is not None and not streamed:
        raise BadRequestError("partial_images needs accept: text/event-stream", param="partial_images")
    if body.receipt is None:
        if body.keep is not None:
            raise BadRequestError("keep needs the receipt of an image to vary", param="keep")
        return
    for name in ("label", "prompt", "model"):
        if getattr(body, name) is not None:
            raise BadRequestError(f"a receipt names the {name} already: leave it out", param=name)
    if body.keep is None and body.seed is not None:
        raise BadRequestError("a receipt names the seed already; seed goes with keep", param="seed")
    if body.keep is None and body.n > 1:
        raise BadRequestError("a receipt is one image: n must be 1, or send keep to vary it", param="n")


def _check_budget(body: GenerateRequest) -> None:
    """Check that the fields that lead to a plan go together."""
    if body.steps is not None and body.quality is not None:
        raise BadRequestError("send either steps or quality, not both", param="quality")
    if body.quality == "auto" and body.latency_budget_ms is not None:
        raise BadRequestError(
            "quality auto is the server's own latency_budget_ms: send one of the two", param="quality"
        )
    for name in ("steps", "quality", "latency_budget_ms", "min_quality"):
        if body.plan is not None and getattr(body, name) is not None:
            raise BadRequestError(f"send either plan or {name}, not both", param="plan")


def _keys(body: GenerateRequest, redeemed: Redeemed | None, blocks: int) -> tuple[int, tuple[NoiseKey, ...]]:
    """Return the seed that the reply reports, and the noise of new images, or of a receipt's image or its
    variations.
    """
    seed = secrets.randbelow(_DRAWN_SEEDS) if body.seed is None else int(body.seed)
    if redeemed is None:
        return seed, NoiseKey.of_seed(seed, body.n)
    key = redeemed.key
    if body.keep is None:
        return key.newest.seed, (key,)
    block = min(max(1, round(body.keep * blocks)), blocks - 1)
    varied = tuple(key.spliced(block, seed, index) for index in range(body.n))
    if len(varied[0].splices) > MOST_SPLICES:
        raise BadRequestError(
            f"this is a variation of a variation, {MOST_SPLICES} times over: begin anew from a seed",
            param="keep",
        )
    return seed, varied


def _query(body: GenerateRequest, auto_latency_ms: float, arrived: float) -> planner.PlanQuery:
    latency_ms = auto_latency_ms if body.quality == "auto" else body.latency_budget_ms
    spent = time.perf_counter() - arrived

    def left(milliseconds: float | None) -> float | None:
        return None if milliseconds is None else milliseconds / 1e3 - spent

    return planner.PlanQuery(
        body.steps, body.quality, left(latency_ms), left(body.deadline_ms), body.min_quality, body.brownout
    )
