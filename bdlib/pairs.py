"""Target, tokenizer and (where there is one) drafter, by name or from any two model folders.

``load_pair("smollm2")`` is the embedded pair's target, fetched once by ``python -m bdlib fetch`` and
read offline. ``load_pair("paper")`` is the pair of the BudgetDraft paper (arXiv 2606.00144). Any other
target and drafter are given as Hugging Face hub ids or local folders; they must share a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from bdlib.transformer import Decoder

PAPER_PAIR = ("NousResearch/Yarn-Llama-2-7b-128k", "JackFram/llama-68m")
NAMES = ("smollm2", "paper")
WEIGHT_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*", "*.txt")


@dataclass(frozen=True)
class Pair:
    """What decoding needs.

    Attributes
    ----------
    name
        The name it was loaded by, or ``target + drafter``.
    drafter
        A second model with the same vocabulary, or ``None``.
    stop_tokens
        Ids that end a text for this target.
    scaling
        How positions were stretched, for figures: ``"none"`` or ``"YaRN x2"``.
    """

    name: str
    target: Decoder
    drafter: Decoder | None
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    stop_tokens: frozenset[int]
    scaling: str


def load_pair(
    name: str = "smollm2",
    *,
    target: str | Path | None = None,
    drafter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    context: int | None = None,
    pack: bool = True,
) -> Pair:
    """Load a pair.

    Parameters
    ----------
    name
        ``"smollm2"`` or ``"paper"``; ignored when ``target`` is given.
    target, drafter
        Hub ids or folders. A drafter alone is paired with the target of ``name``.
    device
        ``"auto"`` takes the GPU when there is one.
    dtype
        ``"auto"``, ``"bfloat16"``, ``"float32"``, ``"float64"`` or ``"float16"`` (GPU only). Auto is
        bfloat16 where the device computes in it, else float32.
    context
        Longest sequence, in tokens. If the target was made for less, it is stretched by YaRN by the
        smallest whole factor that reaches it; SmolLM2 accepts at most factor 2 (16,384 tokens).

    Raises
    ------
    ValueError
        Unknown name, device or dtype; missing or damaged files; different vocabularies; a context
        beyond what the target can be stretched to.
    """
    from bdlib.transformer import Decoder, DecoderConfig

    if target is None:
        if name not in NAMES:
            raise ValueError(
                f"unknown pair {name!r}; allowed: {', '.join(NAMES)}, or target= and drafter= with"
                " hub ids or folders"
            )
        target = PAPER_PAIR[0] if name == "paper" else _smollm2()
        if name == "paper" and drafter is None:
            drafter = PAPER_PAIR[1]
        label = name if drafter is None or name == "paper" else f"{name} + {drafter}"
    else:
        label = str(target) if drafter is None else f"{target} + {drafter}"
    where = _device(device)
    kind = _dtype(dtype, where)

    folder = _folder(target)
    drafter_folder = None if drafter is None else _folder(drafter)
    config = DecoderConfig.read(folder)
    tokenizer = _tokenizer(folder)
    if drafter_folder is not None:
        # A damaged one is told before the tokenizer trips over it.
        DecoderConfig.read(drafter_folder)
        if (drafter_folder / "tokenizer_config.json").is_file():
            check_vocabularies(tokenizer.get_vocab(), _tokenizer(drafter_folder).get_vocab())

    factor = None
    if context is not None and context > config.max_positions:
        factor = -(-context // config.max_positions)
        if factor > 2 or config.rope["rope_type"] != "default":
            raise ValueError(
                f"context {context} is beyond the model's positions: {config.max_positions},"
                f" or {2 * config.max_positions} with YaRN where the model is not stretched already"
            )
    loaded = Decoder.load(folder, where, kind, factor, pack)
    second = None
    if drafter_folder is not None:
        second = Decoder.load(drafter_folder, where, kind, None, pack)
        # A drafter works at the target's positions, beyond those it was made for if need be, as the
        # paper's does (2,048 against 16K): its sparse view never holds that many entries at once.
        reach = max(loaded.config.max_positions, second.config.max_positions)
        second.config = replace(second.config, max_positions=reach)
        sizes = loaded.config.vocab_size, second.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"vocabularies differ: the target's head has {sizes[0]} rows, the drafter's"
                f" {sizes[1]}; the first row without a counterpart is {min(sizes)}"
            )
    stops = set(loaded.config.eos_token_ids)
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    scaling = "none" if factor is None else f"YaRN x{factor}"
    return Pair(label, loaded, second, tokenizer, where, kind, frozenset(stops), scaling)


def check_vocabularies(target: Mapping[str, int], drafter: Mapping[str, int]) -> None:
    """Raise ``ValueError`` unless both map the same tokens to the same ids."""
    if target == drafter:
        return
    by_id = [{i: t for t, i in vocabulary.items()} for vocabulary in (target, drafter)]
    ids = sorted(set(by_id[0]) | set(by_id[1]))
    first = next(i for i in ids if by_id[0].get(i) != by_id[1].get(i))
    raise ValueError(
        f"vocabularies differ: the target has {len(target)} tokens, the drafter {len(drafter)};"
        f" the first difference is token {first}: {by_id[0].get(first)!r} against"
        f" {by_id[1].get(first)!r}"
    )


def _smollm2() -> Path:
    from bdlib import assets

    return assets.model_folder("smollm2")


def _folder(source: str | Path) -> Path:
    """A local folder as it is; a hub id through the hub's own cache (downloaded if need be)."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    text = str(source)
    if path.is_absolute() or text.startswith(".") or text.count("/") != 1:
        raise ValueError(f"no model folder at {text!r} (and it is not a hub id, 'owner/name')")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        try:
            found = Path(snapshot_download(text, allow_patterns=list(WEIGHT_PATTERNS)))
            if not list(found.glob("*.safetensors")):  # older repositories have only these
                found = Path(snapshot_download(text, allow_patterns=["pytorch_model*", "*.json"]))
        except LocalEntryNotFoundError:
            raise ValueError(
                f"model {text!r} is not in the hub cache and the hub is out of reach"
            ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"model {text!r} could not be fetched: {error}") from error
    return found


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"the tokenizer of {folder} cannot be read: {first}") from error


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; allowed: auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} asked for, but no GPU is usable here")
    return device


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices natively (AVX512-BF16, AMX or Arm BF16)."""
    import torch

    available = torch.backends.mkldnn.is_available()
    return available and torch.ops.mkldnn._is_mkldnn_bf16_supported() and _native_bfloat16()


def _native_bfloat16() -> bool:
    # oneDNN also accepts bfloat16 on plain AVX512, by emulation that is slower than float32.
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf8", errors="replace")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        half = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bfloat16()
        return torch.bfloat16 if half else torch.float32
    allowed = ("bfloat16", "float32", "float64", "float16")
    if name not in allowed:
        raise ValueError(f"unknown dtype {name!r}; allowed: auto, {', '.join(allowed)}")
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype 'float16' is for GPUs; on CPU use bfloat16 or float32")
    return getattr(torch, name)
