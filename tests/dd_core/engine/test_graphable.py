"""Whole plans can become device graphs, as far as a CPU can tell: no waiting, few operations, one graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.naive import SIZES, SMOKE
from dd_core import plan
from dd_core.condition import ClassCondition
from dd_core.engine.arithmetic import BF16, EXACT32, Arithmetic
from dd_core.engine.prepared import prepare
from dd_core.models.build import new_models, on_meta
from dd_core.plan import Plan
from dd_core.sampling import Sampler, run_plan, student_jump, to_pixels

# Each makes the host wait for the device, or a shape follow from data.
SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item"}


class Recorder(TorchDispatchMode):
    """Counts operations; fails on one that a graph on a device could not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in SYNCHRONISING, f"{name} waits for the device"
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            assert not isinstance(tensor, Tensor) or tensor.device.type == "meta", f"{name} of a host tensor"
        self.count[name] += 1
        found = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            assert not isinstance(tensor, Tensor) or tensor.device.type == "meta", (
                f"{name} made a host tensor"
            )
        return found


def _on_meta(name: str, arithmetic: Arithmetic) -> Sampler:
    size = SIZES[name]
    with on_meta():
        tokenizer, student, teacher = new_models(size.vq, size.student, size.student)
    assert student is not None
    for model in (tokenizer, student, teacher):
        assert isinstance(model, nn.Module)
        model.requires_grad_(False)
    meta = torch.device("meta")
    sampler = Sampler(student.layout, tokenizer, student, teacher, device=meta, exact=False)
    return prepare(replace(sampler, draw=replace(sampler.draw, guidance=2.0)), arithmetic)


FEW = ("one step", "two steps")


def plans(name: str) -> dict[str, tuple[Plan, int]]:
    """Plans of a family, and the calls that each may take besides views: also such as change nothing."""
    blocks, split = SIZES[name].student.layout.num_blocks, SIZES[name].split
    if name == "VAR-DD-d16":
        return {
            "one step": (plan.one_step(blocks, split=split), 900),
            "two steps": (plan.few_steps(blocks, 5, split=split), 1500),
            "hybrid": (plan.hybrid(blocks, 3, 5, split=split), 2600),
            "teacher": (plan.teacher(blocks), 6000),
        }
    return {
        "one step": (plan.one_step(blocks, split=split), 1600),
        "two steps": (plan.few_steps(blocks, 80, split=split), 3000),
        "hybrid": (plan.hybrid(blocks, 80, 84, split=split), 8600),
    }


VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "unbind", "slice", "select", "split", "expand",
    "unsqueeze", "squeeze", "detach", "as_strided", "alias", "reshape", "unsafe_split", "split_with_sizes",
}  # fmt: skip


def stays_on_the_device(name: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a plan at a published size, after a first run that made what is made once."""
    # The meta device knows no autocast, which inference never has on.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    sampler, (chosen, budget) = _on_meta(name, BF16), plans(name)[which]
    width = sampler.codebook_VC.shape[1]
    noise = torch.empty(2, sampler.layout.num_tokens, width, device="meta")
    uniform, labels = noise[..., 0], torch.zeros(2, dtype=torch.long, device="meta")

    def run() -> Tensor:
        codes = run_plan(sampler, chosen, ClassCondition(labels), noise, uniform)
        return to_pixels(sampler.tokenizer.to_image(codes))

    with torch.inference_mode():
        run()
        with Recorder() as seen:
            assert run().shape == (2, 256, 256, 3)
    found = sum(count for op, count in seen.count.items() if op not in VIEWS)
    assert found <= budget, f"{found}: {seen.count.most_common(15)}"
    assert found > budget // 2, f"{found}: tighten the budget"


@pytest.mark.parametrize("which", FEW)
@pytest.mark.parametrize("name", SIZES)
def test_a_whole_plan_stays_on_the_device(name: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At published sizes; plans of many passes are among the slow tests."""
    stays_on_the_device(name, which, monkeypatch)


@pytest.mark.parametrize("arithmetic", [EXACT32, BF16], ids=lambda a: a.name)
@pytest.mark.parametrize("name", SMOKE)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_noise_to_pixels_is_one_graph(name: str, arithmetic: Arithmetic) -> None:
    """`fullgraph` raises at the first break."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    size, graphs = SMOKE[name], []
    tokenizer, student, _ = new_models(size.vq, size.student, None)
    assert student is not None
    for model in (tokenizer, student):
        model.eval().requires_grad_(False)
    sampler = prepare(Sampler(student.layout, tokenizer, student), arithmetic)
    jump = sampler.student
    assert jump is not None
    layout, codebook_VC = sampler.layout, sampler.codebook_VC
    chosen = slice(0, layout.starts[size.split])

    def pixels(x_BLC: Tensor, labels_B: Tensor, step_B: Tensor, split_B: Tensor) -> Tensor:
        codes = student_jump(jump, codebook_VC, x_BLC, ClassCondition(labels_B), step_B, split_B, chosen)
        return to_pixels(sampler.tokenizer.to_image(codes))

    def recording(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    x_BLC = torch.randn(2, layout.num_tokens, codebook_VC.shape[1])
    inputs = x_BLC, torch.tensor([1, 3]), torch.tensor([0, 1]), torch.full((2,), size.split)
    with torch.inference_mode():
        compiled = torch.compile(pixels, fullgraph=True, dynamic=False, backend=recording)
        assert torch.equal(compiled(*inputs), pixels(*inputs))
    assert len(graphs) == 1
