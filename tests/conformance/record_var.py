"""VAR's fixtures, computed by `tests.conformance.naive_var` on random weights.

Shapes: B batch, K scales, L tokens, C code dimension, V codebook size, D model width.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from dd_core.models.config import MultiScaleConfig, VARConfig
from dd_core.models.multiscale_vq import MultiScaleVQ
from dd_core.models.var import VARStudent, VARTeacher
from tests.conformance import naive_var as slow
from tests.conformance.naive import Weights, apply, double, draw, keep_var, largest, nearest
from tests.conformance.recording import Recording, integers, normal, redraw
from tests.upstream import reference_state

SIDES, B, V, C, CLASSES = (1, 2, 3), 2, 8, 4, 7
LEVELS, BLOCKS = 2, 0
_VQ = MultiScaleConfig(V, C, 32, (1,) * LEVELS, BLOCKS, SIDES)
_VAR = VARConfig(2, 8, 2, V, C, SIDES, CLASSES)
_CONFIG = {
    "vae": {
        "vocab_size": V,
        "z_channels": C,
        "ch": 32,
        "ch_mult": [1] * LEVELS,
        "num_res_blocks": BLOCKS,
        "share_quant_resi": 4,
        "patch_nums": list(SIDES),
    },
    "num_classes": CLASSES,
    "B": B,
}
_DECODER = slow.decoder(LEVELS, BLOCKS)
_TEACHERS = {
    "var_teacher": _VAR,
    "var_teacher_saln": VARConfig(2, 8, 2, V, C, SIDES, CLASSES, shared_adaln=True),
    "var_teacher_nol2": VARConfig(2, 8, 1, V, C, SIDES, CLASSES, unit_length=False),
}
_PUBLISHED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def weights(seed: int) -> dict[str, dict[str, Tensor]]:
    """State dicts with the reference's keys, by the name of their file."""
    tokenizer = MultiScaleVQ(_VQ)
    models = {"var_vqvae": tokenizer, "var_dd": VARStudent(_VAR)}
    models |= {name: VARTeacher(cfg, tokenizer.next_inputs) for name, cfg in _TEACHERS.items()}
    states = {}
    for place, (name, model) in enumerate(models.items()):
        redraw(model, 100 * seed + place)
        states[name] = reference_state(model)
    # The mask that the reference would keep in the file, from the description and not from our code.
    seen = slow.student_allowed(SIDES)
    bias = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    states["var_dd"]["attn_bias_for_masking"] = bias[None, None]
    return states


def fixtures(seed: int) -> tuple[list[Recording], dict[str, dict[str, Tensor]]]:
    """All of the family's fixtures and the weights they use."""
    states = weights(seed)
    made = {name: double(state) for name, state in states.items()}
    quantiser, quantiser_state = _quantiser(seed)
    states["var_quant10"] = quantiser_state
    recordings = [_tokenizer(made["var_vqvae"], seed), quantiser]
    recordings += [_teacher(name, cfg, made, seed) for name, cfg in _TEACHERS.items()]
    recordings += [_filter(seed), _student(made, seed), _hybrid(made, seed)]
    return recordings, states


def shape_of(cfg: VARConfig) -> slow.Shape:
    return slow.Shape(SIDES, cfg.heads, cfg.depth, cfg.unit_length)


def _facts(cfg: VARConfig) -> dict[str, Any]:
    return {
        "embed_dim": cfg.dim,
        "num_heads": cfg.heads,
        "depth": cfg.depth,
        "attn_l2_norm": cfg.unit_length,
        "shared_aln": cfg.shared_adaln,
        "norm_eps": 1e-6,
        "mlp_ratio": cfg.mlp_ratio,
    }


def _tokens(seed: int) -> Tensor:
    return integers(V, (B, sum(p * p for p in SIDES)), 1000 + seed)


def _labels(seed: int) -> Tensor:
    return integers(CLASSES, (B,), 2000 + seed)


def _noise(seed: int) -> Tensor:
    return normal((B, sum(p * p for p in SIDES), C), 3000 + seed)


def _give_tokens(fixture: Recording, tokens: Tensor) -> None:
    for k in range(len(SIDES)):
        fixture.given(f"idx.s{k}", tokens[:, slow.bounds(SIDES, k)])


def _image(v: Weights, codes: Tensor) -> Tensor:
    return slow.image_of(v, _DECODER, slow.f_hat(v, SIDES, codes, len(SIDES)))


def _to_unit(image: Tensor) -> Tensor:
    return (image + 1) / 2


def _tokenizer(v: Weights, seed: int) -> Recording:
    fixture = Recording("var_vqvae", "The multi-scale VQVAE.", {**_CONFIG, "seed": seed}, ("var_vqvae",))
    tokens, last = _tokens(seed), len(SIDES) - 1
    _give_tokens(fixture, tokens)
    codes, inputs = slow.lookup(v, tokens), []
    for k in range(len(SIDES)):
        total = slow.f_hat(v, SIDES, codes, k + 1)
        fixture.out(f"fhat.s{k}", total)
        fixture.out(f"next_input.s{k}", total if k == last else slow.next_input(v, SIDES, tokens, k + 1))
        if k < last:
            inputs.append(slow.flat(slow.next_input(v, SIDES, tokens, k + 1)))
    fixture.out("var_input", torch.cat(inputs, 1))
    fixture.out("img", _image(v, codes))
    fixture.out("img_from_idx", _image(v, codes))
    pixels = SIDES[-1] * 2 ** (LEVELS - 1)
    given = torch.tanh(normal((B, 3, pixels, pixels), 4000 + seed))
    fixture.given("img", given)
    feature = apply(v, slow.encoder(LEVELS, BLOCKS), given.double())
    fixture.out("enc_f", feature)
    found, maps = slow.quantise(v, SIDES, feature, fixture.margins)
    for k in range(len(SIDES)):
        fixture.out(f"img_idx.s{k}", found[:, slow.bounds(SIDES, k)])
        fixture.out(f"img_fhat.s{k}", maps[k])
    fixture.out("img_rec", _image(v, slow.lookup(v, found)))
    fixture.cases = {"phi_index_per_scale": [slow.phi_of(k, len(SIDES)) for k in range(len(SIDES))]}
    return fixture


def _quantiser(seed: int) -> tuple[Recording, dict[str, Tensor]]:
    """The published list of scales, whose φ has two exact ties, and one of another length."""
    config = {
        "vocab_size": 8, "z_channels": 2, "share_quant_resi": 4, "quant_resi": 0.5, "using_znorm": False
    }  # fmt: skip
    fixture = Recording("var_quant10", "The quantiser alone.", config, ("var_quant10",))
    state = {"quantize.embedding.weight": normal((8, 2), 5000 + seed)}
    for j in range(4):
        name = f"quantize.quant_resi.qresi_ls.{j}"
        state[f"{name}.weight"] = 0.3 * normal((2, 2, 3, 3), 5100 + 10 * seed + j)
        state[f"{name}.bias"] = 0.3 * normal((2,), 5200 + 10 * seed + j)
    v = double(state)
    for case, sides in (("p256", _PUBLISHED), ("five", (1, 2, 3, 4, 5))):
        tokens = integers(8, (1, sum(p * p for p in sides)), 5300 + seed)
        fixture.given(f"{case}.idx", tokens)
        total = slow.f_hat(v, sides, slow.lookup(v, tokens), len(sides))
        fixture.out(f"{case}.fhat", total)
        for k in range(len(sides)):
            last = k == len(sides) - 1
            given = total if last else slow.next_input(v, sides, tokens, k + 1)
            fixture.out(f"{case}.next_input.s{k}", given)
        phi = [slow.phi_of(k, len(sides)) for k in range(len(sides))]
        fixture.cases[case] = {"patch_nums": list(sides), "phi_index_per_scale": phi}
    return fixture, state


def _filter(seed: int) -> Recording:
    """Logits in steps of 1/2 tie exactly in any precision."""
    fixture = Recording("var_filter", "top-k, then top-p; −inf outside.")
    logits = {"logits": 2 * normal((2, 3, V), 6000 + seed)}
    logits["logits_ties"] = (logits["logits"] * 2).round() / 2
    settings = [(0, 0.0), (5, 0.0), (0, 0.9), (7, 0.6), (1, 0.5)]
    cases = [{"top_k": k, "top_p": p, "input": "in.logits"} for k, p in settings]
    ties = {"top_k": 4, "top_p": 0.0, "input": "in.logits_ties"}
    for name, value in logits.items():
        fixture.given(name, value)
    for name, case in [*((f"case{i}", c) for i, c in enumerate(cases)), ("ties", ties)]:
        given = logits[case["input"].removeprefix("in.")].double()  # type: ignore[attr-defined]
        fixture.out(f"{name}.filtered", _kept(fixture, given, case))
    fixture.cases = {"cases": cases, "ties": ties}
    return fixture


def _kept(fixture: Recording, logits: Tensor, case: dict[str, Any]) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1]).tolist()
    kept = [keep_var(row, case["top_k"], case["top_p"], fixture.margins) for row in rows]
    return torch.tensor(kept, dtype=torch.float64).reshape(logits.shape)


def _teacher(name: str, cfg: VARConfig, made: dict[str, dict[str, Tensor]], seed: int) -> Recording:
    config = {**_CONFIG, "seed": seed, "model": _facts(cfg)}
    fixture = Recording(name, "A teacher: forced, greedy and drawn.", config, ("var_vqvae", name))
    v, w, shape = made["var_vqvae"], made[name], shape_of(cfg)
    tokens, labels = _tokens(seed), _labels(seed)
    nothing = torch.full_like(labels, CLASSES)
    _give_tokens(fixture, tokens)
    fixture.given("labels", labels)
    forced, free = (slow.teacher(w, v, shape, tokens, y, len(SIDES)) for y in (labels, nothing))
    fixture.out("logits", forced)
    fixture.out("logits_uncond", free)
    fixture.cases["ar_greedy"] = {"cfg": 2.0, "top_k": 1, "top_p": 0.95}
    fixture.out("logits_cfg", slow.guided(forced, free, SIDES, 2.0))
    _sampled(fixture, "ar_greedy", w, v, shape, labels)
    if name == "var_teacher":
        fixture.cases["ar_sample"] = {"g_seed": seed, "cfg": 1.5, "top_k": 5, "top_p": 0.9}
        _sampled(fixture, "ar_sample", w, v, shape, labels)
        places = [(0, 3), (1, 2), (1, 3), (2, 3)]
        greedy = fixture.cases["ar_greedy"]
        fixture.cases["intermediate_sample"] = [{"start_t": a, "end_point": b, **greedy} for a, b in places]
        for number, case in enumerate(fixture.cases["intermediate_sample"]):
            _intermediate(fixture, number, case, w, v, shape, tokens, labels)
    return fixture


def _scale(
    w: Weights,
    v: Weights,
    shape: slow.Shape,
    tokens: Tensor,
    labels: Tensor,
    k: int,
    cfg: float,
    unmasked: int = 0,
) -> tuple[Tensor, Tensor]:
    """Raw logits of scale k (conditional, then unconditional) and the guided ones."""
    both = [
        slow.teacher(w, v, shape, tokens, y, k + 1, unmasked)
        for y in (labels, torch.full_like(labels, CLASSES))
    ]
    place = slow.bounds(SIDES, k)
    return torch.cat([t[:, place] for t in both]), slow.guided(both[0], both[1], SIDES, cfg)[:, place]


def _sampled(
    fixture: Recording, name: str, w: Weights, v: Weights, shape: slow.Shape, labels: Tensor
) -> None:
    case, tokens = fixture.cases[name], torch.zeros(B, sum(p * p for p in SIDES), dtype=torch.long)
    rng = random.Random(case.get("g_seed", 0))
    for k in range(len(SIDES)):
        raw, logits = _scale(w, v, shape, tokens, labels, k, case["cfg"])
        kept = _kept(fixture, logits, case)
        chosen = largest(logits, fixture.margins) if case["top_k"] == 1 else draw(kept, rng)
        tokens[:, slow.bounds(SIDES, k)] = chosen
        for quantity, value in (("raw", raw), ("cfg", logits), ("filtered", kept)):
            fixture.out(f"{name}.logits_{quantity}.s{k}", value)
        fixture.out(f"{name}.idx.s{k}", chosen)
    fixture.out(f"{name}.img", _to_unit(_image(v, slow.lookup(v, tokens))))


def _intermediate(
    fixture: Recording,
    number: int,
    case: dict[str, Any],
    w: Weights,
    v: Weights,
    shape: slow.Shape,
    tokens: Tensor,
    labels: Tensor,
) -> None:
    """As released: the prefix without a mask. The image is of the scales that are known by then."""
    tokens, stop = tokens.clone(), case["end_point"]
    for k in range(case["start_t"], stop):
        _, logits = _scale(w, v, shape, tokens, labels, k, case["cfg"], case["start_t"])
        tokens[:, slow.bounds(SIDES, k)] = largest(logits, fixture.margins)
        fixture.out(f"inter{number}.logits_cfg.s{k}", logits)
        fixture.out(f"inter{number}.idx.s{k}", tokens[:, slow.bounds(SIDES, k)])
    codes = slow.lookup(v, tokens[:, : slow.data_tokens(SIDES, stop)])
    fixture.out(f"inter{number}.sequence", codes)
    image = slow.image_of(v, _DECODER, slow.f_hat(v, SIDES, codes, stop))
    fixture.out(f"inter{number}.img", _to_unit(image))


def _student(made: dict[str, dict[str, Tensor]], seed: int) -> Recording:
    config = {**_CONFIG, "seed": seed, "model": _facts(_VAR)}
    fixture = Recording("var_dd", "The student.", config, ("var_vqvae", "var_dd"))
    v, w, shape = made["var_vqvae"], made["var_dd"], shape_of(_VAR)
    codebook, tokens, labels, noise = (
        v["quantize.embedding.weight"], _tokens(seed), _labels(seed), _noise(seed).double()
    )  # fmt: skip
    _give_tokens(fixture, tokens)
    fixture.given("labels", labels)
    fixture.given("noise", noise)
    data = slow.lookup(v, tokens)
    groups = {f"t{t}": [t] * B for t in range(len(SIDES))} | {"mixed": [2, 0]}
    for name, steps in groups.items():
        x = noise.clone()
        for b, step in enumerate(steps):
            known = slow.data_tokens(SIDES, step)
            x[b, :known] = data[b, :known]
        embeddings, logits = slow.student(w, shape, x, labels, steps)
        final_tokens, final_logits = embeddings.clone(), logits.clone()
        for b, step in enumerate(steps):
            for i in range(slow.data_tokens(SIDES, step)):
                final_tokens[b, i] = x[b, i]
                final_logits[b, i] = -math.inf
                final_logits[b, i, nearest(codebook, x[b, i], fixture.margins)] = 0.0
        for quantity, value in (("x_t", x), ("tokens", embeddings), ("logits", logits)):
            fixture.out(f"{name}.{quantity}", value)
        fixture.out(f"{name}.final_tokens", final_tokens)
        fixture.out(f"{name}.final_logits", final_logits)
        for split in range(len(SIDES) + 1) if name != "mixed" else ():
            chosen = slow.jump(w, codebook, shape, x, labels, steps[0], split, fixture.margins)
            fixture.out(f"{name}.final_seq.split{split}", chosen)
    fixture.cases = {"mixed_t": groups["mixed"], "fewstep": []}
    for number, (t_list, split) in enumerate([([0], 2), ([0, 1], 2), ([0, 2], 1), ([0, 1, 2], 3)]):
        fixture.cases["fewstep"].append({"t_list": t_list, "split_t": split})
        x = noise
        for j, t in enumerate(t_list):
            known = slow.data_tokens(SIDES, t)
            x = torch.cat([x[:, :known], noise[:, known:]], 1)
            x = slow.jump(w, codebook, shape, x, labels, t, split, fixture.margins)
            fixture.out(f"few{number}.seq.step{j}", x)
        fixture.out(f"few{number}.img", _to_unit(_image(v, x)))
    return fixture


def _hybrid(made: dict[str, dict[str, Tensor]], seed: int) -> Recording:
    """Algorithm 4 with a greedy teacher: as released, and `causal.` as the paper has it."""
    config = {**_CONFIG, "seed": seed, "student": _facts(_VAR), "teacher": _facts(_VAR)}
    fixture = Recording("var_hybrid", "Algorithm 4.", config, ("var_vqvae", "var_dd", "var_teacher"))
    fixture.given("labels", _labels(seed))
    fixture.given("noise", _noise(seed))
    settings = {"cfg": 2.0, "top_k": 1, "top_p": 0.95}
    fixture.cases["cases"] = [
        {"t_teacher_start": start, "t_list": [0, stop], "split_t": split, **settings}
        for start, stop, split in ((0, 2, 2), (1, 2, 3), (2, 3, 1))
    ]
    for number, case in enumerate(fixture.cases["cases"]):
        for variant, unmasked in (("", case["t_teacher_start"]), ("causal.", 0)):
            _hybrid_case(fixture, f"case{number}.{variant}", case, made, seed, unmasked)
    return fixture


def _hybrid_case(
    fixture: Recording,
    prefix: str,
    case: dict[str, Any],
    made: dict[str, dict[str, Tensor]],
    seed: int,
    unmasked: int,
) -> None:
    v, student, shape = made["var_vqvae"], made["var_dd"], shape_of(_VAR)
    codebook, labels, noise = v["quantize.embedding.weight"], _labels(seed), _noise(seed).double()
    start, stop, split = case["t_teacher_start"], case["t_list"][1], case["split_t"]
    tokens = torch.zeros(noise.shape[:2], dtype=torch.long)
    if start:
        first = slow.jump(student, codebook, shape, noise, labels, 0, split, fixture.margins)
        tokens = nearest(codebook, first, fixture.margins)
        if not prefix.endswith("causal."):
            fixture.out(f"{prefix}dd_first", first)
            fixture.out(f"{prefix}dd_first_quant", slow.lookup(v, tokens))
    for k in range(start, stop):
        _, logits = _scale(made["var_teacher"], v, shape, tokens, labels, k, case["cfg"], unmasked)
        tokens[:, slow.bounds(SIDES, k)] = largest(logits, fixture.margins)
    known = slow.data_tokens(SIDES, stop)
    x = torch.cat([slow.lookup(v, tokens[:, :known]), noise[:, known:]], 1)
    fixture.out(f"{prefix}teacher_seq", x[:, :known])
    if stop < len(SIDES):
        x = slow.jump(student, codebook, shape, x, labels, stop, split, fixture.margins)
    fixture.out(f"{prefix}final_seq", x)
    fixture.out(f"{prefix}img", _to_unit(_image(v, x)))
