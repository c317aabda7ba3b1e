"""The published models: names, files, sizes and figures, against what the paper and the authors say."""

from __future__ import annotations

import pytest
import torch

from dd_core.errors import BundleNotFoundError, InvalidRequestError
from dd_core.hub.convert import manifest_of
from dd_core.hub.registry import find_spec, imagenet_classes, registry
from dd_core.hub.spec import ModelSpec
from dd_core.manifest import Manifest
from dd_core.models.build import new_student, new_teacher, new_tokenizer, on_meta
from dd_core.plan import plan_for_budget
from server.models.budgets import BudgetTable

NAMES = {
    *("var-dd-d16", "var-dd-d20", "var-dd-d24", "llamagen-dd-b", "llamagen-dd-l"),
    *("var-d16", "var-d20", "var-d24", "var-d30", "var-d36"),
    *("llamagen-b-256", "llamagen-b-384", "llamagen-l-256", "llamagen-l-384"),
    *("llamagen-xl-384", "llamagen-xxl-384", "llamagen-3b-384", "llamagen-t2i-256", "llamagen-t2i-512"),
}


def _presets(name: str) -> list:  # type: ignore[type-arg]
    return [entry.preset() for entry in find_spec(name).presets]


def test_every_published_model_has_a_name() -> None:
    assert set(registry()) == NAMES
    assert all(name == spec.name for name, spec in registry().items())


@pytest.mark.parametrize("spec", registry().values(), ids=lambda s: s.name)
def test_a_spec_is_a_manifest_whose_plans_fit(spec: ModelSpec) -> None:
    """A contradiction in the registry must not wait for a download of gigabytes to show."""
    manifest = manifest_of(spec, [])
    assert Manifest.model_validate(manifest.model_dump()) == manifest
    for entry in spec.presets:
        assert entry.preset().plan.num_blocks == manifest.model.layout.num_blocks
        assert entry.published == ("fid" in entry.metrics)
    assert len(spec.classes) == (0 if spec.reads_text else 1000)
    sides = manifest.image_size // manifest.vq.downsampling
    tokens = (
        manifest.model.layout.block_sizes[-1] if spec.family == "var" else manifest.model.layout.num_tokens
    )
    assert tokens == sides**2
    assert ("student" in spec.files) == (spec.student is not None)
    assert ("teacher" in spec.files) == (spec.teacher is not None)


# Elements of parameters, counted on the authors' own modules.
PARAMETERS = {
    "var-dd-d16": (328_165_664, 310_283_520),
    "var-dd-d20": (635_399_088, 600_917_136),
    "var-dd-d24": (1_092_478_560, 1_033_399_360),
    "var-d30": (0, 2_010_020_356),
    "var-d36": (0, 2_353_893_904),
    "llamagen-dd-b": (98_321_672, 110_888_448),
    "llamagen-dd-l": (326_155_272, 342_910_976),
    "llamagen-xl-384": (0, 774_699_520),
    "llamagen-xxl-384": (0, 1_410_972_672),
    "llamagen-3b-384": (0, 3_096_659_200),
    "llamagen-t2i-512": (0, 777_678_080),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_architectures_have_the_published_sizes(name: str) -> None:
    spec = find_spec(name)
    with on_meta():
        tokenizer = new_tokenizer(spec.vq)
        student = None if spec.student is None else new_student(spec.student)
        teacher = None if spec.teacher is None else new_teacher(spec.teacher, tokenizer)
    counts = [0 if m is None else sum(p.numel() for p in m.parameters()) for m in (student, teacher)]
    assert tuple(counts) == PARAMETERS[name]
    expected = 108_948_355 if spec.family == "var" else 71_883_403
    assert sum(p.numel() for p in tokenizer.parameters()) == expected
    assert all(p.device == torch.device("meta") for p in tokenizer.parameters())


@pytest.mark.parametrize(
    ("name", "costs"),
    [
        ("var-dd-d16", {1: 9.94, 2: 7.82, 3: 6.54, 4: 5.47, 6: 5.03, 10: 4.19}),
        ("var-dd-d20", {1: 9.55, 2: 7.33, 10: 3.35}),
        ("var-dd-d24", {1: 8.92, 2: 6.95, 10: 2.51}),
        ("llamagen-dd-b", {1: 15.50, 2: 11.17, 256: 5.42}),
        ("llamagen-dd-l", {1: 11.35, 2: 7.58, 22: 6.76, 42: 6.20, 81: 5.71, 256: 4.11}),
    ],
)
def test_plans_have_the_papers_steps_and_figures(name: str, costs: dict[int, float]) -> None:
    """Tables 1 and 2; and a budget leads to the best plan within it."""
    presets = _presets(name)
    assert {p.plan.cost: p.fid for p in presets} == costs
    table = BudgetTable(presets)
    for budget in range(1, max(costs) + 1):
        best = max(cost for cost in costs if cost <= budget)
        assert table.pick(budget).plan.cost == best == plan_for_budget(presets, budget).plan.cost


@pytest.mark.parametrize(
    ("name", "plan", "segments", "split"),
    [
        ("var-dd-d16", "dd-2", [("student", 0, 5), ("student", 5, 10)], 5),
        ("var-dd-d20", "dd-2", [("student", 0, 4), ("student", 4, 10)], 4),
        ("var-dd-d16", "pre-trained-4-6", [("student", 0, 3), ("teacher", 3, 5), ("student", 5, 10)], 8),
        ("var-dd-d16", "pre-trained-1-6", [("teacher", 0, 5), ("student", 5, 10)], 9),
        ("llamagen-dd-b", "dd-1", [("student", 0, 256)], 80),
        ("llamagen-dd-l", "dd-2", [("student", 0, 80), ("student", 80, 256)], 130),
        (
            "llamagen-dd-l",
            "pre-trained-61-81",
            [("student", 0, 60), ("teacher", 60, 80), ("student", 80, 256)],
            180,
        ),
        ("llamagen-dd-l", "pre-trained-1-81", [("teacher", 0, 80), ("student", 80, 256)], 220),
    ],
)
def test_plans_are_those_of_the_released_scripts(name: str, plan: str, segments: list, split: int) -> None:  # type: ignore[type-arg]
    found = next(p.plan for p in _presets(name) if p.plan.name == plan)
    assert [(s.actor, s.start, s.stop) for s in found.segments] == segments
    assert found.split == split


def test_variants_leave_out_and_change_what_they_say() -> None:
    alone = find_spec("var-dd-d16").without_teacher()
    assert set(alone.files) == {"tokenizer", "student"}
    assert {p.name for p in alone.presets} == {"dd-1", "dd-2"}
    with pytest.raises(InvalidRequestError, match="teacher alone"):
        find_spec("var-d16").without_teacher()
    with pytest.raises(InvalidRequestError, match="no VAR teacher"):
        find_spec("llamagen-dd-l").with_unmasked_prefix()


def test_an_unknown_name_gets_the_near_one_and_all() -> None:
    with pytest.raises(BundleNotFoundError, match=r"did you mean var-dd-d16.*llamagen-3b-384"):
        find_spec("var-dd-16")


def test_class_names_are_those_of_imagenet_in_its_order() -> None:
    names = imagenet_classes()
    assert len(names) == 1000 and len(set(names)) == 999
    assert names[0] == "tench, Tinca tinca"
    assert names[207] == "golden retriever"
    assert names[388].startswith("giant panda, panda")
    assert names[999].startswith("toilet tissue")
    assert [i for i, name in enumerate(names) if name == "crane"] == [134, 517]
