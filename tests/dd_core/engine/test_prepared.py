"""Prepared models against the reference models they are derived from: folds in float64, bytes in exact32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dd_core import plan
from dd_core.bundle import Bundle, load_bundle
from dd_core.condition import ClassCondition
from dd_core.engine.arithmetic import BF16, EXACT32, Arithmetic
from dd_core.engine.attention import parts
from dd_core.engine.decoder import PreparedScales, PreparedVQ, doubled
from dd_core.engine.layers import Product
from dd_core.engine.prepared import prepare, prepare_part
from dd_core.engine.var import FoldedStudent, FoldedTeacher
from dd_core.layout import TokenLayout, paper_student_mask, student_mask
from dd_core.models.config import MultiScaleConfig, VARConfig, VQConfig
from dd_core.models.multiscale_vq import MultiScaleVQ
from dd_core.models.var import VARStudent, VARTeacher
from dd_core.models.vq import VQTokenizer
from dd_core.noise import NoiseKey, batch_noise
from dd_core.sampling import Sampler, run_plan, sample_images
from tests.conformance.recording import redraw

# Large enough for scales that are computed alone (from 16 positions on).
SIDES = (1, 2, 3, 4, 5, 6)
CFG = VARConfig(2, 32, 2, 32, 8, SIDES, 10)
VQ = MultiScaleConfig(32, 8, 32, (1, 2), 1, SIDES)
T, L = CFG.layout.num_blocks, CFG.layout.num_tokens
EXACT64 = Arithmetic("exact64", torch.float64, torch.float64, folds_narrow=True)
FOLDED32 = Arithmetic("folded32", torch.float32, torch.float32, folds_narrow=True)


def _sampler(cfg: VARConfig, dtype: torch.dtype = torch.float32) -> Sampler:
    """The reference models with weights far from zero, in every place."""
    tokenizer = MultiScaleVQ(VQ)
    models: list[nn.Module] = [tokenizer, VARStudent(cfg), VARTeacher(cfg, tokenizer.next_inputs)]
    for seed, model in enumerate(models):
        redraw(model, seed)
        model.to(dtype).eval().requires_grad_(False)
    _, student, teacher = models
    assert isinstance(student, VARStudent) and isinstance(teacher, VARTeacher)
    return Sampler(cfg.layout, tokenizer, student, teacher)


def _inputs(dtype: torch.dtype, batch: int = 3) -> tuple[Tensor, ClassCondition, Tensor]:
    noise, _ = batch_noise(NoiseKey.of_seed(1, batch), CFG.layout, 8)
    return noise.to(dtype), ClassCondition(torch.tensor([1, 10, 4])[:batch]), torch.tensor([0, 4, 2])[:batch]


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal to twelve digits of the largest number."""
    return bool((found - expected).abs().max() < 1e-12 * expected.abs().max())


CONFIGS = {
    "released": CFG,
    "paper": replace(CFG, student_mask="paper"),
    "checkpoint": replace(CFG, student_mask="checkpoint"),
    "shared": replace(CFG, shared_adaln=True),
    "scaled": replace(CFG, unit_length=False),
    "many classes": replace(CFG, num_classes=40),
    "a few classes more": replace(CFG, num_classes=15),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_folded_student_is_the_student(name: str) -> None:
    student = _sampler(CONFIGS[name], torch.float64).student
    assert isinstance(student, VARStudent)
    folded = FoldedStudent(student, EXACT64)
    assert len(folded.attention.parts) == (0 if name == "checkpoint" else 2)
    x, cond, step = _inputs(torch.float64)
    embeddings, logits = student.predict(x, cond, step)
    found, chosen = folded.predict(x, cond, step, slice(5, 37))
    assert _close(found, embeddings)
    assert _close(chosen, logits[:, 5:37])


@pytest.mark.parametrize("name", ["released", "shared", "many classes"])
@pytest.mark.parametrize("prefix_mask", [True, False])
@torch.no_grad()
def test_a_folded_teacher_is_the_teacher(name: str, prefix_mask: bool) -> None:
    """Scale by scale, and after a prefill of several."""
    sampler = prepare(_sampler(replace(CONFIGS[name], prefix_mask=prefix_mask), torch.float64), EXACT64)
    reference = _sampler(replace(CONFIGS[name], prefix_mask=prefix_mask), torch.float64).teacher
    folded = sampler.teacher
    assert isinstance(folded, FoldedTeacher) and reference is not None
    tokens, cond = torch.randint(32, (2, L)), ClassCondition(torch.tensor([3, 10]))
    for steps in (range(T), (3, 4, 5)):
        caches = folded.new_cache(2), reference.new_cache(2)
        for step in steps:
            found = folded.block_logits(tokens, cond, step, caches[0])
            assert _close(found, reference.block_logits(tokens, cond, step, caches[1]))


@torch.no_grad()
def test_a_doubling_convolution_is_the_pair() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1).double()
    x = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    pair = conv(nn.functional.interpolate(x, scale_factor=2.0))
    assert _close(doubled(conv)(x), pair)


@pytest.mark.parametrize("cfg", [VQ, VQConfig(64, 4, 32, 32, (1, 2, 2), 1)], ids=["var", "llamagen"])
@torch.no_grad()
def test_a_folded_decoder_is_the_decoder(cfg: MultiScaleConfig | VQConfig) -> None:
    double = torch.float64
    if isinstance(cfg, VQConfig):
        reference: VQTokenizer | MultiScaleVQ = VQTokenizer(cfg)
        prepared: PreparedVQ | PreparedScales = PreparedVQ(VQTokenizer(cfg), EXACT64)
        codes = torch.randn(2, 16, cfg.code_dim, dtype=double)
    else:
        reference = MultiScaleVQ(cfg)
        codes = torch.randn(2, L, cfg.code_dim, dtype=double)
    redraw(reference, 0)
    reference.to(double).eval()
    if isinstance(reference, VQTokenizer):
        prepared = PreparedVQ(reference, EXACT64)
    else:
        prepared = PreparedScales(reference, EXACT64)
    assert any(isinstance(part, nn.ConvTranspose2d) for part in prepared.modules())
    assert not any(name.startswith("encoder") for name, _ in prepared.named_modules())
    assert _close(prepared.to_image(codes), reference.to_image(codes))


@pytest.mark.parametrize("name", ["dd-1", "dd-2", "pre-trained-11-21", "pre-trained-1-21", "onestep"])
def test_exact32_keeps_the_bytes_of_narrow_models(bundle: Bundle, name: str) -> None:
    """Those of the reference models, alone and by threes: the built-in models are narrow."""
    [chosen] = [p.plan for p in bundle.presets if p.plan.name == name]
    prepared = prepare(bundle.sampler, EXACT32)
    for keys in ([(3, 0)], [(3, 0), (4, 1), (5, 2)]):
        labels = [2, 7, 4][: len(keys)]
        assert torch.equal(
            sample_images(prepared, chosen, labels, keys), sample_images(bundle.sampler, chosen, labels, keys)
        )


@pytest.mark.parametrize("name", ["cifar10", "pictograms"])
def test_exact32_keeps_the_bytes_of_the_built_in_models(name: str) -> None:
    bundle = load_bundle(name, torch.device("cpu"))
    sampler = bundle.sampler
    cond = [4, 1] if bundle.text is None else bundle.text.encode(["a red apple", "a house"])
    jumps = [p.plan for p in bundle.presets if p.plan.needs == {"student"}]
    assert [p.cost for p in jumps] == [1, 2]
    for chosen in jumps:
        found = sample_images(prepare(sampler, EXACT32), chosen, cond, [(7, 0), (8, 1)])
        assert torch.equal(found, sample_images(sampler, chosen, cond, [(7, 0), (8, 1)]))


@pytest.mark.parametrize("arithmetic", [EXACT32, FOLDED32, BF16], ids=lambda a: a.name)
@pytest.mark.parametrize("family", ["var", "llamagen"])
def test_alone_equals_in_a_batch(family: str, arithmetic: Arithmetic, bundle: Bundle) -> None:
    """Every kind of segment, in every arithmetic: what `determinism: exact` promises."""
    if family == "var":
        sampler = _sampler(CFG)
        plans = [
            plan.one_step(T, split=2),
            plan.few_steps(T, 2, split=3),
            plan.hybrid(T, 1, 3),
            plan.teacher(T),
        ]
    else:
        sampler, plans = bundle.sampler, [p.plan for p in bundle.presets if p.plan.cost <= 12]
    sampler = prepare(sampler, arithmetic)
    for chosen in plans:
        together = sample_images(sampler, chosen, [3, 5, 9, 0, 3, 1, 2], [(11, i) for i in range(7)])
        for i, label in ((0, 3), (2, 9)):
            alone = sample_images(sampler, chosen, [label], [(11, i)])
            assert torch.equal(alone[0], together[i]), chosen.name


def test_bfloat16_is_kept_where_it_says(bundle: Bundle) -> None:
    """Products and cache in bfloat16; both heads, the codes and what a student returns in float32."""
    for sampler in (prepare(_sampler(CFG), BF16), prepare(bundle.sampler, BF16)):
        assert sampler.student is not None and sampler.teacher is not None
        assert isinstance(sampler.student, nn.Module)
        products = [m for m in sampler.student.modules() if isinstance(m, Product)]
        assert {p.weight.dtype for p in products} == {torch.bfloat16}
        assert sampler.teacher.new_cache(1).keys.dtype == torch.bfloat16
        noise, uniform = batch_noise([(0, 0)], sampler.layout, sampler.codebook_VC.shape[1])
        step = torch.zeros(1, dtype=torch.long)
        found = sampler.student.predict(noise, ClassCondition(torch.tensor([1])), step)
        assert {t.dtype for t in found} == {torch.float32}
        codes = run_plan(
            sampler,
            plan.teacher(sampler.layout.num_blocks),
            ClassCondition(torch.tensor([1])),
            noise,
            uniform,
        )
        assert codes.dtype == torch.float32


def test_preparing_leaves_the_reference_as_it_is() -> None:
    sampler = _sampler(CFG)
    assert isinstance(sampler.student, VARStudent) and isinstance(sampler.tokenizer, MultiScaleVQ)
    before = {k: v.clone() for k, v in sampler.student.state_dict().items()}
    upsample = sampler.tokenizer.decoder.conv_blocks[0].upsample
    prepared = prepare(sampler, BF16)
    after = sampler.student.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) and after[k].dtype == before[k].dtype for k in before)
    assert sampler.tokenizer.decoder.conv_blocks[0].upsample is upsample
    assert prepare(prepared, BF16).student is prepared.student, "what is prepared stays as it is"


def test_parts_are_what_the_mask_lets_see() -> None:
    layout = TokenLayout(tuple(p * p for p in SIDES))
    for kind, mask in (("released", student_mask(layout)), ("paper", paper_student_mask(layout))):
        seen = mask.clone()
        for part in parts(layout, kind):
            rows = torch.zeros(part.stop - part.first, len(mask), dtype=torch.bool)
            rows[:, : part.keys] = True
            if part.itself:
                rows[torch.arange(len(rows)), torch.arange(part.first, part.stop)] = True
            seen[part.first : part.stop] = rows
        assert torch.equal(seen, mask)
        assert parts(layout, kind)[0].first == 1 + 1 + 4 + 9 + 16


@pytest.mark.parametrize("arithmetic", [EXACT32, BF16], ids=lambda a: a.name)
@pytest.mark.parametrize("name", ["released", "shared", "many classes"])
@torch.no_grad()
def test_a_spent_model_gives_back_what_was_folded(name: str, arithmetic: Arithmetic) -> None:
    """Both were whole at the same time, which was the peak of a load; the result is the same."""
    cfg = replace(CONFIGS[name], num_classes=4) if name == "released" else CONFIGS[name]
    whole, spent = _sampler(cfg), _sampler(cfg)
    expected = prepare(whole, arithmetic)
    found = prepare_part(spent, "tokenizer", arithmetic)
    for part in ("student", "teacher"):
        found = prepare_part(found, part, arithmetic, spent=True)
    noise, cond, step = _inputs(torch.float32)
    cond = ClassCondition(cond.labels_B % (cfg.num_classes + 1))
    assert found.student is not None and expected.student is not None
    for a, b in zip(
        found.student.predict(noise, cond, step), expected.student.predict(noise, cond, step), strict=True
    ):
        assert torch.equal(a, b)
    assert isinstance(spent.student, VARStudent)
    freed = [p for layer in spent.student.layerwise_n_d_embed for p in layer.parameters()]
    tables = [b.ada_lin for b in spent.student.blocks if isinstance(b.ada_lin, nn.Module)]
    if isinstance(found.student, FoldedStudent) and found.student.vectors.tables:
        freed += [p for layer in tables for p in layer.parameters()]
    assert all(p.numel() == 0 for p in freed) and len(freed) >= 6
    assert all(p.numel() > 0 for p in spent.student.head.parameters()), "what is shared stays"
