"""Trained drafters for other engines: transformers' assistant_model and vLLM's speculative_config.

:func:`export` writes a folder that the engine loads as it is: a plain Hugging Face model with the
target's whole vocabulary, its tokenizer, the engine's settings as JSON, and a card with the code or
the command to run. Both engines verify losslessly, and both keep the drafter's *full* cache: the
budget is bdlib's (:class:`bdlib.drafters.ModelDrafter`); what travels is the drafter.

vLLM refuses fields that it does not know only when a server starts. :func:`check_vllm` refuses them
here, with vLLM's own rules. The fields, their limits and the rules are those of vLLM 0.30.0
(``vllm.config.SpeculativeConfig``, https://docs.vllm.ai/en/stable/api/vllm/config/speculative/), the
version that the ``serving`` extra pins; a test compares them with an installed vLLM.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdlib import assets

if TYPE_CHECKING:
    from bdlib.pairs import Pair

ENGINES = ("transformers", "vllm")
VLLM_VERSION = "0.30.0"
VLLM_FILE, ASSISTANT_FILE, CARD_FILE = (
    "speculative_config.json",
    "generation_config.json",
    "README.md",
)
HUB_IDS = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "paper": "NousResearch/Yarn-Llama-2-7b-128k",
}
"""What a named pair's target is called on the hub, for commands."""

METHODS = (
    "draft_model",
    "ngram",
    "ngram_gpu",
    "suffix",
    "eagle",
    "eagle3",
    "mtp",
    "medusa",
    "mlp_speculator",
    "dflash",
    "dspark",
    "extract_hidden_states",
    "custom_class",
)
_ABOVE_ZERO = "a whole number of at least 1"
FIELDS: dict[str, str | tuple[str, ...]] = {
    "method": METHODS,
    "model": "a text",
    "num_speculative_tokens": _ABOVE_ZERO,
    "draft_tensor_parallel_size": _ABOVE_ZERO,
    "max_model_len": _ABOVE_ZERO,
    "draft_sample_method": ("greedy", "probabilistic"),
    "rejection_sample_method": ("standard", "synthetic", "block"),
    "num_speculative_tokens_per_batch_size": "a list",
    "quantization": "a text",
    "kv_cache_dtype": "a text",
    "attention_backend": "a text",
    "moe_backend": "a text",
    "revision": "a text",
    "code_revision": "a text",
    "draft_load_config": "a table",
    "enforce_eager": "true or false",
    "parallel_drafting": "true or false",
    "use_heterogeneous_vocab": "true or false",
    "use_local_argmax_reduction": "true or false",
    "disable_padded_drafter_batch": "true or false",
    "disable_eagle_block_drop": "true or false",
    "enable_adaptive_verification": "true or false",
    "index_share_for_mtp_iteration": "true or false",
    "prompt_lookup_max": _ABOVE_ZERO,
    "prompt_lookup_min": _ABOVE_ZERO,
    "dspark_draft_topk": _ABOVE_ZERO,
    "suffix_decoding_max_tree_depth": "a number",
    "suffix_decoding_max_cached_requests": "a number",
    "suffix_decoding_max_spec_factor": "a number",
    "suffix_decoding_min_token_prob": "a number",
    "synthetic_acceptance_rates": "a list",
    "synthetic_acceptance_length": "a number",
}
"""The fields that a user may set, each with what it takes."""
ENGINE_FIELDS = (
    "target_model_config",
    "target_parallel_config",
    "draft_model_config",
    "draft_parallel_config",
)
"""Fields that vLLM sets itself."""
PATH_MARKS = ("eagle-", "eagle3", "dflash", "dspark")
"""Parts of a drafter's path from which vLLM concludes another method, whatever ``method`` says."""


def _fits(value: object, wanted: str | tuple[str, ...]) -> bool:
    if isinstance(wanted, tuple):
        return value in wanted
    whole = isinstance(value, int) and not isinstance(value, bool)
    return {
        "a text": isinstance(value, str) and bool(value),
        "true or false": isinstance(value, bool),
        "a list": isinstance(value, list | tuple),
        "a table": isinstance(value, Mapping),
        "a number": whole or isinstance(value, float),
        _ABOVE_ZERO: whole and value >= 1,
    }[wanted]


def check_vllm(config: Mapping[str, Any], tensor_parallel: int = 1) -> None:
    """Refuse a ``speculative_config`` that vLLM would refuse, or take for another method.

    Parameters
    ----------
    tensor_parallel
        GPUs that share the target (``vllm serve --tensor-parallel-size``).

    Raises
    ------
    ValueError
        For a field that vLLM does not document or sets itself, a value out of range, a missing
        field, and a draft model that shares GPUs otherwise than its target does.
    """
    for name, value in config.items():
        if name == "tensor_parallel_size":
            raise ValueError("tensor_parallel_size is refused; say draft_tensor_parallel_size")
        if name in ENGINE_FIELDS:
            raise ValueError(f"{name} is set by vLLM itself; leave it out")
        if name not in FIELDS:
            raise ValueError(
                f"vLLM {VLLM_VERSION} has no speculative_config field {name!r}; allowed:"
                f" {', '.join(sorted(FIELDS))}"
            )
        wanted = FIELDS[name]
        if not _fits(value, wanted):
            said = wanted if isinstance(wanted, str) else f"one of {', '.join(wanted)}"
            raise ValueError(f"{name} {value!r} must be {said}")
    if "num_speculative_tokens" not in config:
        raise ValueError("num_speculative_tokens is missing: how many tokens to draft a round")
    method = config.get("method", "draft_model" if "model" in config else None)
    if method is None:
        raise ValueError("give a model (a drafter's folder or hub id) or a method without one")
    if method != "draft_model":
        return
    if "model" not in config:
        raise ValueError("method draft_model needs a model: the drafter's folder or hub id")
    for mark in PATH_MARKS:
        if mark in config["model"].lower():
            raise ValueError(
                f"vLLM reads the method from the path: {mark!r} in {config['model']!r} makes it"
                f" {mark.rstrip('-')}, not draft_model; choose another folder"
            )
    ranks = config.get("draft_tensor_parallel_size", tensor_parallel)
    if ranks != tensor_parallel:
        raise ValueError(
            f"draft_tensor_parallel_size {ranks} must be the target's {tensor_parallel} for a draft"
            " model; leave it out, and it is"
        )


def vllm_config(model: str | Path, gamma: int, tensor_parallel: int = 1) -> dict[str, Any]:
    """A checked ``speculative_config`` for a standalone drafter that drafts ``gamma`` tokens."""
    config = {"method": "draft_model", "model": str(model), "num_speculative_tokens": gamma}
    check_vllm(config, tensor_parallel)
    return config


def assistant_settings(gamma: int, eos_token_ids: tuple[int, ...] = ()) -> dict[str, Any]:
    """What transformers reads from a drafter's ``generation_config.json``: always ``gamma`` drafts.

    Its own defaults are 20 drafts, cut short where the drafter's confidence is below 0.4.
    """
    return {
        "num_assistant_tokens": gamma,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
        "eos_token_id": list(eos_token_ids) or None,
    }


def _refuse_feature(name: str, taps: list[int], engine: str) -> None:
    reads = (
        f"{name} is feature-conditioned: it reads the target's states after layers"
        f" {', '.join(map(str, taps))} and cannot stand alone"
    )
    why = {
        "transformers": "an assistant_model is given token ids only",
        "vllm": f"vLLM {VLLM_VERSION} gives a target's states to EAGLE and EAGLE-3 layers, which put"
        " them beside the embedding straight into attention; this drafter first mixes both by a"
        " matrix, and no weights of theirs do the same",
    }
    raise ValueError(f"{reads}; {why[engine]}. Export a standalone drafter, or decode with bdlib")


def _drafter_meta(source: str | Path) -> tuple[Path | None, dict[str, Any]]:
    """Folder and ``drafter.json`` of a trained drafter; (None, {}) for a plain model."""
    from bdlib import models

    folder = Path(source).expanduser()
    root = assets.checkout()
    if not folder.exists() and root is not None and "/" not in str(source):
        folder = models.checkpoint(str(source))
    if not (folder / models.CONFIG_FILE).is_file():
        return None, {}
    try:
        meta = json.loads((folder / models.CONFIG_FILE).read_text(encoding="utf8"))
        return folder, {"kind": meta["kind"], "taps": meta["taps"], **meta["provenance"]}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / models.CONFIG_FILE} is damaged: {error!r}") from error


def export(
    drafter: str | Path,
    out: str | Path,
    engine: str,
    pair: str = "smollm2",
    gamma: int = 4,
    dtype: str = "bfloat16",
) -> Path:
    """Write a standalone drafter for another engine.

    Parameters
    ----------
    drafter
        Folder of a trained drafter, the name of a shipped one, or a folder or hub id of a plain
        model (with the target's vocabulary).
    engine
        ``"transformers"`` or ``"vllm"``.
    pair
        The target: ``"smollm2"``, ``"paper"``, or a folder or hub id.
    gamma
        Tokens drafted per round.
    dtype
        Of the weights written: ``"bfloat16"``, ``"float32"`` or ``"float64"``.

    Returns
    -------
    Path
        The folder, with weights, tokenizer, settings and a card.

    Raises
    ------
    ValueError
        For an unknown engine, a feature-conditioned drafter (neither engine loads one), another
        vocabulary than the target's, or settings that vLLM would refuse.
    """
    from dataclasses import replace

    from bdlib import models
    from bdlib.pairs import NAMES, load_pair

    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; allowed: {', '.join(ENGINES)}")
    if isinstance(gamma, bool) or not isinstance(gamma, int) or gamma < 1:
        raise ValueError(f"gamma {gamma!r} must be {_ABOVE_ZERO}")
    out = Path(out).expanduser().resolve()
    folder, meta = _drafter_meta(drafter)
    if meta.get("kind") == "feature":
        _refuse_feature(Path(drafter).name, meta["taps"], engine)
    for source in (folder, Path(drafter).expanduser(), Path(pair).expanduser()):
        if source is not None and source.exists() and source.resolve() == out:
            raise ValueError(f"--out {out} is the folder to read from; choose another")
    config = vllm_config(out, gamma) if engine == "vllm" else None

    named = pair in NAMES
    loaded = load_pair(
        pair if named else "smollm2",
        target=None if named else pair,
        drafter=drafter if folder is None else None,
        device="cpu",
        dtype=dtype,
        pack=False,
    )
    if folder is not None:
        made = models.load_drafter(folder, loaded.target, pack=False)
        loaded = replace(loaded, drafter=made)
    models.export(loaded.drafter, out, loaded.target)
    loaded.tokenizer.save_pretrained(out)
    if config is None:
        settings = assistant_settings(gamma, loaded.drafter.config.eos_token_ids)
        _write(out / ASSISTANT_FILE, json.dumps(settings, indent=2) + "\n")
    else:
        _write(out / VLLM_FILE, json.dumps(config, indent=2) + "\n")
    served = HUB_IDS.get(pair, str(pair))
    _write(out / CARD_FILE, card(loaded, out, engine, gamma, served, Path(drafter).name, meta))
    return out


def _write(path: Path, text: str) -> None:
    with assets.replacing(path) as scratch:
        scratch.write_text(text, encoding="utf8")


def command(served: str, folder: str | Path, positions: int) -> str:
    """The shell command that serves a target with an exported drafter."""
    place = shlex.quote(str(Path(folder) / VLLM_FILE))
    return (
        f"vllm serve {shlex.quote(served)} --max-model-len {positions}"
        f' --speculative-config "$(cat {place})"'
    )


def code(served: str, folder: str | Path) -> str:
    """Python that generates with an exported drafter in transformers."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({served!r})\n"
        f"target = AutoModelForCausalLM.from_pretrained({served!r})\n"
        f"drafter = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        "tokens = target.generate(**inputs, assistant_model=drafter, max_new_tokens=64)\n"
        "print(tokenizer.decode(tokens[0]))\n"
    )


def card(
    pair: Pair,
    folder: Path,
    engine: str,
    gamma: int,
    served: str,
    name: str,
    meta: Mapping[str, Any],
) -> str:
    """The exported folder's model card, in Markdown."""
    config = pair.drafter.config
    rows = pair.drafter.vocabulary
    head = "all tokens" if rows is None else f"{len(rows):,} tokens; the target's rows elsewhere"
    lines = [
        f"# {name}, a drafter for {served}",
        "",
        "| | |",
        "|---|---|",
        f"| layers | {config.num_layers} of width {config.hidden_size} |",
        f"| head trained for | {head} |",
        f"| drafts a round | {gamma} |",
        f"| recipe | {meta.get('recipe', 'not recorded')}, {meta.get('steps', '?')} steps |",
        "",
    ]
    if engine == "vllm":
        lines += [
            f"Serve it (vLLM {VLLM_VERSION}):",
            "",
            f"```\n{command(served, folder, config.max_positions)}\n```",
            "",
            f"`{VLLM_FILE}` names this folder: change `model` there when you move it. With several",
            "GPUs add `--tensor-parallel-size N`; the drafter is then split as the target is.",
        ]
    else:
        lines += ["Use it:", "", f"```python\n{code(served, folder)}```"]
    lines += [
        "",
        "The output stays the target's own. The engine keeps the drafter's full cache: a budget of",
        "cache entries is a feature of bdlib's decoder.",
    ]
    if pair.name.startswith("smollm2"):
        lines += [
            "",
            "It was trained beside the 4-bit copy of its target that the lessons use. The hub's own",
            "weights differ from it a little, and so may the acceptance: measure it.",
        ]
    return "\n".join(lines) + "\n"
