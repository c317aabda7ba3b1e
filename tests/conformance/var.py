"""VAR: the multi-scale VQVAE, teachers, student and hybrid against recorded tensors.

Shapes: B batch, K scales, L tokens, C code dimension, V codebook size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dd_core import plan
from dd_core.codebook import lookup, nearest
from dd_core.condition import ClassCondition
from dd_core.logits import LogitSettings, guide, keep_likely
from dd_core.models.adapters import (
    adapt_var,
    adapt_var_dd,
    adapt_var_vqvae,
    load_strictly,
    student_mask_of,
)
from dd_core.models.config import MultiScaleConfig, VARConfig
from dd_core.models.multiscale_vq import MultiScaleVQ, phi_index
from dd_core.models.var import VARStudent, VARTeacher
from dd_core.sampling import Sampler, run_plan, student_jump
from tests.conformance.report import Fixture
from tests.conformance.student import check_student, segment


def _to_unit(image: Tensor) -> Tensor:
    """[−1, 1], clamped as the reference's decoder does, → [0, 1]."""
    return (image.clamp(-1, 1) + 1) / 2


def vq_config(facts: dict[str, Any]) -> MultiScaleConfig:
    return MultiScaleConfig(
        codebook_size=facts["vocab_size"],
        z_channels=facts["z_channels"],
        channels=facts["ch"],
        channel_multipliers=tuple(facts["ch_mult"]),
        res_blocks=facts["num_res_blocks"],
        sides=tuple(facts["patch_nums"]),
        shared_phi=facts["share_quant_resi"],
    )


def tokenizer_of(fixture: Fixture) -> MultiScaleVQ:
    cfg = vq_config(fixture.config["vae"])
    model = MultiScaleVQ(cfg).eval().requires_grad_(False)
    levels = len(cfg.channel_multipliers)
    load_strictly(model, fixture.adapted("var_vqvae", lambda s: adapt_var_vqvae(s, levels)), "VAR VQVAE")
    return model


def var_config(facts: dict[str, Any], vq: MultiScaleConfig, classes: int) -> VARConfig:
    if facts.get("norm_eps", 1e-6) != 1e-6:
        raise ValueError(f"norm_eps {facts['norm_eps']}: every published VAR has 1e-6")
    return VARConfig(
        depth=facts["depth"],
        dim=facts["embed_dim"],
        heads=facts["num_heads"],
        codebook_size=vq.codebook_size,
        code_dim=vq.code_dim,
        sides=vq.sides,
        num_classes=classes,
        unit_length=facts["attn_l2_norm"],
        shared_adaln=facts["shared_aln"],
        mlp_ratio=facts.get("mlp_ratio", 4.0),
    )


def teacher_of(
    fixture: Fixture, facts: dict[str, Any], file: str, tokenizer: MultiScaleVQ, *, prefix_mask: bool = True
) -> VARTeacher:
    cfg = var_config(facts, tokenizer.cfg, fixture.config["num_classes"])
    cfg = replace(cfg, prefix_mask=prefix_mask)
    model = VARTeacher(cfg, tokenizer.next_inputs).eval().requires_grad_(False)
    load_strictly(model, fixture.adapted(file, adapt_var), "VAR")
    return model


def student_of(fixture: Fixture, facts: dict[str, Any], vq: MultiScaleConfig) -> VARStudent:
    cfg, state = var_config(facts, vq, fixture.config["num_classes"]), fixture.weights("var_dd")
    kind, mask = student_mask_of(state, cfg)
    model = VARStudent(replace(cfg, student_mask=kind)).eval().requires_grad_(False)  # type: ignore[arg-type]
    adapted = fixture.adapted("var_dd", adapt_var_dd)
    load_strictly(model, adapted if mask is None else {**adapted, "mask_SS": mask}, "VAR-DD")
    return model


def indices(fixture: Fixture, prefix: str = "in.idx") -> Tensor:
    """Recorded tokens of all scales, `[B, L]`."""
    names = sorted(
        (k for k in fixture.io if k.startswith(f"{prefix}.s")), key=lambda k: int(k.split(".s")[-1])
    )
    return torch.cat([fixture.io[n] for n in names], 1)


def check_vqvae(fixture: Fixture) -> None:
    model, tokens = tokenizer_of(fixture), indices(fixture)
    starts, scales = model.cfg.layout.starts, len(model.cfg.sides)
    maps = model.accumulate(lookup(model.codebook_VC, tokens), scales)
    for k, f_hat in enumerate(maps):
        fixture.compare(f"fhat.s{k}", f_hat)
        last = k == scales - 1
        given = f_hat if last else _grid(model.next_inputs(tokens, k + 1, k + 2), model.cfg.sides[k + 1])
        fixture.compare(f"next_input.s{k}", given)
    image = model.decode_tokens(tokens).clamp(-1, 1)
    fixture.compare("img", image)
    fixture.compare("img_from_idx", image)
    fixture.compare("var_input", model.next_inputs(tokens, 1, scales))
    fixture.compare("enc_f", model.encode_continuous(fixture.inputs("img")))
    found = model.encode(fixture.inputs("img"))
    rebuilt = model.accumulate(lookup(model.codebook_VC, found), scales)
    for k in range(scales):
        fixture.compare(f"img_idx.s{k}", found[:, starts[k] : starts[k + 1]])
        fixture.compare(f"img_fhat.s{k}", rebuilt[k])
    fixture.compare("img_rec", model.decode_tokens(found).clamp(-1, 1))
    told = fixture.cases.get("phi_index_per_scale")
    if told is not None and list(phi_index(scales, model.cfg.shared_phi)) != told:
        fixture.report.fail(fixture.name, "phi_index_per_scale", f"{phi_index(scales, model.cfg.shared_phi)}")


def _grid(x_BSC: Tensor, side: int) -> Tensor:
    return x_BSC.transpose(1, 2).reshape(len(x_BSC), -1, side, side)


def check_quantizer(fixture: Fixture) -> None:
    """The quantiser alone, with the published lists of scales."""
    facts, state = fixture.config, fixture.weights("var_quant10")
    if facts.get("using_znorm"):
        raise ValueError("using_znorm: no published VAR tokenizer normalises its codes")
    state = {k if k.startswith("quantize.") else f"quantize.{k}": v for k, v in state.items()}
    adapted = adapt_var_vqvae(state, 1, "quantiser").state
    for case, told in fixture.cases.items():
        cfg = MultiScaleConfig(
            facts["vocab_size"], facts["z_channels"], 32, (1,), 1, tuple(told["patch_nums"]),
            facts["share_quant_resi"], facts["quant_resi"],
        )  # fmt: skip
        model = MultiScaleVQ(cfg).eval().requires_grad_(False)
        load_strictly(model, {**model.state_dict(), **adapted}, "quantiser")
        tokens, scales = fixture.inputs(f"{case}.idx"), len(cfg.sides)
        maps = model.accumulate(lookup(model.codebook_VC, tokens), scales)
        fixture.compare(f"{case}.fhat", maps[-1])
        for k in range(scales):
            last = k == scales - 1
            given = maps[k] if last else _grid(model.next_inputs(tokens, k + 1, k + 2), cfg.sides[k + 1])
            fixture.compare(f"{case}.next_input.s{k}", given)
        if list(phi_index(scales, cfg.shared_phi)) != told["phi_index_per_scale"]:
            fixture.report.fail(fixture.name, f"{case}.phi_index_per_scale", "another φ for a scale")


def check_filter(fixture: Fixture) -> None:
    """top-k, then top-p; the reference's top_p = 0 means none."""
    cases = {f"case{i}": c for i, c in enumerate(fixture.cases["cases"])} | {"ties": fixture.cases["ties"]}
    for name, case in cases.items():
        draw = LogitSettings(top_k=case["top_k"], top_p=case["top_p"] or 1.0)
        fixture.compare(f"{name}.filtered", keep_likely(fixture.io[case["input"]], draw))


def _draw(case: dict[str, Any]) -> LogitSettings:
    return LogitSettings(case["cfg"], "linear", top_k=case["top_k"], top_p=case["top_p"] or 1.0)


def check_teacher(fixture: Fixture) -> None:
    tokenizer = tokenizer_of(fixture)
    model = teacher_of(fixture, fixture.config["model"], fixture.name, tokenizer)
    labels, tokens = ClassCondition(fixture.inputs("labels")), indices(fixture)
    layout = model.layout
    nothing = model.null_like(labels)
    forced = model(tokens, labels), model(tokens, nothing)
    fixture.compare("logits", forced[0])
    fixture.compare("logits_uncond", forced[1])
    draw = _draw(fixture.cases["ar_greedy"])
    both = torch.cat(forced)
    scaled = [
        guide(both[:, layout.starts[k] : layout.starts[k + 1]], draw.scale(k, layout.num_blocks))
        for k in range(layout.num_blocks)
    ]
    fixture.compare("logits_cfg", torch.cat(scaled, 1))
    for name, case in fixture.cases.items():
        if name.startswith("ar_"):
            _check_sampling(fixture, name, case, model, tokenizer)
    for number, case in enumerate(fixture.cases.get("intermediate_sample", [])):
        _check_intermediate(fixture, number, case, tokenizer)


def _check_sampling(
    fixture: Fixture, name: str, case: dict[str, Any], model: VARTeacher, tokenizer: MultiScaleVQ
) -> None:
    """Scale by scale on the recorded tokens: logits, guidance and filter do not depend on chance."""
    layout, draw, labels = model.layout, _draw(case), ClassCondition(fixture.inputs("labels"))
    smooth = case.get("more_smooth", False)
    recorded = indices(fixture, f"out.{name}.idx")
    doubled = labels.joined(model.null_like(labels))
    cache = model.new_cache(len(doubled))
    for k in range(layout.num_blocks):
        place = slice(layout.starts[k], layout.starts[k + 1])
        if smooth and k:
            fixture.skip(f"{name}.logits_raw.s{k}", "reads codes that were mixed with random weights")
            raw = fixture.io[f"out.{name}.logits_raw.s{k}"]
        else:
            raw = model.block_logits(torch.cat([recorded, recorded]), doubled, k, cache)
            fixture.compare(f"{name}.logits_raw.s{k}", raw)
        guided = guide(raw, draw.scale(k, layout.num_blocks))
        # Guidance multiplies the rounding of both halves by its scale.
        fixture.compare(f"{name}.logits_cfg.s{k}", guided, atol=2e-3 if smooth else 1e-4)
        kept = keep_likely(guided, draw)
        fixture.compare(f"{name}.logits_filtered.s{k}", kept, atol=2e-3 if smooth else 1e-4)
        chosen = recorded[:, place]
        if case["top_k"] == 1:
            fixture.compare(f"{name}.idx.s{k}", kept.argmax(-1))
        else:
            allowed = bool(kept.gather(-1, chosen[..., None]).isfinite().all())
            fixture.check(f"{name}.idx.s{k}", allowed, "drawn: every token is one that the filter keeps")
    if smooth:
        fixture.skip(f"{name}.img", "made of codes that were mixed with random weights")
    else:
        fixture.compare(f"{name}.img", _to_unit(tokenizer.decode_tokens(recorded)))


def _check_intermediate(fixture: Fixture, number: int, case: dict[str, Any], tokenizer: MultiScaleVQ) -> None:
    """The released hybrid's teacher: a prefix that was read without a mask, then scale by scale.

    Raises:
        ValueError: tokens that were drawn, and not the most likely ones.
    """
    if case["top_k"] != 1:
        raise ValueError(
            f"intermediate_sample {number}: top_k {case['top_k']}: only greedy ones can be compared"
        )
    model = teacher_of(fixture, fixture.config["model"], fixture.name, tokenizer, prefix_mask=False)
    layout, draw, labels = model.layout, _draw(case), ClassCondition(fixture.inputs("labels"))
    start, stop = case["start_t"], case["end_point"]
    tokens = indices(fixture).clone()
    doubled = labels.joined(model.null_like(labels))
    cache = model.new_cache(len(doubled))
    for k in range(start, stop):
        place = slice(layout.starts[k], layout.starts[k + 1])
        raw = model.block_logits(torch.cat([tokens, tokens]), doubled, k, cache)
        guided = guide(raw, draw.scale(k, layout.num_blocks))
        fixture.compare(f"inter{number}.logits_cfg.s{k}", guided)
        tokens[:, place] = keep_likely(guided, draw).argmax(-1)
        fixture.compare(f"inter{number}.idx.s{k}", tokens[:, place])
    known = layout.starts[stop]
    codes = lookup(tokenizer.codebook_VC, tokens[:, :known])
    fixture.compare(f"inter{number}.sequence", codes)
    total = tokenizer.accumulate(codes, stop)[-1]
    image = tokenizer.decoder(tokenizer.post_quant_conv(total))
    fixture.compare(f"inter{number}.img", _to_unit(image))


def check_dd(fixture: Fixture) -> None:
    tokenizer = tokenizer_of(fixture)
    student = student_of(fixture, fixture.config["model"], tokenizer.cfg)
    check_student(
        fixture,
        fixture.ready(student),
        fixture.ready(tokenizer),
        indices(fixture),
        steps=list(range(student.layout.num_blocks)),
        splits=list(range(student.layout.num_blocks + 1)),
        sequence="final_seq",
        to_unit=_to_unit,
    )


def check_hybrid(fixture: Fixture) -> None:
    """Algorithm 4, as released (the prefix unmasked) and as the paper has it (`causal.`)."""
    tokenizer = tokenizer_of(fixture)
    student = student_of(fixture, fixture.config["student"], tokenizer.cfg)
    labels, noise = ClassCondition(fixture.inputs("labels")), fixture.inputs("noise")
    layout, uniform = student.layout, torch.full(noise.shape[:2], 0.5)
    for number, case in enumerate(fixture.cases["cases"]):
        start, stop, split = case["t_teacher_start"], case["t_list"][1], case["split_t"]
        chosen = plan.hybrid(layout.num_blocks, start, stop, split)
        for variant, masked in (("", False), ("causal.", True)):
            prefix = f"case{number}.{variant}"
            if not fixture.has(f"{prefix}final_seq"):
                continue
            teacher = teacher_of(
                fixture, fixture.config["teacher"], "var_teacher", tokenizer, prefix_mask=masked
            )
            sampler = Sampler(layout, tokenizer, student, teacher, draw=_draw(case))
            x, step = noise, torch.zeros(len(noise), dtype=torch.long)
            if start:
                x = student_jump(
                    student, sampler.codebook_VC, noise, labels, step, torch.full_like(step, split)
                )
                if fixture.has(f"{prefix}dd_first"):
                    fixture.compare(f"{prefix}dd_first", x)
                    snapped = lookup(sampler.codebook_VC, nearest(sampler.codebook_VC, x))
                    fixture.compare(f"{prefix}dd_first_quant", snapped)
            x = segment(sampler, chosen, 1 if start else 0, x, labels, noise, uniform)
            fixture.compare(f"{prefix}teacher_seq", x[:, : layout.starts[stop]])
            final = run_plan(sampler, chosen, labels, noise, uniform)
            fixture.compare(f"{prefix}final_seq", final)
            fixture.compare(f"{prefix}img", _to_unit(tokenizer.to_image(final)))
