"""LlamaGen's fixtures, computed by `tests.conformance.naive_llamagen` on random weights.

Shapes: B batch, L tokens, P condition positions, C code dimension, V codebook size, T text positions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dd_core.models.config import LlamaGenConfig, VQConfig
from dd_core.models.llamagen import LlamaGenStudent, LlamaGenTeacher
from dd_core.models.vq import VQTokenizer
from tests.conformance import naive_llamagen as slow
from tests.conformance.naive import (
    Weights,
    apply,
    double,
    draw,
    keep_llamagen,
    largest,
    nearest,
    pointwise,
    softmax,
)
from tests.conformance.recording import Recording, integers, normal, redraw
from tests.upstream import reference_state

GRID, B, V, C, CLASSES = 3, 2, 8, 4, 7
L = GRID * GRID
LEVELS, BLOCKS, Z = 2, 0, 4
TEXT, TEXT_DIM, LENGTHS = 5, 6, (2, 5)
_VQ = VQConfig(V, C, Z, 32, (1,) * LEVELS, BLOCKS)
_CLASS = LlamaGenConfig(2, 2, 8, V, C, GRID, CLASSES, hidden_multiple=8)
_TEXT = replace(_CLASS, text_tokens=TEXT, text_dim=TEXT_DIM)
_CONFIG = {
    "vq": {
        "codebook_size": V,
        "codebook_embed_dim": C,
        "z_channels": Z,
        "ch": 32,
        "ch_mult": [1] * LEVELS,
        "latent": GRID,
        "num_res_blocks": BLOCKS,
        "codebook_l2_norm": True,
    },
    "B": B,
}
_SHAPE = slow.Shape(GRID, _CLASS.heads, _CLASS.layers)
# Position by position: the tokens so far → conditional and unconditional logits of the next one.
Next = Callable[[Tensor], tuple[Tensor, Tensor]]


def weights(seed: int) -> dict[str, dict[str, Tensor]]:
    """State dicts with the reference's keys, by the name of their file."""
    models = {
        "lg_vq": VQTokenizer(_VQ),
        "lg_gpt_c2i": LlamaGenTeacher(_CLASS),
        "lg_gpt_t2i": LlamaGenTeacher(_TEXT),
        "lg_dd": LlamaGenStudent(_CLASS),
    }
    states = {}
    for place, (name, model) in enumerate(models.items()):
        redraw(model, 100 * seed + 50 + place)
        states[name] = reference_state(model)
    # 256 KiB of zeros that nobody reads: a few stand for them.
    states["lg_vq"]["quantize.codebook_used"] = torch.zeros(8)
    return states


def fixtures(seed: int) -> tuple[list[Recording], dict[str, dict[str, Tensor]]]:
    """All of the family's fixtures and the weights they use."""
    states = weights(seed)
    made = {name: double(state) for name, state in states.items()}
    recordings = [
        _tokenizer(made["lg_vq"], seed),
        _class_teacher(made, seed),
        _text_teacher(made, seed),
        _filter(seed),
        _student(made, seed),
        _hybrid(made, seed),
    ]
    return recordings, states


def _facts(cfg: LlamaGenConfig, **more: Any) -> dict[str, Any]:
    facts = {
        "vocab_size": V,
        "num_classes": CLASSES,
        "multiple_of": cfg.hidden_multiple,
        "norm_eps": cfg.norm_eps,
        "rope_base": 10000,
        "n_kv_head": None,
        "dim": cfg.dim,
        "n_layer": cfg.layers,
        "n_head": cfg.heads,
        "block_size": L,
        "cls_token_num": cfg.prefix,
        "model_type": "t2i" if cfg.text_dim else "c2i",
    }
    return facts | ({"caption_dim": TEXT_DIM} if cfg.text_dim else {}) | more


def _tokens(seed: int) -> Tensor:
    return integers(V, (B, L), 7000 + seed)


def _labels(seed: int) -> Tensor:
    return integers(CLASSES, (B,), 7100 + seed)


def _noise(seed: int) -> Tensor:
    return normal((B, L, C), 7200 + seed)


def _codebook(q: Weights) -> Tensor:
    return slow.unit(q["quantize.embedding.weight"])


def _image(q: Weights, codes_BLC: Tensor) -> Tensor:
    """Not clamped."""
    return apply(q, slow.decoder(LEVELS, BLOCKS), pointwise(q, "post_quant_conv", slow.image_grid(codes_BLC)))


def _tokenizer(q: Weights, seed: int) -> Recording:
    fixture = Recording("lg_vq", "The VQ tokenizer.", {**_CONFIG, "seed": seed}, ("lg_vq",))
    codebook, tokens = _codebook(q), _tokens(seed)
    embed, pixels = normal((B, C, GRID, GRID), 7300 + seed), GRID * 2 ** (LEVELS - 1)
    image = torch.tanh(normal((B, 3, pixels, pixels), 7400 + seed))
    fixture.given("idx", tokens)
    fixture.given("embed", embed)
    fixture.given("img", image)
    fixture.out("codebook", codebook)
    fixture.out("quant_from_idx", slow.image_grid(codebook[tokens]))
    fixture.out("img", _image(q, codebook[tokens]))
    fixture.out("img_from_embed", _image(q, embed.double().flatten(2).transpose(1, 2)))
    h = pointwise(q, "quant_conv", apply(q, slow.encoder(LEVELS, BLOCKS), image.double()))
    found = nearest(codebook, slow.unit(h.flatten(2).transpose(1, 2)), fixture.margins)
    fixture.out("enc_h", h)
    fixture.out("enc_idx", found)
    fixture.out("enc_quant", slow.image_grid(codebook[found]))
    fixture.out("img_rec", _image(q, codebook[found]))
    return fixture


def _kept(fixture: Recording, logits: Tensor, case: dict[str, Any]) -> Tensor:
    rows = (logits / case.get("temperature", 1.0)).reshape(-1, logits.shape[-1]).tolist()
    kept = [keep_llamagen(row, case.get("top_k", 0), case.get("top_p", 1.0), fixture.margins) for row in rows]
    return torch.tensor(kept, dtype=torch.float64).reshape(logits.shape)


def _filter(seed: int) -> Recording:
    """Logits in steps of 1/2 tie exactly in any precision."""
    fixture = Recording("lg_filter", "top-k, then top-p; −inf outside.")
    logits = {"logits": 2 * normal((4, V), 7500 + seed)}
    logits["logits_ties"] = (logits["logits"] * 2).round() / 2
    settings = [(0, 1.0), (5, 1.0), (0, 0.9), (7, 0.6), (1, 0.5), (0, 1e-6)]
    cases = [{"top_k": k, "top_p": p, "input": "in.logits"} for k, p in settings]
    ties = {"top_k": 4, "top_p": 1.0, "input": "in.logits_ties"}
    for name, value in logits.items():
        fixture.given(name, value)
    for name, case in [*((f"case{i}", c) for i, c in enumerate(cases)), ("ties", ties)]:
        given = logits[str(case["input"]).removeprefix("in.")].double()
        fixture.out(f"{name}.filtered", _kept(fixture, given, case))
    fixture.cases = {"cases": cases, "ties": ties}
    return fixture


def _generate(
    fixture: Recording, name: str, case: dict[str, Any], following: Next, tokens: Tensor, stop: int
) -> Tensor:
    """Token by token from a prefix; the whole sequence is computed anew for each."""
    rng, made, kept = random.Random(case.get("torch_manual_seed", 0)), [], []
    greedy = not case.get("sample_logits", True) or case["top_k"] == 1
    start, interval = tokens.shape[1], case.get("cfg_interval", -1)
    for step in range(start, stop):
        conditional, free = following(tokens)
        # The interval counts the steps after the first token.
        guided = case["cfg_scale"] > 1 and not (interval > -1 and step - 1 > interval)
        logits = slow.guided(conditional, free, case["cfg_scale"]) if guided else conditional
        made.append(logits)
        kept.append(_kept(fixture, logits, case))
        chosen = largest(logits, fixture.margins) if greedy else draw(kept[-1], rng)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
    fixture.out(f"{name}.logits", torch.stack(made, 1))
    if "max_new_tokens" in case:
        fixture.out(f"{name}.probs", softmax(torch.stack(kept, 1)))
    fixture.out(f"{name}.idx", tokens.int())
    return tokens


def _case(scale: float, *, sampled: int = 0, **more: Any) -> dict[str, Any]:
    case = {"max_new_tokens": L, "cfg_scale": scale, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    case["sample_logits"] = bool(sampled)
    return case | ({"torch_manual_seed": sampled} if sampled else {}) | more


def _class_teacher(made: dict[str, dict[str, Tensor]], seed: int) -> Recording:
    config = {**_CONFIG, "seed": seed, "model": _facts(_CLASS)}
    fixture = Recording("lg_gpt_c2i", "A teacher of classes.", config, ("lg_vq", "lg_gpt_c2i"))
    w, q, tokens, labels = made["lg_gpt_c2i"], made["lg_vq"], _tokens(seed), _labels(seed)
    starts = slow.class_start(w, labels), slow.class_start(w, torch.full_like(labels, CLASSES))
    fixture.given("idx", tokens)
    fixture.given("labels", labels)
    forced, free = (slow.teacher(w, _SHAPE, start, tokens[:, :-1]) for start in starts)
    fixture.out("logits", forced)
    fixture.out("logits_uncond", free)
    fixture.out("logits_cfg", slow.guided(forced, free, 2.0))
    fixture.out("cached_logits", forced)
    fixture.out("freqs_cis", slow.as_pairs(slow.rotations(_SHAPE, _CLASS.head_dim)))
    fixture.cases = {
        "greedy": _case(2.0),
        "greedy_topk1": _case(2.0, top_k=1, sample_logits=True),
        "greedy_interval": _case(2.0, cfg_interval=3),
        "greedy_nocfg": _case(1.0),
        "sampled": _case(1.75, sampled=seed + 1, temperature=0.9, top_k=5, top_p=0.95),
    }

    def following(known: Tensor) -> tuple[Tensor, Tensor]:
        conditional, unconditional = (slow.teacher(w, _SHAPE, start, known)[:, -1] for start in starts)
        return conditional, unconditional

    for name, case in fixture.cases.items():
        drawn = _generate(fixture, name, case, following, tokens[:, :0], L)
        if name == "greedy":
            fixture.out("greedy.img", _image(q, _codebook(q)[drawn]))
    fixture.cases["intermediate_generate"] = [
        {"t_start": a, "t_end": b, "cfg_scale": 2.0, "top_k": 1} for a, b in ((1, 3), (4, L))
    ]
    for number, case in enumerate(fixture.cases["intermediate_generate"]):
        _generate(fixture, f"inter{number}", case, following, tokens[:, : case["t_start"]], case["t_end"])
    return fixture


def _text_teacher(made: dict[str, dict[str, Tensor]], seed: int) -> Recording:
    config = {**_CONFIG, "seed": seed, "model": _facts(_TEXT), "t2i_cfg": 7.5}
    fixture = Recording("lg_gpt_t2i", "A teacher of texts.", config, ("lg_vq", "lg_gpt_t2i"))
    w, q, tokens = made["lg_gpt_t2i"], made["lg_vq"], _tokens(seed)
    shape = replace(_SHAPE, prefix=TEXT)
    # An encoder's output is right-padded, and what it says at the padding is noise.
    states = normal((B, TEXT, TEXT_DIM), 7600 + seed)
    valid = torch.tensor([[int(i < n) for i in range(TEXT)] for n in LENGTHS])
    fixture.given("idx", tokens)
    fixture.given("t5_embs", states)
    fixture.given("t5_masks", valid)
    moved, mask = slow.move_left(states.double(), valid)
    nothing = w["cls_embedding.uncond_embedding"].expand_as(moved)
    starts = slow.text_start(w, moved), slow.text_start(w, nothing)
    allowed = slow.text_allowed(mask, TEXT + L)
    fixture.out("cond", moved)
    fixture.out("emb_masks", mask)
    fixture.out("cap_embed", starts[0])
    fixture.out("attn_mask", allowed)
    fixture.out("freqs_cis", slow.as_pairs(slow.rotations(shape, _TEXT.head_dim)))
    forced, free = (slow.teacher(w, shape, start, tokens[:, :-1], allowed) for start in starts)
    fixture.out("logits", forced)
    fixture.out("logits_uncond", free)
    fixture.out("logits_cfg", slow.guided(forced, free, 7.5))
    fixture.cases = {
        "greedy": _case(7.5),
        "greedy_nocfg": _case(1.0),
        "sampled": _case(7.5, sampled=seed + 2, top_k=5),
    }

    def following(known: Tensor) -> tuple[Tensor, Tensor]:
        conditional, unconditional = (slow.teacher(w, shape, s, known, allowed)[:, -1] for s in starts)
        return conditional, unconditional

    for name, case in fixture.cases.items():
        drawn = _generate(fixture, name, case, following, tokens[:, :0], L)
        if name == "greedy":
            fixture.out("greedy.img", _image(q, _codebook(q)[drawn]))
    return fixture


def _to_unit(image: Tensor) -> Tensor:
    return (image + 1) / 2


def _student(made: dict[str, dict[str, Tensor]], seed: int) -> Recording:
    config = {**_CONFIG, "seed": seed, "model": _facts(_CLASS, codebook_dim=C)}
    fixture = Recording("lg_dd", "The student.", config, ("lg_vq", "lg_dd"))
    q, w, codebook = made["lg_vq"], made["lg_dd"], _codebook(made["lg_vq"])
    tokens, labels, noise = _tokens(seed), _labels(seed), _noise(seed).double()
    fixture.given("idx", tokens)
    fixture.given("labels", labels)
    fixture.given("noise", noise)
    data, splits = codebook[tokens], [0, 1, 5, L]
    groups = {f"t{t}": [t] * B for t in (0, 1, 4, L - 1)} | {"mixed": [6, 2]}
    for name, steps in groups.items():
        x = noise.clone()
        for b, step in enumerate(steps):
            x[b, :step] = data[b, :step]
        embeddings, logits = slow.student(w, _SHAPE, x, labels, steps)
        final_tokens, final_logits = embeddings.clone(), logits.clone()
        for b, step in enumerate(steps):
            for i in range(step):
                final_tokens[b, i] = x[b, i]
                final_logits[b, i] = -math.inf
                final_logits[b, i, nearest(codebook, x[b, i], fixture.margins)] = 0.0
        for quantity, value in (("x_t", x), ("tokens", embeddings), ("logits", logits)):
            fixture.out(f"{name}.{quantity}", value)
        fixture.out(f"{name}.final_tokens", final_tokens)
        fixture.out(f"{name}.final_logits", final_logits)
        for split in splits if name != "mixed" else ():
            chosen = slow.jump(w, codebook, _SHAPE, x, labels, steps[0], split, fixture.margins)
            fixture.out(f"{name}.final_x.split{split}", chosen)
    fixture.cases = {
        "t_values": [0, 1, 4, L - 1],
        "mixed_t": groups["mixed"],
        "splits": splits,
        "fewstep": [],
    }
    for number, (t_list, split) in enumerate([([0], 5), ([0], 0), ([0, 4], 4), ([0, 5], 2), ([0, 3, 6], 4)]):
        fixture.cases["fewstep"].append({"t_list": t_list, "split_t": split})
        x = noise
        for j, t in enumerate(t_list):
            x = torch.cat([x[:, :t], noise[:, t:]], 1)
            x = slow.jump(w, codebook, _SHAPE, x, labels, t, split, fixture.margins)
            fixture.out(f"few{number}.seq.step{j}", x)
        fixture.out(f"few{number}.img", _to_unit(_image(q, x)))
    return fixture


def _hybrid(made: dict[str, dict[str, Tensor]], seed: int) -> Recording:
    config = {
        **_CONFIG,
        "seed": seed,
        "student": _facts(_CLASS, codebook_dim=C),
        "teacher": _facts(_CLASS),
    }
    fixture = Recording("lg_hybrid", "Algorithm 4, greedy.", config, ("lg_vq", "lg_dd", "lg_gpt_c2i"))
    q, student, w = made["lg_vq"], made["lg_dd"], made["lg_gpt_c2i"]
    codebook, labels, noise = _codebook(q), _labels(seed), _noise(seed).double()
    starts = slow.class_start(w, labels), slow.class_start(w, torch.full_like(labels, CLASSES))
    fixture.given("labels", labels)
    fixture.given("noise", noise)
    settings = {"cfg_scale": 2.0, "cfg_interval": -1, "temperature": 1.0, "top_k": 1, "top_p": 1.0}
    settings["sample_logits"] = True
    fixture.cases["cases"] = [
        {"teacher_start_t": start, "t_list": [0, stop], "split_t": split, **settings}
        for start, stop, split in ((0, 4, 5), (2, 5, 3), (3, L, 6))
    ]
    for number, case in enumerate(fixture.cases["cases"]):
        start, stop, split = case["teacher_start_t"], case["t_list"][1], case["split_t"]
        tokens = torch.zeros(B, 0, dtype=torch.long)
        if start:
            first = slow.jump(student, codebook, _SHAPE, noise, labels, 0, split, fixture.margins)
            tokens = nearest(codebook, first[:, :start], fixture.margins)
            fixture.out(f"case{number}.dd_first", first)
            fixture.out(f"case{number}.dd_first_idx", tokens)
        for _ in range(start, stop):
            conditional, free = (slow.teacher(w, _SHAPE, s, tokens)[:, -1] for s in starts)
            chosen = largest(slow.guided(conditional, free, case["cfg_scale"]), fixture.margins)
            tokens = torch.cat([tokens, chosen[:, None]], 1)
        fixture.out(f"case{number}.teacher_idx", tokens.int())
        x = torch.cat([codebook[tokens], noise[:, stop:]], 1)
        if stop < L:
            x = slow.jump(student, codebook, _SHAPE, x, labels, stop, split, fixture.margins)
        fixture.out(f"case{number}.final_x", x)
        fixture.out(f"case{number}.img", _to_unit(_image(q, x)))
    return fixture
