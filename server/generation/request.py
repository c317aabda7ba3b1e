"""From a request's body to an order: which images, by which plan, of what noise.

body ─▶ new images (label, seed) │ a receipt to repeat, refine or vary ─▶ plan ─▶ Order ─▶ Job
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dd_core.noise import NoiseKey
from dd_core.plan import Plan, Preset
from distilled_decoding.contract import GenerateRequest, Priority
from server.devices.pool import Engine
from server.errors import BadRequestError, OtherWeightsError
from server.generation.planner import PlanChoice, PlanQuery, choose
from server.generation.receipts import MOST_SPLICES, Receipt, parse_receipt
from server.generation.rungs import RefinementStep, refinement_steps
from server.models.catalog import ServedModel
from server.scheduling.backlog import Forecast
from server.scheduling.jobs import Job
from server.settings import Settings
from server.state import ServerState

# Seeds that the server draws fit a JavaScript number and are short enough to type.
_DRAWN_SEEDS = 2**32
_PRIORITIES: dict[Priority, int] = {"low": -1, "normal": 0, "high": 1}


@dataclass(frozen=True)
class Order:
    """Images that were asked for.

    Args:
        condition: class index, or prompt.
        seed: as the reply reports it.
        keys: the noise of each image.
        rungs: the plans to run: one, or in a stream one after the other.
        deadline: when it must be done, on `time.perf_counter`, or None.
    """

    model: ServedModel
    condition: int | str
    seed: int
    keys: tuple[NoiseKey, ...]
    choice: PlanChoice
    rungs: tuple[RefinementStep, ...]
    priority: int
    deadline: float | None

    @property
    def plan(self) -> Plan:
        """The plan that is applied."""
        return self.choice.applied.plan

    def job(self, rung: RefinementStep) -> Job:
        """The images by a rung's plan, to submit now."""
        return Job(
            self.model.name,
            rung.plan,
            self.condition,
            self.keys,
            time.perf_counter(),
            self.priority,
            self.deadline,
            previews=rung.preview is not None,
        )

    def forecast(self, engine: Engine, steps: Sequence[RefinementStep]) -> Forecast:
        """When the images would be done by plans that run one after the other, the first from now on."""
        times = [engine.forecast(self.job(rung)) for rung in steps]
        rest = sum(found.alone for found in times[1:])
        return Forecast(times[0].start, times[0].finish + rest, times[0].alone + rest)

    def receipt(self, index: int, plan: Plan) -> str:
        """What image `index` of the order, made by `plan`, follows from."""
        identity = self.model.identities[plan.name]
        return str(Receipt.of(self.model.name, identity, self.condition, plan.name, self.keys[index]))


def addressed(
    body: GenerateRequest, state: ServerState, *, stream: bool
) -> tuple[ServedModel, Receipt | None]:
    """The model that a body is for, and its receipt if it has one.

    Raises:
        BadRequestError: fields that contradict one another, or no receipt.
        UnknownModelError: no model of that name.
        OtherWeightsError: a receipt of other weights.
    """
    check_fields(body, state.settings.max_images, stream=stream)
    if body.receipt is not None:
        return _redeem(body.receipt, state)
    return state.models().find(body.model, asks_by_text(body)), None


def place(
    body: GenerateRequest,
    model: ServedModel,
    receipt: Receipt | None,
    settings: Settings,
    engine: Engine,
    arrived: float,
    *,
    stream: bool = False,
) -> Order:
    """The order that a body is.

    Args:
        model, receipt: from `addressed`.
        arrived: when the request came, on `time.perf_counter`.
        stream: the default is then the best plan with a student in it, not the cheapest.

    Raises:
        BadRequestError: fields that contradict the model.
        OtherWeightsError: a receipt of a plan that is not offered.
    """
    priority = _PRIORITIES[body.priority]
    deadline = None if body.deadline_ms is None else arrived + body.deadline_ms / 1e3
    if receipt is None:
        condition, made_by = model.condition(body.label, body.prompt), None
        seed = _seed(body)
        keys = NoiseKey.of_seed(seed, body.n)
    else:
        condition, made_by = model.condition_again(receipt.condition), model.preset(receipt.plan)
        seed, keys = receipt.key.newest.seed, (receipt.key,)
        if body.keep is not None:
            seed = _seed(body)
            keys = _variations(receipt.key, body.keep, seed, body.n, model.blocks)

    def steps_to(plan: Plan) -> tuple[RefinementStep, ...]:
        if not stream:
            return (RefinementStep(plan),)
        worst = body.min_quality
        shown = [p for p in model.budgets.ladder if worst is None or p.reaches(worst)]
        return refinement_steps(shown, plan, body.partial_images)

    def order(choice: PlanChoice) -> Order:
        steps = steps_to(choice.applied.plan)
        return Order(model, condition, seed, keys, choice, steps, priority, deadline)

    if made_by is not None and body.steps is None and body.quality is None and body.latency_budget_ms is None:
        if body.min_quality is not None and not made_by.reaches(body.min_quality):
            raise BadRequestError(
                f"the receipt's plan {made_by.plan.name} does not reach the FID that min_quality asks for: "
                "leave it out, or send steps",
                param="min_quality",
            )
        return order(PlanChoice(made_by, made_by))

    def forecast(preset: Preset) -> Forecast:
        found = order(PlanChoice(preset, preset))
        return found.forecast(engine, found.rungs)

    default = model.refined if stream else model.budgets.ladder[0]
    wish = _wish(body, settings.auto_latency_ms, arrived)
    return order(choose(model.budgets, wish, default, settings.brownout_ms / 1e3, forecast))


def asks_by_text(body: GenerateRequest) -> bool | None:
    """Whether a body is for a model of texts or of classes, or does not say."""
    if (body.label is None) == (body.prompt is None):
        return None
    return body.prompt is not None


def check_fields(body: GenerateRequest, most: int, *, stream: bool) -> None:
    """Whether the fields go together, on whatever model.

    Raises:
        BadRequestError: they contradict one another, or `n` is above `most`.
    """
    if body.label is not None and body.prompt is not None:
        raise BadRequestError("send either label or prompt, not both", param="prompt")
    if body.n > most:
        raise BadRequestError(f"n must be from 1 to {most}", param="n")
    if body.steps is not None and body.quality is not None:
        raise BadRequestError("send either steps or quality, not both", param="quality")
    if body.quality == "auto" and body.latency_budget_ms is not None:
        raise BadRequestError(
            "quality auto is the server's own latency_budget_ms: send one of the two", param="quality"
        )
    if body.partial_images is not None and not stream:
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


def _wish(body: GenerateRequest, auto_latency_ms: float, arrived: float) -> PlanQuery:
    latency_ms = auto_latency_ms if body.quality == "auto" else body.latency_budget_ms
    spent = time.perf_counter() - arrived

    def left(milliseconds: float | None) -> float | None:
        return None if milliseconds is None else milliseconds / 1e3 - spent

    return PlanQuery(
        body.steps, body.quality, left(latency_ms), left(body.deadline_ms), body.min_quality, body.brownout
    )


def _seed(body: GenerateRequest) -> int:
    return secrets.randbelow(_DRAWN_SEEDS) if body.seed is None else body.seed


def _redeem(text: str, state: ServerState) -> tuple[ServedModel, Receipt]:
    receipt = parse_receipt(text)
    model = state.models().models.get(receipt.model)
    if model is None:
        raise OtherWeightsError(
            f"the receipt is of the model {receipt.model[:64]!r}, which is not loaded", param="receipt"
        )
    made_by = model.preset(receipt.plan).plan.name
    if not receipt.is_of(model.identities[made_by]):
        raise OtherWeightsError(
            f"the receipt is of other weights or settings than those of {model.name} that are loaded: this "
            "image cannot be made here",
            param="receipt",
        )
    splices = receipt.key.splices
    if splices and not 0 < splices[0].block <= splices[-1].block < model.blocks:
        raise BadRequestError("receipt is damaged: the model has no such block", param="receipt")
    return model, receipt


def _variations(key: NoiseKey, keep: float, seed: int, count: int, blocks: int) -> tuple[NoiseKey, ...]:
    block = min(max(1, round(keep * blocks)), blocks - 1)
    varied = tuple(key.spliced(block, seed, index) for index in range(count))
    if len(varied[0].splices) > MOST_SPLICES:
        raise BadRequestError(
            f"this is a variation of a variation, {MOST_SPLICES} times over: begin anew from a seed",
            param="keep",
        )
    return varied
