"""LlamaGen: VQ tokenizer, class- and text-conditional teachers, student and hybrid.

Shapes: B batch, L tokens, C code dimension, V codebook size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dd_core import plan
from dd_core.codebook import lookup, nearest
from dd_core.condition import ClassCondition, Condition
from dd_core.logits import LogitSettings, guide, keep_likely, log_probabilities
from dd_core.models.adapters import adapt_llamagen_gpt, adapt_llamagen_vq, load_strictly
from dd_core.models.config import LlamaGenConfig, VQConfig
from dd_core.models.llamagen import LlamaGenStudent, LlamaGenTeacher
from dd_core.models.vq import VQTokenizer
from dd_core.sampling import Sampler, run_plan, student_jump
from dd_core.text.encoder import padded_batch
from tests.conformance.report import Fixture
from tests.conformance.student import check_student, segment


def _to_unit(image: Tensor) -> Tensor:
    """[−1, 1] → [0, 1], not clamped, as the reference records it."""
    return (image + 1) / 2


def tokenizer_of(fixture: Fixture) -> VQTokenizer:
    facts = fixture.config["vq"]
    if not facts.get("codebook_l2_norm", True):
        raise ValueError("a codebook that is not normalised is no published LlamaGen tokenizer")
    cfg = VQConfig(
        facts["codebook_size"],
        facts["codebook_embed_dim"],
        facts["z_channels"],
        facts["ch"],
        tuple(facts["ch_mult"]),
        facts["num_res_blocks"],
    )
    model = VQTokenizer(cfg).eval().requires_grad_(False)
    load_strictly(model, fixture.adapted("lg_vq", adapt_llamagen_vq), "LlamaGen VQ")
    return model


def gpt_config(facts: dict[str, Any], vq: VQConfig) -> LlamaGenConfig:
    if facts.get("n_kv_head"):
        raise ValueError("n_kv_head: no published LlamaGen model groups its keys")
    text = facts["model_type"] == "t2i"
    return LlamaGenConfig(
        layers=facts["n_layer"],
        heads=facts["n_head"],
        dim=facts["dim"],
        codebook_size=facts["vocab_size"],
        code_dim=facts.get("codebook_dim", vq.code_dim),
        grid=math.isqrt(facts["block_size"]),
        num_classes=facts["num_classes"],
        rope_base=float(facts["rope_base"]),
        norm_eps=facts["norm_eps"],
        hidden_multiple=facts["multiple_of"],
        text_tokens=facts["cls_token_num"] if text else 0,
        text_dim=facts["caption_dim"] if text else 0,
    )


def teacher_of(fixture: Fixture, facts: dict[str, Any], file: str, vq: VQConfig) -> LlamaGenTeacher:
    model = LlamaGenTeacher(gpt_config(facts, vq)).eval().requires_grad_(False)
    load_strictly(model, fixture.adapted(file, adapt_llamagen_gpt), "LlamaGen GPT")
    return model


def student_of(fixture: Fixture, facts: dict[str, Any], vq: VQConfig) -> LlamaGenStudent:
    model = LlamaGenStudent(gpt_config(facts, vq)).eval().requires_grad_(False)
    load_strictly(model, fixture.adapted("lg_dd", adapt_llamagen_gpt), "LlamaGen-DD")
    return model


def _grid(x_BLC: Tensor) -> Tensor:
    side = math.isqrt(x_BLC.shape[1])
    return x_BLC.transpose(1, 2).reshape(len(x_BLC), -1, side, side)


def check_vq(fixture: Fixture) -> None:
    model = tokenizer_of(fixture)
    codes = lookup(model.codebook_VC, fixture.inputs("idx"))
    fixture.compare("codebook", model.codebook_VC)
    fixture.compare("quant_from_idx", _grid(codes))
    fixture.compare("img", model.to_image(codes))
    fixture.compare("img_from_embed", model.to_image(fixture.inputs("embed").flatten(2).transpose(1, 2)))
    image = fixture.inputs("img")
    fixture.compare("enc_h", model.quant_conv(model.encoder(image)))
    found = model.encode(image)
    fixture.compare("enc_idx", found)
    fixture.compare("enc_quant", _grid(lookup(model.codebook_VC, found)))
    fixture.compare("img_rec", model.decode_tokens(found))


def check_filter(fixture: Fixture) -> None:
    cases = {f"case{i}": c for i, c in enumerate(fixture.cases["cases"])} | {"ties": fixture.cases["ties"]}
    for name, case in cases.items():
        draw = LogitSettings(top_k=case["top_k"], top_p=case["top_p"])
        fixture.compare(f"{name}.filtered", keep_likely(fixture.io[case["input"]], draw))


def _draw(case: dict[str, Any]) -> LogitSettings:
    interval = case.get("cfg_interval", -1)
    return LogitSettings(
        case["cfg_scale"],
        # The reference counts decoding steps after the first token.
        guidance_until=interval + 1 if interval > -1 else None,
        temperature=case.get("temperature", 1.0),
        top_k=case.get("top_k", 0),
        top_p=case.get("top_p", 1.0),
    )


def _generate(
    fixture: Fixture,
    name: str,
    model: LlamaGenTeacher,
    cond: Condition,
    draw: LogitSettings,
    start_tokens: Tensor,
    stop: int,
    *,
    greedy: bool,
    atol: float,
) -> Tensor:
    """Token by token on the recorded tokens: logits and probabilities do not depend on chance."""
    start, layout = start_tokens.shape[1], model.layout
    recorded = torch.cat([start_tokens, fixture.io[f"out.{name}.idx"].long()[:, start:]], 1)
    tokens = torch.zeros(len(recorded), layout.num_tokens, dtype=torch.long)
    tokens[:, : recorded.shape[1]] = recorded
    doubled = cond.joined(model.null_like(cond)) if draw.guided else cond
    cache = model.new_cache(len(tokens) * (2 if draw.guided else 1))
    logits, chosen = [], []
    for step in range(start, stop):
        seen = torch.cat([tokens, tokens]) if draw.guided else tokens
        raw = model.block_logits(seen, doubled, step, cache)
        logits.append(guide(raw, draw.scale(step, layout.num_blocks)) if draw.guided else raw)
        chosen.append(log_probabilities(logits[-1], draw).argmax(-1))
    made = torch.cat(logits, 1)
    fixture.compare(f"{name}.logits", made, atol=atol)
    if fixture.has(f"{name}.probs"):
        probabilities = log_probabilities(made, draw).exp()
        fixture.compare(f"{name}.probs", probabilities, atol=atol)
    if greedy:
        fixture.compare(f"{name}.idx", torch.cat([start_tokens, *chosen], 1))
    else:
        kept = log_probabilities(made, draw)
        allowed = kept.gather(-1, recorded[:, start:, None]).isfinite().all()
        fixture.check(f"{name}.idx", bool(allowed), "drawn: every token is one that the filter keeps")
    return recorded


def _check_forced(
    fixture: Fixture, model: LlamaGenTeacher, cond: Condition, scale: float, atol: float
) -> None:
    tokens = fixture.inputs("idx")
    forced, free = model(tokens, cond), model(tokens, model.null_like(cond))
    fixture.compare("logits", forced)
    fixture.compare("logits_uncond", free)
    fixture.compare("logits_cfg", guide(torch.cat([forced, free]), scale), atol=atol)
    if fixture.has("cached_logits"):
        cache = model.new_cache(len(tokens))
        steps = [model.block_logits(tokens, cond, k, cache) for k in range(model.layout.num_blocks)]
        fixture.compare("cached_logits", torch.cat(steps, 1))
    fixture.compare("freqs_cis", model.rope)


def _check_generation(
    fixture: Fixture, model: LlamaGenTeacher, tokenizer: VQTokenizer, cond: Condition, atol: float
) -> None:
    nothing = fixture.inputs("idx")[:, :0]
    for name, case in fixture.cases.items():
        if not isinstance(case, dict) or "max_new_tokens" not in case:
            continue
        greedy = not case["sample_logits"] or case["top_k"] == 1
        loose = atol if case["cfg_scale"] > 2 else 1e-4
        recorded = _generate(
            fixture,
            name,
            model,
            cond,
            _draw(case),
            nothing,
            case["max_new_tokens"],
            greedy=greedy,
            atol=loose,
        )
        if fixture.has(f"{name}.img"):
            image = tokenizer.decode_tokens(recorded)
            fixture.compare(f"{name}.img", image)


def check_class_teacher(fixture: Fixture) -> None:
    tokenizer = tokenizer_of(fixture)
    model = teacher_of(fixture, fixture.config["model"], "lg_gpt_c2i", tokenizer.cfg)
    labels, cases = ClassCondition(fixture.inputs("labels")), fixture.cases
    _check_forced(fixture, model, labels, cases["greedy"]["cfg_scale"], 1e-4)
    _check_generation(fixture, model, tokenizer, labels, 1e-4)
    for number, case in enumerate(cases.get("intermediate_generate", [])):
        prefix = fixture.inputs("idx")[:, : case["t_start"]]
        _generate(
            fixture, f"inter{number}", model, labels, _draw(case), prefix, case["t_end"],
            greedy=case["top_k"] == 1, atol=1e-4,
        )  # fmt: skip


def check_text_teacher(fixture: Fixture) -> None:
    tokenizer = tokenizer_of(fixture)
    model = teacher_of(fixture, fixture.config["model"], "lg_gpt_t2i", tokenizer.cfg)
    states, mask = fixture.inputs("t5_embs"), fixture.inputs("t5_masks").bool()
    cond = padded_batch([row[kept] for row, kept in zip(states, mask, strict=True)], states.shape[1])
    fixture.compare("cond", cond.states_BTN)
    fixture.compare("emb_masks", cond.mask_BT.long())
    fixture.compare("cap_embed", model.condition(cond))
    size = model.cfg.prefix + model.layout.num_tokens
    mask = model.mask(cond, 0, size)
    assert mask is not None
    fixture.compare("attn_mask", mask[:, 0])
    # Guidance of 7.5 multiplies the rounding of both halves: the manifest's own tolerance.
    _check_forced(fixture, model, cond, fixture.config["t2i_cfg"], 2e-3)
    _check_generation(fixture, model, tokenizer, cond, 2e-3)


def check_dd(fixture: Fixture) -> None:
    tokenizer = tokenizer_of(fixture)
    check_student(
        fixture,
        fixture.ready(student_of(fixture, fixture.config["model"], tokenizer.cfg)),
        fixture.ready(tokenizer),
        fixture.inputs("idx"),
        steps=fixture.cases["t_values"],
        splits=fixture.cases["splits"],
        sequence="final_x",
        to_unit=_to_unit,
    )


def check_hybrid(fixture: Fixture) -> None:
    tokenizer = tokenizer_of(fixture)
    student = student_of(fixture, fixture.config["student"], tokenizer.cfg)
    teacher = teacher_of(fixture, fixture.config["teacher"], "lg_gpt_c2i", tokenizer.cfg)
    labels, noise = ClassCondition(fixture.inputs("labels")), fixture.inputs("noise")
    layout, uniform = student.layout, torch.full(noise.shape[:2], 0.5)
    for number, case in enumerate(fixture.cases["cases"]):
        start, stop, split = case["teacher_start_t"], case["t_list"][1], case["split_t"]
        chosen = plan.hybrid(layout.num_blocks, start, stop, split)
        sampler = Sampler(layout, tokenizer, student, teacher, draw=_draw(case))
        codebook = sampler.codebook_VC
        x, step = noise, torch.zeros(len(noise), dtype=torch.long)
        if start:
            x = student_jump(student, codebook, noise, labels, step, torch.full_like(step, split))
            fixture.compare(f"case{number}.dd_first", x)
            fixture.compare(f"case{number}.dd_first_idx", nearest(codebook, x[:, :start]))
        x = segment(sampler, chosen, 1 if start else 0, x, labels, noise, uniform)
        fixture.compare(f"case{number}.teacher_idx", nearest(codebook, x[:, :stop]))
        final = run_plan(sampler, chosen, labels, noise, uniform)
        fixture.compare(f"case{number}.final_x", final)
        fixture.compare(f"case{number}.img", _to_unit(tokenizer.to_image(final)))
