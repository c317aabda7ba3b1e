"""The VAR family: next-scale order, its masks and caches, and images that do not depend on a batch."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dd_core import plan
from dd_core.bundle import Bundle, load_bundle, save_bundle
from dd_core.codebook import lookup, nearest
from dd_core.condition import ClassCondition, TextCondition, as_condition
from dd_core.errors import InvalidRequestError, WeightsError
from dd_core.layout import paper_student_mask, student_mask
from dd_core.logits import LogitSettings, guide
from dd_core.models.build import new_teacher
from dd_core.models.config import MultiScaleConfig, VARConfig, VQConfig
from dd_core.models.multiscale_vq import MultiScaleVQ, phi_index
from dd_core.models.var import VARStudent, VARTeacher
from dd_core.models.vq import VQTokenizer
from dd_core.noise import NoiseKey, batch_noise
from dd_core.sampling import Sampler, renoise, run_plan, sample_images, student_jump
from tests.tiny_var import SIDES, VAR, VQ, L, T, tiny_var_bundle, tiny_var_manifest, tiny_var_models

Models = tuple[MultiScaleVQ, VARStudent, VARTeacher]
STARTS = VAR.layout.starts


@pytest.fixture(scope="module")
def models() -> Models:
    return tiny_var_models()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(tiny_var_bundle(tmp_path_factory.mktemp("var")), torch.device("cpu"))


def _block(x_BL: Tensor, k: int) -> Tensor:
    return x_BL[:, STARTS[k] : STARTS[k + 1]]


def _sampler(models: Models, **settings: object) -> Sampler:
    tokenizer, student, teacher = models
    return replace(Sampler(VAR.layout, tokenizer, student, teacher), **settings)  # type: ignore[arg-type]


def _given(batch: int) -> tuple[ClassCondition, Tensor, Tensor]:
    noise, uniform = batch_noise(NoiseKey.of_seed(5, batch), VAR.layout, VAR.code_dim)
    return ClassCondition(torch.arange(batch) % 10), noise, uniform


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-4)


def test_prefilled_cache_equals_stepwise_decoding_equals_teacher_forcing(models: Models) -> None:
    """A pass over several scales at once needs the block-causal mask, also when the cache holds some."""
    teacher, tokens, cond = models[2], torch.randint(32, (3, L)), ClassCondition(torch.tensor([1, 5, 10]))
    forced = teacher(tokens, cond)
    stepwise = teacher.new_cache(3)
    for k in range(T):
        assert _close(teacher.block_logits(tokens, cond, k, stepwise), _block(forced, k))
    assert stepwise.length == L
    prefilled = teacher.new_cache(3)
    assert _close(teacher.block_logits(tokens, cond, 2, prefilled), _block(forced, 2))
    assert torch.allclose(prefilled.keys[..., :14, :], stepwise.keys[..., :14, :], atol=2e-4)
    jumped = teacher.new_cache(3)
    teacher.block_logits(tokens, cond, 0, jumped)
    assert _close(teacher.block_logits(tokens, cond, 3, jumped), _block(forced, 3))
    assert torch.allclose(jumped.values, stepwise.values, atol=2e-4)


def test_a_teachers_scale_sees_the_scales_before_it_alone(models: Models) -> None:
    """Logits of scale k depend on tokens of scales < k; the last scale's tokens are never read."""
    teacher, tokens, cond = models[2], torch.randint(32, (2, L)), ClassCondition(torch.tensor([1, 5]))
    before = teacher(tokens, cond)
    for k in range(T):
        changed = tokens.clone()
        _block(changed, k).add_(7).remainder_(32)
        after = teacher(changed, cond)
        assert torch.allclose(before[:, : STARTS[k + 1]], after[:, : STARTS[k + 1]], atol=1e-5)
        assert k == T - 1 or not _close(_block(before, k + 1), _block(after, k + 1))


def test_a_prefix_without_a_mask_is_another_conditional(models: Models) -> None:
    """The released hybrid reads its prefix unmasked: only a pass over several scales shows it."""
    tokenizer, _, masked = models
    released = VARTeacher(replace(VAR, prefix_mask=False), tokenizer.next_inputs).eval()
    released.load_state_dict(masked.state_dict())
    tokens, cond = torch.randint(32, (2, L)), ClassCondition(torch.tensor([1, 5]))
    with torch.inference_mode():
        jumps = [m.block_logits(tokens, cond, 2, m.new_cache(2)) for m in (masked, released)]
        assert not torch.allclose(*jumps, atol=1e-2)
        for m in (masked, released):
            cache = m.new_cache(2)
            steps = [m.block_logits(tokens, cond, k, cache) for k in range(T)]
            assert _close(torch.cat(steps, 1), masked(tokens, cond))
        assert _close(released(tokens, cond), masked(tokens, cond))


@pytest.mark.parametrize(("kind", "sees_its_scale"), [("released", False), ("paper", True)])
def test_whom_a_students_token_sees(kind: str, sees_its_scale: bool) -> None:
    _, student, _ = tiny_var_models(replace(VAR, student_mask=kind))  # type: ignore[arg-type]
    cond, noise, _ = _given(2)
    zero = torch.zeros(2, dtype=torch.long)
    codes, logits = student.predict(noise, cond, zero)
    changed = noise.clone()
    changed[:, 6] += 1.0  # in scale 2, tokens 5 to 13
    new_codes, new_logits = student.predict(changed, cond, zero)
    same_scale = [i for i in range(5, 14) if i != 6]
    for before, after in ((codes, new_codes), (logits, new_logits)):
        assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
        assert not _close(before[:, 6], after[:, 6])
        assert not _close(before[:, 14:], after[:, 14:])
        assert torch.allclose(before[:, same_scale], after[:, same_scale], atol=1e-6) is not sees_its_scale


def test_one_batch_may_mix_steps(models: Models) -> None:
    """Bit by bit what each sample gives alone, at every step."""
    tokenizer, student, _ = models
    cond, noise, _ = _given(T)
    steps = torch.arange(T)
    x = renoise(
        lookup(tokenizer.codebook_VC, torch.randint(32, (T, L))), noise, steps, VAR.layout.block_index()
    )
    split = torch.full((T,), 3)
    mixed = student_jump(student, tokenizer.codebook_VC, x, cond, steps, split)
    for i in range(T):
        one = slice(i, i + 1)
        alone = student_jump(student, tokenizer.codebook_VC, x[one], cond.select(one), steps[one], split[one])
        assert torch.equal(alone[0], mixed[i])
        assert torch.equal(mixed[i, : STARTS[i]], x[i, : STARTS[i]])


def test_hybrid_is_the_student_then_the_teacher_then_the_student(models: Models) -> None:
    """Algorithm 4 by hand: S 0→1, a greedy Te 1→3 on the snapped prefix, S 3→T on the original noise."""
    tokenizer, student, teacher = models
    sampler = _sampler(models, draw=LogitSettings(2.0, "linear", top_k=1))
    cond, noise, uniform = _given(3)
    made = run_plan(sampler, plan.hybrid(T, 1, 3, split=3), cond, noise, uniform)
    codebook, step = tokenizer.codebook_VC, torch.zeros(3, dtype=torch.long)
    tokens = nearest(codebook, student_jump(student, codebook, noise, cond, step, step + 3))
    nothing = teacher.null_like(cond)
    for k in (1, 2):
        both = torch.cat([teacher(tokens, cond), teacher(tokens, nothing)])
        guided = guide(_block(both, k), 1 + 2.0 * k / (T - 1))
        _block(tokens, k).copy_(guided.argmax(-1))
    x = renoise(lookup(codebook, tokens), noise, step + 3, VAR.layout.block_index())
    last = student_jump(student, codebook, x, cond, step + 3, step + 3)
    assert torch.equal(nearest(codebook, made[:, : STARTS[3]]), tokens[:, : STARTS[3]])
    assert torch.allclose(made, last, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("dd-1", 2.0),
        ("dd-2", 2.0),
        ("pre-trained-2-3", 2.0),
        ("pre-trained-1-3", 2.0),
        ("teacher", 2.0),
        ("teacher", 0.0),
        ("trajectory", 2.0),
    ],
)
def test_one_request_alone_equals_the_same_request_in_a_mixed_batch(
    bundle: Bundle, name: str, guidance: float, two_threads: None
) -> None:
    """Bit by bit, before pixels are rounded: a batch of one to three rows went through other kernels.

    The class embedding is one row an image, and its products with the modulation's weights were
    rounded by how many images there were: 1e-6 in the codes, one in some thousand pixels. A teacher
    without guidance reads one row for one image, which takes another convolution.
    """
    chosen = next(p.plan for p in bundle.presets if p.plan.name == name)
    sampler = replace(bundle.sampler, draw=replace(bundle.sampler.draw, guidance=guidance))
    rng = random.Random(name)

    def codes(keys: list[tuple[int, int]], labels: list[int]) -> Tensor:
        noise, uniform = batch_noise(keys, VAR.layout, VAR.code_dim)
        with torch.inference_mode():
            return run_plan(sampler, chosen, as_condition(labels), noise, uniform)

    alone = codes([(11, 2)], [3])[0]
    image = sample_images(sampler, chosen, [3], [(11, 2)])[0]
    for size in (2, 3, 5, 9, 17):
        place = rng.randrange(size)
        labels = [rng.randrange(10) for _ in range(size)]
        keys = [(rng.randrange(2**60), rng.randrange(16)) for _ in range(size)]
        labels[place], keys[place] = 3, (11, 2)
        assert torch.equal(codes(keys, labels)[place], alone), size
        assert torch.equal(sample_images(sampler, chosen, labels, keys)[place], image), size


def test_a_teachers_logits_round_alike_for_one_image_and_many(models: Models) -> None:
    """As a `SegmentRun` asks for them: idle rows while products have few, and none after."""
    _, _, teacher = models
    tokens, cond = torch.randint(VAR.codebook_size, (20, L)), ClassCondition(torch.arange(20) % 10)
    one, many = teacher.new_cache(1), teacher.new_cache(20)
    for step, rows in enumerate((16, 4, 2, 2)):
        few = teacher.block_logits(tokens[:rows], cond.select(slice(rows)), step, one)
        assert torch.equal(few[:1], teacher.block_logits(tokens, cond, step, many)[:1]), step


@pytest.mark.parametrize("shared", [False, True])
def test_modulation_does_not_depend_on_the_batch(shared: bool) -> None:
    _, student, _ = tiny_var_models(replace(VAR, shared_adaln=shared))
    cond, noise, _ = _given(20)
    step = torch.zeros(20, dtype=torch.long)
    whole = student.predict(noise, cond, step)
    for size in (1, 2, 3, 7, 16):
        part = student.predict(noise[:size], cond.select(slice(size)), step[:size])
        assert all(torch.equal(a, b[:size]) for a, b in zip(part, whole, strict=True)), size


def test_phi_of_every_scale_is_the_references() -> None:
    """Scales 2 and 7 of ten lie exactly between two ticks, and rounding decides."""
    assert phi_index(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_index(4, 4) == (0, 1, 2, 3)
    assert phi_index(5, 4) == (0, 1, 2, 2, 3)
    assert phi_index(1, 4) == (0,)
    # The reference spaces the ticks of other numbers than four by 1/n.
    assert phi_index(4, 2) == (0, 0, 1, 1) and phi_index(5, 3) == (0, 0, 1, 2, 2)


def test_encode_finds_the_codes_that_made_a_feature_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chequered map averages to zero on coarse scales, where code 0 is the zero vector."""
    model = MultiScaleVQ(MultiScaleConfig(6, 4, 32, (1,), 1, (1, 2, 4), phi_ratio=0.0))
    codes = torch.eye(4)[[0, 0, 1, 1, 2, 2]] * torch.tensor([0.0, 0.0, 1.0, -1.0, 1.0, -1.0])[:, None]
    codes[1] = 9.0  # near nothing
    model.codebook_raw.data.copy_(codes)
    place = torch.arange(16)
    fine = torch.stack([2 + (place + place // 4) % 2, 4 + (place + place // 4) % 2])
    features = lookup(codes, fine).transpose(1, 2).reshape(2, 4, 4, 4)
    monkeypatch.setattr(model, "encode_continuous", lambda _: features)
    tokens = model.encode(torch.zeros(2, 3, 4, 4))
    assert tokens.tolist() == [[0] * 5 + row for row in fine.tolist()]
    assert torch.allclose(model.accumulate(lookup(codes, tokens), 3)[-1], features)


def test_encode_and_decode_agree_on_what_the_scales_add_up_to(models: Models) -> None:
    """Each scale's tokens are the nearest codes to what the scales before it leave."""
    tokenizer = models[0]
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    tokens = tokenizer.encode(image)
    assert tokens.shape == (2, L) and tokenizer.decode_tokens(tokens).shape == (2, 3, 8, 8)
    features = tokenizer.encode_continuous(image)
    maps = tokenizer.accumulate(lookup(tokenizer.codebook_VC, tokens), T)
    for k, side in enumerate(SIDES):
        rest = features if k == 0 else features - maps[k - 1]
        small = torch.nn.functional.adaptive_avg_pool2d(rest, side).flatten(2).transpose(1, 2)
        assert torch.equal(nearest(tokenizer.codebook_VC, small), _block(tokens, k))
        if k:
            read = torch.nn.functional.adaptive_avg_pool2d(maps[k - 1], side).flatten(2).transpose(1, 2)
            assert torch.allclose(tokenizer.next_inputs(tokens, k, k + 1), read, atol=1e-6)


def test_next_inputs_do_not_look_ahead(models: Models) -> None:
    tokenizer, tokens = models[0], torch.randint(32, (2, L))
    changed = tokens.clone()
    _block(changed, 2).add_(1).remainder_(32)
    assert torch.equal(tokenizer.next_inputs(tokens, 1, 3), tokenizer.next_inputs(changed, 1, 3))
    assert not torch.equal(tokenizer.next_inputs(tokens, 3, 4), tokenizer.next_inputs(changed, 3, 4))


@pytest.mark.parametrize("kind", ["released", "paper", "checkpoint"])
def test_a_students_mask_survives_a_bundle(tmp_path: Path, kind: str) -> None:
    """Two masks are formulas and are not stored; the third came with the weights and is."""
    cfg = replace(VAR, student_mask=kind)  # type: ignore[arg-type]
    tokenizer, student, teacher = tiny_var_models(cfg)
    formula = {"released": student_mask(VAR.layout), "paper": paper_student_mask(VAR.layout)}
    if kind == "checkpoint":
        own = student_mask(VAR.layout)
        own[10, 7] = True
        student.mask_SS.copy_(own)
        formula["checkpoint"] = own
    assert ("mask_SS" in student.state_dict()) is (kind == "checkpoint")
    save_bundle(
        tmp_path, tiny_var_manifest(cfg), tokenizer=tokenizer, student=student, teacher=teacher,
        marginals_KLV=None, dtype=torch.float32,
    )  # fmt: skip
    again = load_bundle(tmp_path, torch.device("cpu")).sampler.student
    assert isinstance(again, VARStudent) and again.cfg.student_mask == kind
    assert again.mask_SS.dtype == torch.bool and torch.equal(again.mask_SS, formula[kind])
    cond, noise, _ = _given(2)
    step = torch.tensor([0, 2])
    for ours, theirs in zip(
        student.predict(noise, cond, step), again.predict(noise, cond, step), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_mask_of_another_size_or_none_at_all_is_refused(tmp_path: Path) -> None:
    cfg = replace(VAR, student_mask="checkpoint")
    tokenizer, student, teacher = tiny_var_models(cfg)
    for broken in (torch.ones(4, 4, dtype=torch.bool), None):
        student.register_buffer("mask_SS", broken)
        save_bundle(
            tmp_path, tiny_var_manifest(cfg), tokenizer=tokenizer, student=student, teacher=teacher,
            marginals_KLV=None,
        )  # fmt: skip
        with pytest.raises(WeightsError, match="mask_SS"):
            load_bundle(tmp_path, torch.device("cpu"))


def test_a_text_is_no_condition_for_classes(models: Models) -> None:
    _, student, _ = models
    text = TextCondition(torch.zeros(1, 5, 8), torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(InvalidRequestError, match="class indices") as caught:
        student.predict(torch.zeros(1, L, 8), text, torch.zeros(1, dtype=torch.long))
    assert caught.value.param == "condition"


def test_a_teacher_needs_a_tokenizer_with_scales() -> None:
    with pytest.raises(WeightsError, match="multi-scale"):
        new_teacher(VAR, VQTokenizer(VQConfig(32, 8, 32, 32, (1,), 1)))


def test_published_sizes_follow_from_the_depth() -> None:
    cfg = VARConfig.of_depth(20)
    assert (cfg.dim, cfg.heads, cfg.head_dim, cfg.hidden) == (1280, 20, 64, 5120)
    assert cfg.layout.num_tokens == 680 and VQ.downsampling == 2
