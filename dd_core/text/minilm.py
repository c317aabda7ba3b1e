"""MiniLM: a BERT of six small layers, in plain torch.

Blocks normalise after they add: x ← LN(x + attention(x)); x ← LN(x + W2 gelu(W1 x)). Prompts are
encoded without padding, one by one or by equal length, so attention needs no mask.

Shapes: B prompts of one length, n positions, N state dimension.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from unicodedata import category, name

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core.errors import WeightsError
from dd_core.models.adapters import Adapted, Name, adapt
from dd_core.text.config import MiniLMConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MATRIX, _SCALE = ".weight", ".scale"
# Where Unicode's name is not what people see.
_CALLED = {"❤": "red heart", "♥": "red heart", "☺": "smiling face", "☀": "sun", "☁": "cloud", "⭐": "star"}


class _Layer(nn.Module):
    def __init__(self, cfg: MiniLMConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.query, self.key, self.value = (nn.Linear(cfg.dim, cfg.dim) for _ in range(3))
        self.out = nn.Linear(cfg.dim, cfg.dim)
        self.attention_norm = nn.LayerNorm(cfg.dim, cfg.norm_eps)
        self.up, self.down = nn.Linear(cfg.dim, cfg.hidden), nn.Linear(cfg.hidden, cfg.dim)
        self.norm = nn.LayerNorm(cfg.dim, cfg.norm_eps)

    def forward(self, x_BnN: Tensor) -> Tensor:
        q, k, v = (
            f(x_BnN).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.attention_norm(x_BnN + self.out(seen))
        return self.norm(x + self.down(F.gelu(self.up(x))))  # type: ignore[no-any-return]


class MiniLM(nn.Module):
    """Word pieces → states. `kind` is BERT's embedding of a first sentence; there is no second one."""

    def __init__(self, cfg: MiniLMConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.words = nn.Embedding(cfg.vocabulary, cfg.dim)
        self.places = nn.Embedding(cfg.length, cfg.dim)
        self.kind = nn.Parameter(torch.zeros(cfg.dim))
        self.norm = nn.LayerNorm(cfg.dim, cfg.norm_eps)
        self.layers = nn.ModuleList(_Layer(cfg) for _ in range(cfg.layers))

    def forward(self, pieces_Bn: Tensor) -> Tensor:
        """`[B, n]` int64, n ≤ `cfg.length` → states `[B, n, N]`."""
        places = self.places.weight[: pieces_Bn.shape[1]]
        x = self.norm(self.words(pieces_Bn) + places + self.kind)
        for layer in self.layers:
            x = layer(x)
        return x  # type: ignore[no-any-return]


def adapt_minilm(state: Mapping[str, Tensor], length: int, source: str = "MiniLM") -> Adapted:
    """A BERT checkpoint's keys → ours; the table of places keeps its first `length` rows.

    Raises:
        WeightsError: a key that is not BERT's.
    """
    at = r"encoder\.layer\.(\d+)\."
    ends = r"\.(weight|bias)"
    rules: dict[str, Name] = {
        r"embeddings\.word_embeddings\.weight": "words.weight",
        r"embeddings\.position_embeddings\.weight": lambda _, v: {"places.weight": v[:length].contiguous()},
        r"embeddings\.token_type_embeddings\.weight": lambda _, v: {"kind": v[0].contiguous()},
        r"embeddings\.LayerNorm" + ends: r"norm.\1",
        at + r"attention\.self\.(query|key|value)" + ends: r"layers.\1.\2.\3",
        at + r"attention\.output\.dense" + ends: r"layers.\1.out.\2",
        at + r"attention\.output\.LayerNorm" + ends: r"layers.\1.attention_norm.\2",
        at + r"intermediate\.dense" + ends: r"layers.\1.up.\2",
        at + r"output\.dense" + ends: r"layers.\1.down.\2",
        at + r"output\.LayerNorm" + ends: r"layers.\1.norm.\2",
    }
    unused = {
        r"embeddings\.position_ids": "a running number",
        r"pooler\..*": "of sentences, not of their words",
    }
    return adapt(state, rules, unused, source)


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As a bundle stores it: every matrix as int8, with a scale a row in float16.

    States move by 3.0% of their size. Models are trained on the moved ones.
    """
    found = dict(state)
    for key, value in state.items():
        if value.ndim == 2:
            matrix = value.float()
            scale = (matrix.abs().amax(1, keepdim=True) / 127).clamp(min=1e-7).half()
            found[key] = (matrix / scale.float()).round().clamp(-127, 127).to(torch.int8)
            found[_scale_of(key)] = scale
    return found


def unpacked(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The inverse of `packed`, floats in float32. A matrix may be no int8, as in older bundles.

    Raises:
        WeightsError: a matrix of int8 without its scales, or scales without their matrix.
    """
    others = {k: v for k, v in state.items() if v.dtype != torch.int8 and not k.endswith(_SCALE)}
    found = {k: v.float() if v.is_floating_point() else v for k, v in others.items()}
    rounded = [k for k, v in state.items() if v.dtype == torch.int8]
    scaled = [k.removesuffix(_SCALE) + _MATRIX for k in state if k.endswith(_SCALE)]
    for key in dict.fromkeys([*rounded, *scaled]):
        matrix, scale = state.get(key), state.get(_scale_of(key))
        right = matrix is not None and matrix.dtype == torch.int8 and matrix.ndim == 2
        if matrix is None or scale is None or not right or scale.shape != (len(matrix), 1):
            raise WeightsError(f"{source}: needs {key} of int8 and {_scale_of(key)} for each row", param=key)
        found[key] = matrix.float() * scale.float()
    return found


def _scale_of(matrix: str) -> str:
    """Name of a matrix's scales: `words.weight` → `words.scale`."""
    return matrix.removesuffix(_MATRIX) + _SCALE


def read_tokenizer(data: bytes, cfg: MiniLMConfig, source: str) -> Tokenizer:
    """The word pieces of a `tokenizer.json`, cut at `cfg.length`, never padded.

    Raises:
        WeightsError: not a tokenizer, or one with pieces that the encoder has no row for.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_padding()
        tokenizer.enable_truncation(cfg.length)
        pieces = tokenizer.encode("a picture").ids  # some only fail when they are used,
        longest = tokenizer.encode("a red cat, a picture " * cfg.length).ids  # some when they truncate
    except BaseException as error:
        # The library raises bare exceptions, and its panics are no `Exception`.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise WeightsError(f"{source}: not a tokenizer: {error}", param="tokenizer.json") from error
    largest = max([*tokenizer.get_vocab(with_added_tokens=True).values(), *pieces, *longest], default=-1)
    if not 0 <= largest < cfg.vocabulary:
        raise WeightsError(
            f"{source}: pieces are numbered to {largest}, the encoder has {cfg.vocabulary}",
            param="tokenizer.json",
        )
    if not 0 < len(pieces) <= cfg.length or len(longest) > cfg.length:
        raise WeightsError(
            f"{source}: two words become {len(pieces)} pieces, the encoder takes 1 to {cfg.length}",
            param="tokenizer.json",
        )
    return tokenizer


def spoken(prompt: str) -> str:
    """The prompt with every emoji and other symbol as its name: the vocabulary has none of them."""
    words = [_CALLED.get(c) or name(c, "").lower() if category(c) == "So" else None for c in prompt]
    return "".join(c if word is None else f" {word} " for c, word in zip(prompt, words, strict=True))


class MiniLMStates:
    """Prompts' states, by the module and the tokenizer. Call it for one prompt: `[n, N]` float32."""

    def __init__(self, module: MiniLM, tokenizer: Tokenizer) -> None:
        self.module, self.tokenizer = module, tokenizer

    @torch.inference_mode()
    def __call__(self, prompt: str) -> Tensor:
        return self._of([self._pieces(prompt)])[0]

    @torch.inference_mode()
    def many(self, prompts: Sequence[str], batch: int = 256) -> list[Tensor]:
        """States of many prompts, encoded together by length: for training.

        The last bits depend on what is encoded together; a server uses one at a time.
        """
        by_length: dict[int, list[int]] = defaultdict(list)
        pieces = [self._pieces(p) for p in prompts]
        for i, p in enumerate(pieces):
            by_length[len(p)].append(i)
        found: dict[int, Tensor] = {}
        for group in by_length.values():
            for start in range(0, len(group), batch):
                part = group[start : start + batch]
                found |= zip(part, self._of([pieces[i] for i in part]), strict=True)
        return [found[i] for i in range(len(prompts))]

    def _pieces(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(spoken(prompt)).ids
        return ids

    def _of(self, pieces: list[list[int]]) -> Tensor:
        device = self.module.words.weight.device
        return self.module(torch.tensor(pieces, dtype=torch.long, device=device)).float()  # type: ignore[no-any-return]
