"""One compact decoder for the Llama family, fast on CPU and readable in one sitting.

It reads a Hugging Face folder of a Llama, SmolLM2, Mistral, Qwen2 or Qwen3 model, computes the same
logits as transformers (tests state the tolerance), and writes a folder that transformers loads back.
Everything that a decoder needs to know about *which* keys are attended lives in the cache
(:mod:`bdlib.cache`), so the target on its full cache and a drafter on a sparse one run the same code.

What makes it quick on CPU, measured in lesson 02:

* query, key and value projections are one matrix, and so are gate and up;
* where a compiler is there, a layer of a few tokens is three calls in C that read weights, keys and
  values once, in the order in which they lie (:mod:`bdlib.kernels.native`);
* elsewhere weights are packed once into oneDNN's blocked layout. Either way a row's result does not
  depend on how many rows are computed beside it: verifying five tokens rounds as five steps do;
* the residual stream stays in float32, so bfloat16 rounding does not pile up over layers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import mmap
import shutil
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlib.attention import FEW, causal_attention
from bdlib.kernels import native

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_TYPES = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": (
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
}
"""Each type and the settings that it needs."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and numerics of a decoder.

    Attributes
    ----------
    max_positions
        Number of positions the model may be used at, in tokens. Asking for more is an error.
    rope
        Rotary embedding: ``rope_type`` (one of :data:`ROPE_TYPES`), ``rope_theta`` and what the type
        needs, in the spelling of transformers 5 (``rope_parameters``).
    attention_bias, output_bias, mlp_bias, qk_norm
        Which biases and per-head norms the family has.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope: Mapping[str, Any]
    rms_eps: float = 1e-5
    tie_embeddings: bool = True
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise ValueError(
                f"model_type {self.model_type!r} is not supported; allowed: {sorted(ARCHITECTURES)}"
            )
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
            "num_kv_heads", "head_dim", "max_positions",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r} must be a whole number of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need it even")
        kind = self.rope.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(
                f"rope_type {kind!r} is not supported; allowed: {', '.join(ROPE_TYPES)}"
            )
        for name in ROPE_TYPES[kind]:
            if self.rope.get(name) is None:
                raise ValueError(f"rope_type {kind!r} needs {name}, which is missing")
        for name, least in (("rope_theta", 1), ("factor", 0)):
            value = self.rope.get(name, 10_000.0)
            if not isinstance(value, int | float) or not least < value < math.inf:
                raise ValueError(f"{name} {value!r} must be a number above {least}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read the dictionary of a Hugging Face ``config.json`` (transformers 4 or 5 spelling)."""
        model_type = config.get("model_type", "llama")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported; allowed: silu")
        heads = config["num_attention_heads"]
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
        rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
        positions = config["max_position_embeddings"]
        if rope["rope_type"] in ("yarn", "llama3"):
            rope.setdefault("original_max_position_embeddings", positions)
        window = config.get("sliding_window")
        if window and config.get("use_sliding_window", model_type == "mistral"):
            # Inside its window such a model is an ordinary one; beyond it we refuse.
            positions = min(positions, window)
        eos = config.get("eos_token_id")
        eos_ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
        llama_bias = bool(config.get("attention_bias", False))
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_positions=positions,
            rope=rope,
            rms_eps=config.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=True if model_type == "qwen2" else llama_bias,
            output_bias=llama_bias and model_type != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=model_type == "qwen3",
            model_type=model_type,
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=eos_ids,
        )

    @classmethod
    def read(cls, folder: str | Path) -> DecoderConfig:
        """Read the ``config.json`` of a Hugging Face folder.

        Raises
        ------
        ValueError
            If it is missing or damaged, or describes a model that this decoder is not.
        """
        file = Path(folder) / "config.json"
        if not file.is_file():
            raise ValueError(f"{folder} is not a model folder: it has no config.json")
        try:
            return cls.from_hf(json.loads(file.read_text(encoding="utf8")))
        except (
            json.JSONDecodeError,
            UnicodeDecodeError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise ValueError(f"{file} is damaged or not a decoder's: {error!r}") from error

    def to_hf(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The dictionary that :meth:`from_hf` reads and transformers accepts."""
        out: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rope_parameters": dict(self.rope),
            "rms_norm_eps": self.rms_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) or None,
            "dtype": str(dtype).removeprefix("torch."),
        }
        if self.model_type in ("llama", "qwen3"):
            out["attention_bias"] = self.attention_bias
        if self.model_type == "llama":
            out["mlp_bias"] = self.mlp_bias
        if self.model_type == "mistral":
            out["sliding_window"] = None
        return out

    def with_yarn(self, factor: float) -> DecoderConfig:
        """The same model stretched to ``factor`` times its positions by YaRN (arXiv 2309.00071)."""
        if factor <= 1:
            raise ValueError(f"YaRN factor {factor} must be above 1")
        if self.rope["rope_type"] != "default":
            raise ValueError(f"YaRN needs rope_type 'default', this is {self.rope['rope_type']!r}")
        rope = {
            "rope_type": "yarn",
            "rope_theta": self.rope["rope_theta"],
            "factor": float(factor),
            "original_max_position_embeddings": self.max_positions,
        }
        return replace(self, rope=rope, max_positions=int(self.max_positions * factor))

    def kv_bytes(self, entries: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values for ``entries`` cache entries: 2 L H_kv D entries itemsize."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * entries * dtype.itemsize


def rope_frequencies(rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Rotary frequencies ``[head_dim / 2]`` in float32 and the factor applied to cos and sin.

    ``linear`` divides positions; ``llama3`` divides low frequencies only; ``yarn`` blends between
    the two by wavelength and warms attention slightly (arXiv 2309.00071, section 3).
    """
    kind, theta = rope["rope_type"], float(rope["rope_theta"])
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if kind == "default":
        return inv_freq, 1.0
    factor = float(rope["factor"])
    if kind == "linear":
        return inv_freq / factor, 1.0
    original = int(rope["original_max_position_embeddings"])
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        turns = original * inv_freq / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return inv_freq * (blend + (1 - blend) / factor), 1.0

    def dimension(turns: float) -> float:
        """The (fractional) frequency index that makes this many turns over the original length."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(float(rope.get("beta_fast") or 32.0))
    high = dimension(float(rope.get("beta_slow") or 1.0))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    keep = 1 - ramp.clamp(0, 1)
    attention = rope.get("attention_factor") or 0.1 * math.log(factor) + 1.0
    return inv_freq / factor * (1 - keep) + inv_freq * keep, float(attention)


@functools.lru_cache(maxsize=8)
def _rotation_tables(
    rope: str, head_dim: int, positions: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines ``[positions, 1, D]``; a target and its drafter share them."""
    with torch.inference_mode(False):  # made while decoding, they must serve training too
        inv_freq, factor = rope_frequencies(json.loads(rope), head_dim)
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * inv_freq
        cos, sin = angles.cos() * factor, angles.sin() * factor
        tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return tables[0][:, None].to(device, dtype), tables[1][:, None].to(device, dtype)


def _shares(
    config: DecoderConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """By how much each head is turned, the scale of queries included, and kept: ``[H + 2 H_kv, 1]``."""
    c = config
    with torch.inference_mode(False):
        heads = torch.tensor([c.num_heads, c.num_kv_heads, c.num_kv_heads])
        parts = torch.tensor([[c.head_dim**-0.5, 1, 0], [0, 0, 1]]).repeat_interleave(heads, 1)
        turned, still = parts[..., None].to(device, dtype)
    return turned, still


@functools.cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this build and CPU run oneDNN's packed product in ``dtype`` (tried on a small one)."""
    if dtype not in (torch.bfloat16, torch.float32) or not torch.backends.mkldnn.is_available():
        return False
    try:
        ops, weight = torch.ops.mkldnn, torch.eye(32, dtype=dtype)
        if dtype == torch.bfloat16 and not ops._is_mkldnn_bf16_supported():
            return False
        packed = ops._reorder_linear_weight(weight, 8)
        return torch.equal(ops._linear_pointwise(weight, packed, None, "none", [], ""), weight)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


ROWS = 5  # a packed product of so few rows takes less time than one of a single row
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_IN_FILES: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # of embeddings that are read from files


def _glibc(function: str, *arguments: int) -> None:
    """Call a function of glibc's allocator, where there is one."""
    if sys.platform == "linux" and (call := getattr(ctypes.CDLL(None), function, None)):
        call(*arguments)


def give_back() -> None:
    """Return memory to the system: packing weights leaves 100 MB in the heap, a long prompt more."""
    _glibc("malloc_trim", 0)
    _forget_rows()


def _thresholds(pages: int, trim: int) -> None:
    """From which size on an array has pages of its own, and from how much free memory goes back."""
    _glibc("mallopt", M_MMAP_THRESHOLD, pages)
    _glibc("mallopt", M_TRIM_THRESHOLD, trim)


def _return_freed() -> None:
    """What is free goes back to the system, and from here on what is freed of 4 MB and more does at
    once: the scores of a long prompt, of ever other sizes, would leave holes of 60 MB."""
    _thresholds(1 << 22, 1 << 23)
    give_back()


@contextlib.contextmanager
def keeping_freed() -> Iterator[None]:
    """Memory that is freed inside stays with the process, for the next array.

    A training step allocates the same large arrays as the one before it. Handed back and asked for
    again, each page is cleared by the system when it is first written: a third of a step on two cores.
    """
    _thresholds(1 << 30, 1 << 30)
    try:
        yield
    finally:
        _return_freed()


def _forget_rows() -> None:
    """Drop what was read of embeddings in files; it is read again when it is asked for."""
    for mapped in _IN_FILES if sys.platform == "linux" else ():
        mapped.madvise(mmap.MADV_DONTNEED)


@functools.lru_cache(maxsize=64)
def _nothing(dims: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros ``[.., rows, width]`` to fill a product up with."""
    with torch.inference_mode(False):
        return torch.zeros(*[1] * (dims - 2), rows, width, dtype=dtype)


class Linear(nn.Module):
    """``y = x W^T + b`` with an optional packed weight for CPU inference.

    :meth:`pack` replaces the weight by oneDNN's blocked copy, the layout ``torch.compile`` uses when
    it freezes a model. On the machine of lesson 02 that is 1.4 to 1.6 times faster in bfloat16 and
    2 to 4 times in float32 than ``F.linear``, for one row as for nine. Fewer than five rows of one
    sequence are filled up with zeros: oneDNN takes another path for them, which takes a fifth longer
    and, for a single long row, sums in another order than for a row among several.

    ``in_c`` says that a few rows go through :mod:`bdlib.kernels.native`, which reads the weight as it
    is: it is not packed then, and the many rows of a prompt take 1 to 9 % longer. Where the weight was
    stored in 8 bits, :meth:`keep` has C read those, half as much.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.packed: Tensor | None = None
        self.in_c = False
        self.codes: Tensor | None = None
        self.scale: Tensor | None = None
        self.shape = (out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        packed, bias = self.packed, self.bias
        if packed is None:
            return F.linear(x, self.weight, bias)
        product = torch.ops.mkldnn._linear_pointwise.default
        rows, width = x.shape[-2], x.shape[-1]
        if rows >= ROWS or x.numel() > rows * width:
            return product(x, packed, bias, "none", [], "")
        x = torch.cat((x, _nothing(x.dim(), ROWS - rows, width, x.dtype)), -2)
        return product(x, packed, bias, "none", [], "")[..., :rows, :]

    def pack(self, rows: int = 8) -> None:
        """Pack for products with a few rows; a no-op where oneDNN has no kernel for the dtype."""
        weight = self.weight
        if weight is not None and weight.device.type == "cpu" and _can_pack(weight.dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            self.weight = None

    def keep(self, codes: Tensor, scale: Tensor) -> None:
        """Keep the whole numbers ``[out, in]`` (int8) and scales ``[out, 1]`` that the weight comes from.

        A no-op unless ``in_c``. A few rows are then computed from them: half as much to read, and more
        exact than the weight, which is their product rounded to bfloat16.
        """
        if self.in_c:
            self.codes, self.scale = codes.contiguous(), scale.float().contiguous()

    def dense(self) -> Tensor:
        """The weight ``[out, in]``, unpacked if need be (exact: packing only reorders)."""
        return self.weight.detach() if self.packed is None else self.packed.to_dense()


class Layer(nn.Module):
    """The parameters of one decoder layer; the arithmetic is in :meth:`Decoder.hidden`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = config
        self.in_c = False  # whether a few tokens go through bdlib.kernels.native
        self.attention_norm = nn.Parameter(torch.ones(c.hidden_size))
        self.mlp_norm = nn.Parameter(torch.ones(c.hidden_size))
        qkv_rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self.qkv = Linear(c.hidden_size, qkv_rows, c.attention_bias)
        self.out = Linear(c.num_heads * c.head_dim, c.hidden_size, c.output_bias)
        self.gate_up = Linear(c.hidden_size, 2 * c.intermediate_size, c.mlp_bias)
        self.down = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.q_norm = nn.Parameter(torch.ones(c.head_dim)) if c.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(c.head_dim)) if c.qk_norm else None


class Decoder(nn.Module):
    """A decoder-only transformer that attends through a cache.

    Parameters
    ----------
    config
        Shape and numerics. Parameters are uninitialised: use :meth:`load` or :meth:`random`.

    Attributes
    ----------
    reach
        Tokens of a prompt that it reads as a drafter (:class:`bdlib.drafters.ModelDrafter`); 0: all.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.reach = 0
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding
        # Token ids of the head's rows, if not all; a buffer, so that it moves with the weights.
        self.register_buffer("vocabulary", None, persistent=False)
        self._tables: tuple[Tensor, ...] | None = None
        self._eps = torch.tensor(config.rms_eps, dtype=torch.float64, device="cpu")

    # Both are asked for in every layer, and a module's own look-up of a parameter is slow.
    @property
    def device(self) -> torch.device:
        return self._parameters["embedding"].device

    @property
    def dtype(self) -> torch.dtype:
        return self._parameters["embedding"].dtype

    def weight_bytes(self) -> int:
        """Bytes of weights that one decoding step reads: every matrix once, the head included.

        In the model's dtype: what :meth:`Linear.keep` keeps in 8 bits is half of that.
        """
        matrices = [m for m in self.modules() if isinstance(m, Linear)]
        return sum(m.shape[0] * m.shape[1] for m in matrices) * self.dtype.itemsize

    # ---------------------------------------------------------------- the forward pass
    def forward(self, tokens: Tensor, cache: Any = None, last_only: bool = False) -> Tensor:
        """Logits ``[B, n, V]`` (``[B, 1, V]`` with ``last_only``) in float32 or wider.

        Parameters
        ----------
        tokens
            Token ids ``[B, n]`` that follow what the cache holds.
        cache
            A :class:`bdlib.cache.KVCache` or :class:`bdlib.cache.SparseKVCache`, extended in place.
            Without one, plain causal attention over ``tokens`` alone.
        """
        hidden = self.hidden(tokens, cache)
        return self.logits(hidden[:, -1:] if last_only else hidden)

    def logits(self, hidden: Tensor, wide: bool = True) -> Tensor:
        """Output head on the states of :meth:`hidden`: ``[B, n, C] -> [B, n, V]``.

        Without ``wide`` in the dtype of the product, for a loss that widens them piece by piece.
        """
        if self.head.in_c and native.takes(hidden):
            norm, parts = self.final_norm[None], hidden[:, :, None]
            scores = native.normed_product(self.head, norm, parts, self.config.rms_eps)
            return scores if wide else scores.to(self.dtype)
        scores = self.head(self._norm(hidden, self.final_norm))
        return scores.to(self._wide) if wide else scores

    def hidden(self, tokens: Tensor, cache: Any = None, x: Tensor | None = None) -> Tensor:
        """Residual stream after the last layer, before the final norm, ``[B, n, C]``.

        ``x`` ``[B, n, C]`` replaces the embeddings of the tokens where given. A full cache made with
        ``taps`` keeps the residual stream after those layers.
        """
        n = tokens.shape[1]
        start = 0 if cache is None else cache.length
        if cache is not None:
            cache.reserve(n)
        cos, sin = self.rotations(start, start + n)
        x = self.embed(tokens) if x is None else x  # [B, n, C]
        taps = getattr(cache, "taps", ())
        for index, layer in enumerate(self.layers):
            q, k, v = self.project(layer, x, cos, sin)
            if cache is None:
                attended = causal_attention(q, k.to(q.dtype), v)
            else:
                attended = cache.attend(index, q, k, v)
            x = self.finish(layer, x, attended)
            if index in taps:
                cache.keep_features(index, x)
        if cache is not None:
            cache.advance(n)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids ``[B, n]`` to the residual stream ``[B, n, C]``."""
        if not _IN_FILES or tokens.shape[-1] <= FEW:
            return F.embedding(tokens, self.embedding).to(self._wide)
        parts = []
        for part in tokens.split(FEW, -1):
            parts.append(F.embedding(part, self.embedding))
            _forget_rows()  # the system reads 64 kB of the file for a row
        return torch.cat(parts, -2).to(self._wide)

    def project(
        self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, H, n, D]`` (rotated, scaled), keys ``[B, H_kv, n, D]`` (rotated) and values.

        ``cos`` and ``sin`` are those of :meth:`rotations`, which hold the scale too.
        """
        c = self.config
        heads = c.num_heads, c.num_kv_heads, c.num_kv_heads
        if layer.in_c and native.takes(x):
            return native.before(layer, c, x, cos, sin).transpose(1, 2).split(heads, dim=1)
        qkv = layer.qkv(self._norm(x, layer.attention_norm))
        wide = qkv.view(*x.shape[:2], -1, c.head_dim).to(self._wide)  # [B, n, H + 2 H_kv, D]
        if layer.q_norm is not None:
            q, k, v = wide.split(heads, dim=2)
            q, k = self._norm(q, layer.q_norm, keep=True), self._norm(k, layer.k_norm, keep=True)
            wide = torch.cat((q, k, v), dim=2)
        # Rotate halves: x cos + roll(x) sin, with the sign folded into the sine table.
        rolled = wide.roll(c.head_dim // 2, -1)
        turned = wide.mul_(cos).addcmul_(rolled, sin)
        return turned.to(qkv.dtype).transpose(1, 2).split(heads, dim=1)

    def finish(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        """Add what attention ``[B, H, n, D]`` found, then the MLP, to the residual stream."""
        if layer.in_c and native.takes(x):
            return native.after(layer, self.config, x, attended)
        x = x + layer.out(attended.transpose(1, 2).reshape(*x.shape[:2], -1))
        gate, up = layer.gate_up(self._norm(x, layer.mlp_norm)).chunk(2, -1)
        return x + layer.down(F.silu(gate) * up)

    @property
    def _wide(self) -> torch.dtype:
        """float32 for half types, else the model's own dtype."""
        dtype = self.dtype
        return torch.float32 if dtype.itemsize < 4 else dtype

    def _norm(self, x: Tensor, weight: Tensor, keep: bool = False) -> Tensor:
        """RMS norm in the residual's dtype; the result in the weights' dtype unless ``keep``."""
        if x.device.type == "cpu" and not torch.is_grad_enabled():  # half of rms_norm's operations
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            square = torch.addcmul(self._eps, length, length, value=1 / x.shape[-1])
            normed = (x * square.rsqrt_()).mul_(weight)
        else:
            normed = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), self.config.rms_eps)
        return normed if keep else normed.to(self.dtype)

    def rotations(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines ``[n, H + 2 H_kv, D]`` for positions ``start`` to ``stop``.

        One product with them turns and scales what :meth:`project` makes: those of queries are scaled
        by ``D ** -0.5``, those of keys are not, and those of values are ones and zeros.

        Raises
        ------
        ValueError
            If ``stop`` is beyond the model's positions.
        """
        limit = self.config.max_positions
        if stop > limit:
            raise ValueError(
                f"position {stop} is beyond the model's {limit} positions; use a shorter context"
                " or stretch the model with YaRN (load_pair(..., context=N))"
            )
        if self._tables is None or self._tables[0].device != self.device:
            c = self.config
            rope = json.dumps(dict(c.rope), sort_keys=True)
            tables = _rotation_tables(rope, c.head_dim, limit, self.device, self._wide)
            self._tables = *tables, *_shares(c, self.device, self._wide)
        cos, sin, turned, still = self._tables
        return torch.addcmul(still, cos[start:stop], turned), sin[start:stop] * turned

    # ---------------------------------------------------------------- making, reading, writing
    @classmethod
    def random(
        cls, config: DecoderConfig, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> Decoder:
        """A decoder with random weights (for tests and toys); ``seed`` makes it repeatable."""
        generator = torch.Generator().manual_seed(seed)
        model = cls(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    std = parameter.shape[-1] ** -0.5
                    parameter.normal_(0.0, std, generator=generator)
                else:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.to(dtype).requires_grad_(False)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        yarn_factor: float | None = None,
        pack: bool = True,
    ) -> Decoder:
        """Read a Hugging Face folder (``config.json`` with safetensors or PyTorch weights).

        Parameters
        ----------
        yarn_factor
            Stretch the positions by YaRN; ``None`` leaves the model as it is.
        pack
            Pack weights for CPU inference. Turn off for training.

        Raises
        ------
        ValueError
            If the folder lacks a file, or a weight is missing, damaged or of the wrong shape.
        """
        folder = Path(folder)
        config = DecoderConfig.read(folder)
        if yarn_factor is not None:
            config = config.with_yarn(yarn_factor)
        with torch.device("meta"):
            model = cls(config)
        state = _to_fused(dict(_read_weights(folder)), config, dtype, torch.device(device))
        expected = {k: v.shape for k, v in model.state_dict().items()}
        if wrong := sorted(set(expected) ^ set(state)):
            raise ValueError(f"{folder}: missing or unexpected weights: {', '.join(wrong[:4])}")
        for key, shape in expected.items():
            if state[key].shape != shape:
                raise ValueError(
                    f"{folder}: weight {key} has shape {tuple(state[key].shape)},"
                    f" config.json says {tuple(shape)}"
                )
        model.load_state_dict(state, assign=True)
        if config.tie_embeddings:
            model.head.weight = model.embedding
        model.requires_grad_(False)
        if not pack:
            return model
        model.pack()
        if model.head.weight is not model.embedding:
            model._look_up_in(folder)
        return model

    def _look_up_in(self, folder: Path) -> None:
        """Read embeddings from the file, where they are there in the dtype and shape that is wanted.

        A packed head holds SmolLM2's embedding once already, 57 MB (one that C reads is the embedding
        itself). What is read here is in memory from the first look at it to the next :func:`give_back`.
        """
        wanted = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                entry = json.loads(stream.read(size)).get("model.embed_tokens.weight")
                if self.device.type == "cpu" and entry and entry["dtype"] == wanted.get(self.dtype):
                    # A private copy of every page, so that PyTorch may think it writable.
                    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
                    first, shape = 8 + size + entry["data_offsets"][0], self.embedding.shape
                    rows = torch.frombuffer(
                        mapped, dtype=self.dtype, count=shape.numel(), offset=first
                    )
                    self.embedding = nn.Parameter(rows.view(shape), requires_grad=False)
                    _IN_FILES.add(mapped)
                    give_back()

    def pack(self) -> Decoder:
        """Pack for CPU inference what C does not read as it is (:class:`Linear`); returns ``self``."""
        matrices = [module for module in self.modules() if isinstance(module, Linear)]
        inside = {m for layer in self.layers for m in layer.children()}
        for matrix in matrices:
            matrix.in_c = matrix not in inside and native.fits(matrix)
        for layer in self.layers:
            whole = layer.q_norm is None and self.config.head_dim % 32 == 0
            layer.in_c = whole and all(map(native.fits, layer.children()))
            for matrix in layer.children():
                matrix.in_c = layer.in_c
        for matrix in matrices:
            if not matrix.in_c:
                matrix.pack()
        for name, weight in self.named_parameters():
            if name.endswith("norm"):
                weight.data = weight.data.to(self._wide)  # in which a norm multiplies, once for all
        _return_freed()
        return self

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` that transformers loads."""
        from safetensors.torch import save_file

        from bdlib import assets

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.cpu().contiguous() for k, v in _from_fused(self)}
        with assets.replacing(folder / "model.safetensors") as scratch:
            save_file(weights, scratch, metadata={"format": "pt"})
            with assets.replacing(folder / "config.json") as config:
                text = json.dumps(self.config.to_hf(self.dtype), indent=2) + "\n"
                config.write_text(text, encoding="utf8")
                # safetensors leaves files that only their owner may read: as the umask says instead.
                shutil.copymode(config, scratch)


# -------------------------------------------------------------------- Hugging Face weight names
_NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
_MATRICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def _read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (a handle is not a mapping)
                    yield name, handle.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    if files:
        return
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{folder} has no model.safetensors and no pytorch_model.bin")
    for file in files:
        try:
            yield from torch.load(file, map_location="cpu", weights_only=True).items()
        except (RuntimeError, EOFError, OSError, AttributeError, UnpicklingError) as error:
            raise ValueError(f"{file} is damaged or holds more than weights") from error


def _to_fused(
    weights: dict[str, Tensor], config: DecoderConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    def take(*names: str) -> Tensor:
        missing = [n for n in names if n not in weights]
        if missing:
            raise ValueError(f"the checkpoint lacks the weight {missing[0]}")
        parts = [weights.pop(n) for n in names]
        try:
            whole = torch.cat(parts)
        except RuntimeError:
            shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in zip(names, parts, strict=True))
            raise ValueError(f"weights do not fit together: {shapes}") from None
        return whole.to(device, dtype)

    state = {
        "embedding": take("model.embed_tokens.weight"),
        "final_norm": take("model.norm.weight"),
    }
    state["head.weight"] = state["embedding"] if config.tie_embeddings else take("lm_head.weight")
    biased = {
        "qkv": config.attention_bias,
        "out": config.output_bias,
        "gate_up": config.mlp_bias,
        "down": config.mlp_bias,
    }
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        for name, hf_name in _NORMS.items():
            if config.qk_norm or name in ("attention_norm", "mlp_norm"):
                state[f"{ours}.{name}"] = take(f"{theirs}.{hf_name}.weight")
        for name, hf_names in _MATRICES.items():
            state[f"{ours}.{name}.weight"] = take(*(f"{theirs}.{h}.weight" for h in hf_names))
            if biased[name]:
                state[f"{ours}.{name}.bias"] = take(*(f"{theirs}.{h}.bias" for h in hf_names))
    return state


def _from_fused(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    c = model.config
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sizes = {
        "qkv": (heads, kv, kv),
        "out": (c.hidden_size,),
        "gate_up": (c.intermediate_size, c.intermediate_size),
        "down": (c.hidden_size,),
    }
    yield "model.embed_tokens.weight", model.embedding.detach()
    yield "model.norm.weight", model.final_norm.detach().to(model.dtype)
    if not c.tie_embeddings:
        yield "lm_head.weight", model.head.dense()
    for i, layer in enumerate(model.layers):
        for name, hf_name in _NORMS.items():
            if getattr(layer, name) is not None:
                norm = getattr(layer, name).detach()
                yield f"model.layers.{i}.{hf_name}.weight", norm.to(model.dtype)
        for name, hf_names in _MATRICES.items():
            matrix = getattr(layer, name)
            for kind, tensor in (("weight", matrix.dense()), ("bias", matrix.bias)):
                if tensor is not None:
                    for hf_name, part in zip(hf_names, tensor.split(sizes[name]), strict=True):
                        yield f"model.layers.{i}.{hf_name}.{kind}", part.detach()
