"""Measure a drafter on real text: acceptance, speed, memory, and whether the output is the same.

For each sample the target reads the prompt once; then plain decoding and speculative decoding take
turns on that same cache, so a speed-up compares two runs a moment apart and nothing else. Beside
every acceptance stand the repetition of the output (``distinct_2``) and the acceptance of n-gram
lookup on the same text, because a looping output flatters any drafter.

``context`` is the length of the whole sequence in tokens, prompt and generated tokens together: with
``context=8192, new_tokens=64`` the prompt has 8,128. :data:`FIELDS` says what a record holds.

Contract: no record leaves here that breaks ``tokens per round <= 1 + gamma * acceptance``, which
holds for any drafter (:func:`check_bound`); a file appears complete or not at all.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bdlib import __version__, assets, doctor
from bdlib.copies import COPIES

if TYPE_CHECKING:
    import torch

    from bdlib.cache import KVCache, QueryLog
    from bdlib.controllers import Controller
    from bdlib.corpora import Document
    from bdlib.decoding import Generation
    from bdlib.drafters import Drafter
    from bdlib.pairs import Pair
    from bdlib.selection import Policy
    from bdlib.transformer import Decoder

SCHEMA = 1
DRAFTERS = ("self", "ngram")
NEAR_TIE = {"float64": 0.0, "float32": 1e-3, "float16": 0.0125, "bfloat16": 0.1}
"""Largest difference of two logits that rounding in a dtype may explain (none in float64)."""

FIELDS = {
    "sample": "number of the sample, from 0",
    "document": "name of the text",
    "offset": "first token of the prompt in the text; the passage's, with chat",
    "text": "where the texts came from; null where they were handed over",
    "pair": "name of the target",
    "scaling": "how the target's positions were stretched: none, or YaRN x2",
    "drafter": "self, ngram, or the model's name",
    "policy": "what the drafter's cache keeps; null without a cache",
    "budget": "entries kept per layer and KV head; null without a cache, context for policy full",
    "refresh": "rounds between selections; null: selected once, after the prompt",
    "reach": "tokens of the prompt that the drafter reads, its first and its last; 0: all",
    "gamma": "most tokens drafted in a round",
    "controller": "whether a controller chose gamma anew for each round, 0 included",
    "gammas": "rounds by the gamma asked for, as {gamma: rounds}",
    "context": "prompt and generated tokens together",
    "within": "context of the windows whose ends the prompts are; null: prompts were cut for themselves",
    "prompt_tokens": "tokens of the prompt",
    "new_tokens": "most tokens generated",
    "chat": "whether the prompt is a chat request (which stop tokens may end) or plain text",
    "temperature": "0 is greedy",
    "top_k": "0 is off",
    "top_p": "1 is off",
    "verification": "how drafts were checked when sampling: block (as a whole) or token (one by one)",
    "seed": "chooses the texts and windows, and with `sample` what sampling draws",
    "repeats": "runs of each kind; times are medians over them",
    "acceptance_rate": "accepted over drafted tokens; null when nothing was drafted",
    "accepted_length": "tokens per round, the target's own included",
    "by_position": "for each draft position: rounds that came to it, and how many were accepted there",
    "drafted": "tokens drafted",
    "accepted": "drafted tokens the target agreed to",
    "rounds": "rounds of speculative decoding",
    "tokens": "tokens generated",
    "stopped": "whether a stop token ended the output",
    "distinct_2": "distinct over all pairs of neighbouring generated tokens; low means repetition",
    "ngram_acceptance_rate": "acceptance of n-gram lookup on the same output and gamma",
    "ngram_accepted_length": "its tokens per round",
    "tokens_per_second": "speculative decoding, prefill left out",
    "ar_tokens_per_second": "plain (autoregressive) decoding, prefill left out",
    "speedup_decode": "plain over speculative time per token, prefill left out",
    "speedup_with_prefill": "the same with the target's prefill on both sides and the drafter's",
    "seconds": "speculative run: prefill (target and drafter), draft, select, verify",
    "drafter_prefill_seconds": "the drafter's part of seconds.prefill",
    "ar_decode_seconds": "plain run, prefill left out",
    "identical": "greedy: whether both outputs are the same tokens; null when sampling",
    "divergences": "greedy: emitted tokens that are not the single-step argmax; null when sampling",
    "divergence_list": "for each: position, token, expected, gap (top two logits), shortfall",
    "max_divergence_gap": "largest top-two gap among them; 0 when there are none",
    "near_ties_only": "whether every shortfall is one that rounding explains; null when sampling",
    "kv_entries_max": "most entries the drafter held, per layer and KV head",
    "kv_bytes_drafter": "bytes of keys and values allocated for the drafter alone",
    "kv_bytes_target": "bytes of keys and values allocated for the target",
    "peak_rss_bytes": "most memory this process has held so far",
    "dtype": "number type of the models",
    "device": "cpu or cuda",
    "threads": "torch threads",
    "machine": "processor, cores, memory in bytes, platform, GPU",
    "versions": "of bdlib, Python, torch and transformers",
    "commit": "of the checkout, -dirty if files differ from it; null outside one",
}
"""What each entry of a record is. Aggregates share the names: see :func:`aggregate`."""

MEANS = (
    "acceptance_rate",
    "accepted_length",
    "distinct_2",
    "ngram_acceptance_rate",
    "ngram_accepted_length",
)
MEDIANS = ("tokens_per_second", "ar_tokens_per_second", "speedup_decode", "speedup_with_prefill")
TOTALS = ("drafted", "accepted", "rounds", "tokens", "divergences")
LARGEST = (
    "kv_entries_max",
    "kv_bytes_drafter",
    "kv_bytes_target",
    "peak_rss_bytes",
    "max_divergence_gap",
)
OWN = ("sample", "document", "offset", "stopped", "divergence_list", "drafter_prefill_seconds")
OWN += ("gammas",)


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} {value!r} must be a whole number of at least {least}")


def check_within(within: int | None, context: int) -> None:
    """Refuse windows to cut prompts from (see :class:`MeasureSettings`) that are below the context."""
    if within is None:
        return
    _whole("within", within, 1)
    if within < context:
        raise ValueError(f"within {within} must be at least the context of {context}")


@dataclass(frozen=True)
class MeasureSettings:
    """What to measure.

    Attributes
    ----------
    pair
        A name that :func:`bdlib.pairs.load_pair` knows, or a folder or hub id of a target.
    drafter
        ``"self"``, ``"ngram"``, or a folder or hub id of a model, after which :data:`COPIES` may stand.
    policy, budget
        The drafter's cache. With policy ``"full"`` the budget is the context, whatever is given;
        n-gram lookup has no cache and ignores both.
    context
        Tokens of prompt and output together.
    controller
        Let a :class:`bdlib.controllers.Controller` choose the drafts of each round: ``gamma`` tokens at
        most, or none. Each run begins with one that knows nothing.
    text
        What :func:`bdlib.corpora.load_texts` takes.
    samples
        Windows of text to measure on.
    within
        Take the windows from the end of longer ones, of this context: measurements at several contexts
        are then of the same documents and end at the same places. ``None`` cuts them anew for each.
    new_tokens
        Tokens to generate; fewer than ``context``.
    refresh
        Select again every so many rounds; ``None`` selects once.
    reach
        Tokens of the prompt that a second model reads: see :class:`bdlib.drafters.ModelDrafter`.
    chat
        Ask for a summary of the passage in the chat template, and stop at a stop token. Otherwise
        continue plain text for exactly ``new_tokens``.
    verification
        When sampling, how drafts are checked: see :class:`bdlib.sampling.Sampling`.
    repeats
        Runs of each kind per sample. The tokens are the same each time; times become medians.
    """

    pair: str = "smollm2"
    drafter: str = "self"
    policy: str = "chunk_topk_recent"
    budget: int = 256
    context: int = 2048
    gamma: int = 4
    controller: bool = False
    text: str = "embedded:held-out"
    samples: int = 4
    within: int | None = None
    new_tokens: int = 64
    refresh: int | None = None
    reach: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    verification: str = "block"
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    chat: bool = False
    repeats: int = 1

    def __post_init__(self) -> None:
        for name in ("budget", "context", "gamma", "samples", "new_tokens", "repeats"):
            _whole(name, getattr(self, name), 1)
        _whole("seed", self.seed, 0)
        if not isinstance(self.controller, bool):
            raise ValueError(f"controller {self.controller!r} must be True or False")
        if self.refresh is not None:
            _whole("refresh", self.refresh, 1)
        check_within(self.within, self.context)
        if self.drafter.removesuffix(COPIES) in DRAFTERS and self.drafter.endswith(COPIES):
            raise ValueError(
                f"drafter {self.drafter!r}: {COPIES} is for a second model, not for one of"
                f" {', '.join(DRAFTERS)}"
            )
        if self.reach is not None:
            from bdlib.drafters import check_reach

            check_reach(self.reach)
        if self.new_tokens >= self.context:
            raise ValueError(
                f"new_tokens {self.new_tokens} must be fewer than the context of {self.context}:"
                " the context is the prompt and the new tokens together"
            )
        self.sampling  # noqa: B018 (refuses what is out of range)
        self.make_policy().check(self.budget)

    @property
    def sampling(self):
        """The :class:`bdlib.sampling.Sampling` of these settings."""
        from bdlib.sampling import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.verification)

    def make_controller(self) -> Controller | None:
        """A controller that drafts up to ``gamma`` tokens, if these settings ask for one."""
        from bdlib.controllers import Controller, ControllerSettings

        return Controller(ControllerSettings(max_gamma=self.gamma)) if self.controller else None

    def make_policy(self) -> Policy:
        """The selection policy of these settings."""
        from bdlib.selection import make_policy

        return make_policy(self.policy)

    @property
    def entries(self) -> int:
        """The budget that the drafter works with: the context, for policy ``full``."""
        return self.context if self.policy == "full" else self.budget


@dataclass(frozen=True)
class Report:
    """Records of all samples and what they add up to."""

    settings: MeasureSettings
    records: list[dict[str, Any]]
    aggregate: dict[str, Any]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, complete or not at all.

        Raises
        ------
        ValueError
            If a record breaks the bound of :func:`check_bound`, or holds what JSON cannot.
        OSError
            If the file cannot be written.
        """
        for record in self.records:
            check_bound(record)
        write_json(path, {"schema": SCHEMA, "aggregate": self.aggregate, "records": self.records})

    def table(self) -> str:
        """A short summary for people, a few lines of text."""
        a = self.aggregate
        cache = "" if a["policy"] is None else f", {a['policy']}, budget {a['budget']}"
        scaling = "" if a["scaling"] == "none" else f" ({a['scaling']})"
        rows = [
            ("drafter", f"{a['drafter']}{cache}, gamma {_gamma(a)}"),
            ("target", f"{a['pair']}, {a['dtype']}, context {a['context']}{scaling}"),
            ("samples", f"{a['samples']}: {a['tokens']} tokens in {a['rounds']} rounds"),
            ("acceptance", _show(a, "acceptance_rate")),
            ("tokens per round", _show(a, "accepted_length")),
            ("n-gram lookup", f"{_show(a, 'ngram_acceptance_rate')} acceptance on the same text"),
            ("distinct-2", _show(a, "distinct_2")),
            ("tokens/s", f"{a['tokens_per_second']:.1f}, plain {a['ar_tokens_per_second']:.1f}"),
            ("speed-up", f"{_show(a, 'speedup_decode', 2)} decoding"),
            ("", f"{_show(a, 'speedup_with_prefill', 2)} with prefill"),
            ("same as greedy", _verdict(a)),
            ("drafter's cache", f"{a['kv_entries_max']} entries, {a['kv_bytes_drafter']:,} bytes"),
            ("target's cache", f"{a['kv_bytes_target']:,} bytes"),
        ]
        return "\n".join(f"{name:<17} {value}" for name, value in rows)


def _gamma(summary: Mapping[str, Any]) -> str:
    return f"0 to {summary['gamma']}, chosen" if summary["controller"] else f"{summary['gamma']}"


def _show(summary: Mapping[str, Any], key: str, digits: int = 3) -> str:
    value, spread = summary[key], summary["intervals"][key]
    if value is None:
        return "undefined"
    text = f"{value:.{digits}f}"
    if spread["low"] is not None:
        text += f"  (95 % interval of the mean {spread['low']:.{digits}f}"
        text += f" to {spread['high']:.{digits}f})"
    return text


def _verdict(summary: Mapping[str, Any]) -> str:
    if summary["identical"] is None:
        return "not defined when sampling"
    if summary["identical"]:
        return "yes, every token"
    kind = "near-ties only" if summary["near_ties_only"] else "NOT near-ties"
    gap = summary["max_divergence_gap"]
    return f"no: {summary['divergences']} divergence(s), {kind}, largest top-two gap {gap:.2g}"


# -------------------------------------------------------------------------- measuring


def measure(
    settings: MeasureSettings,
    pair: Pair | None = None,
    documents: Sequence[Document] | None = None,
    drafter: Drafter | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """Measure a drafter.

    Parameters
    ----------
    pair, documents, drafter
        What to use instead of what the settings name: loaded already, or a drafter of your own
        (records then carry its ``name``, policy and budget).
    progress
        Called with each record when it is there.

    Raises
    ------
    ValueError
        For texts that are missing, empty or too short, a pair that cannot be loaded, a context
        beyond the target's positions, logits that are not numbers, or a broken bound.
    """
    from bdlib import corpora

    own = drafter is None
    names = {
        "text": _label(settings.text) if documents is None else None,
        "drafter": _label(settings.drafter) if own else drafter.name,
    }
    documents = corpora.load_texts(settings.text) if documents is None else documents
    pair = load(settings) if pair is None else pair
    names["pair"] = _label(pair.name.split(" + ")[0])
    positions = pair.target.config.max_positions
    if settings.context > positions:
        raise ValueError(
            f"context {settings.context} is beyond the target's {positions} positions;"
            " load the pair with load_pair(..., context=N)"
        )
    prompts = _prompts(settings, pair.tokenizer, documents)
    drafter = make_drafter(settings, pair) if own else drafter
    _warm_up(settings, pair, drafter, prompts[0][2])
    here = provenance()
    records = []
    for index, (document, offset, prompt) in enumerate(prompts):
        record = {"sample": index, "document": document.name, "offset": offset}
        record |= _sample(settings, pair, drafter, prompt, index) | names | here
        record = {name: record[name] for name in FIELDS}
        check_bound(record)
        records.append(record)
        if progress is not None:
            progress(record)
    return Report(settings, records, aggregate(records))


def load(settings: MeasureSettings) -> Pair:
    """The pair that settings name, stretched to their context if need be.

    Raises
    ------
    ValueError
        See :func:`bdlib.pairs.load_pair`; and for a drafter that is no known name, folder or hub id.
    """
    from bdlib import models, pairs

    model = None if settings.drafter in DRAFTERS else settings.drafter.removesuffix(COPIES)
    folder = Path(model or "").expanduser()
    if model is not None and not folder.is_dir() and model.count("/") != 1:
        raise ValueError(
            f"unknown drafter {model!r}; allowed: {', '.join(DRAFTERS)}, a model folder,"
            " or a hub id 'owner/name'"
        )
    cut = model is not None and (folder / models.CONFIG_FILE).is_file()
    named = settings.pair in pairs.NAMES or not _is_source(settings.pair)
    pair = pairs.load_pair(
        settings.pair,
        target=None if named else settings.pair,
        drafter=None if cut else model,
        device=settings.device,
        dtype=settings.dtype,
        context=settings.context,
    )
    if cut:  # a trained drafter's folder borrows the target's tokenizer and embedding
        pair = replace(pair, drafter=models.load_drafter(folder, pair.target))
    return pair


def _is_source(name: str) -> bool:
    """Whether this is a folder or could be a hub id, rather than the name of a pair."""
    return "/" in name or Path(name).expanduser().is_dir()


def _label(source: str) -> str:
    """A name for records: of a path only its last part, so that no place of a machine is kept."""
    name = source.removesuffix(COPIES)
    path = Path(name).expanduser()
    return path.resolve().name + source[len(name) :] if path.exists() else source


def make_drafter(settings: MeasureSettings, pair: Pair) -> Drafter:
    """The drafter that settings name, on the models of a pair."""
    from bdlib.drafters import ModelDrafter, NGramDrafter, SelfDrafter

    if settings.drafter == "ngram":
        return NGramDrafter()
    policy, budget = settings.make_policy(), settings.entries
    if settings.drafter == "self":
        return SelfDrafter(pair.target, policy, budget, settings.refresh)
    if pair.drafter is None:
        raise ValueError(
            f"drafter {settings.drafter!r}: the pair {pair.name!r} has no second model"
        )
    copies = settings.drafter.endswith(COPIES)
    how = {"reach": settings.reach, "copies": copies}
    return ModelDrafter(pair.drafter, policy, budget, settings.refresh, **how)


def _prompts(
    settings: MeasureSettings, tokenizer: Any, documents: Sequence[Document]
) -> list[tuple[Document, int, torch.Tensor]]:
    from bdlib import corpora

    tokens = settings.context - settings.new_tokens
    within = None if settings.within is None else settings.within - settings.new_tokens
    found = corpora.windows(tokenizer, documents, tokens, settings.samples, settings.seed, within)
    if not settings.chat:
        return found
    return [
        (document, offset, corpora.chat_request(tokenizer, document, tokens, offset=offset))
        for document, offset, _ in found
    ]


def _warm_up(settings: MeasureSettings, pair: Pair, drafter: Drafter, prompt: torch.Tensor) -> None:
    """Run everything once on a short prompt, so that no sample pays for first-time set-up."""
    import torch

    from bdlib.decoding import generate

    prompt = prompt[:256].to(pair.device)
    if pair.drafter is not None:
        with torch.inference_mode():
            logits = pair.drafter(prompt[None, :8])
        if not torch.isfinite(logits).all():
            # The target's are checked at every step; a draft of nonsense would only be rejected.
            raise ValueError(f"the logits of drafter {settings.drafter!r} are not numbers")
    generate(
        pair.target,
        prompt,
        drafter,
        gamma=settings.gamma,
        max_new_tokens=min(settings.gamma + 2, settings.new_tokens),
        sampling=settings.sampling,
        generator=torch.Generator(pair.device).manual_seed(settings.seed),
    )


class Filled(NamedTuple):
    """A target's cache that holds a prompt, its log of queries, and the seconds that it took."""

    cache: KVCache
    log: QueryLog | None
    seconds: float


def fill(pair: Pair, drafter: Drafter, prompt: torch.Tensor, context: int) -> Filled:
    """Prefill ``prompt`` ``[T]``; serves every drafter with the same ``observe`` and ``taps``."""
    from bdlib.drafters import prefill

    synchronise(pair.device)
    began = time.perf_counter()
    cache = prefill(pair.target, prompt, context, observe=drafter.observe, taps=drafter.taps)
    synchronise(pair.device)
    return Filled(cache, cache.log, time.perf_counter() - began)


def _sample(
    settings: MeasureSettings,
    pair: Pair,
    drafter: Drafter,
    prompt: torch.Tensor,
    index: int,
    filled: Filled | None = None,
) -> dict[str, Any]:
    """Everything about one prompt except where it is from and where it ran."""
    import torch

    from bdlib.decoding import PHASES, generate

    prompt = prompt.to(pair.device)
    cache, log, prefill_seconds = filled or fill(pair, drafter, prompt, settings.context)
    stops = pair.stop_tokens if settings.chat else frozenset()

    def run(who: Drafter | None) -> Generation:
        cache.rewind(len(prompt) - 1)
        # The log of queries is a ring: a run overwrites its oldest ones and a rewind does not bring
        # them back. Each speculative run starts from a copy; plain decoding needs none.
        cache.log = None if who is None else copy.deepcopy(log)
        return generate(
            pair.target,
            prompt,
            who,
            cache=cache,
            gamma=settings.gamma,
            controller=None if who is None else settings.make_controller(),
            max_new_tokens=settings.new_tokens,
            sampling=settings.sampling,
            stop_tokens=stops,
            generator=torch.Generator(pair.device).manual_seed(settings.seed + index),
        )

    plain, fast = [], []
    for _ in range(settings.repeats):
        plain.append(run(None))
        fast.append(run(drafter))
    drafter_seconds = statistics.median(g.seconds["prefill"] for g in fast)
    seconds = {phase: statistics.median(g.seconds[phase] for g in fast) for phase in PHASES}
    seconds["prefill"] += prefill_seconds

    speedups, speedups_with_prefill = [], []
    for before, after in zip(plain, fast, strict=True):
        a_token = before.decode_seconds / len(before.tokens)
        count = len(after.tokens)
        speedups.append(a_token * count / after.decode_seconds)
        whole = prefill_seconds + after.seconds["prefill"] + after.decode_seconds
        speedups_with_prefill.append((prefill_seconds + a_token * count) / whole)

    cache.log = None
    result, tokens = fast[0], fast[0].tokens
    ngram_rate, ngram_length = ngram_acceptance(prompt, tokens, settings.gamma)
    policy = getattr(drafter, "policy", None)
    return {
        **asdict(settings),
        "scaling": pair.scaling,
        "policy": None if policy is None else policy.name,
        "budget": None if policy is None else drafter.budget or settings.context,
        "refresh": getattr(drafter, "refresh", None),
        "reach": getattr(drafter, "reach", 0),
        "prompt_tokens": len(prompt),
        "gammas": _counts(r.gamma for r in result.rounds),
        "acceptance_rate": _number(result.acceptance_rate),
        "accepted_length": result.accepted_length,
        "by_position": by_position(result),
        "drafted": result.drafted,
        "accepted": result.accepted,
        "rounds": len(result.rounds),
        "tokens": len(tokens),
        "stopped": tokens[-1] in stops,
        "distinct_2": distinct_n(tokens, 2),
        "ngram_acceptance_rate": ngram_rate,
        "ngram_accepted_length": ngram_length,
        "tokens_per_second": statistics.median(g.tokens_per_second for g in fast),
        "ar_tokens_per_second": statistics.median(g.tokens_per_second for g in plain),
        "speedup_decode": statistics.median(speedups),
        "speedup_with_prefill": statistics.median(speedups_with_prefill),
        "seconds": seconds,
        "drafter_prefill_seconds": drafter_seconds,
        "ar_decode_seconds": statistics.median(g.decode_seconds for g in plain),
        **_agreement(settings, pair, cache, prompt, plain[0].tokens, tokens),
        "kv_entries_max": drafter.kv_entries,
        "kv_bytes_drafter": drafter.kv_bytes,
        "kv_bytes_target": cache.config.kv_bytes(cache.capacity, cache.dtype),
        "peak_rss_bytes": peak_rss(),
        "dtype": str(pair.dtype).removeprefix("torch."),
        "device": pair.device.type,
    }


def _counts(gammas: Iterable[int]) -> dict[str, int]:
    return {str(gamma): n for gamma, n in sorted(Counter(gammas).items())}


def _agreement(
    settings: MeasureSettings,
    pair: Pair,
    cache: KVCache,
    prompt: torch.Tensor,
    plain: list[int],
    tokens: list[int],
) -> dict[str, Any]:
    """Whether greedy speculative output is the plain one, and what the differences are.

    When sampling, both outputs are draws of one distribution but not the same draw: the two ways of
    decoding use up random numbers differently. Equality is then neither expected nor a fault.
    """
    if not settings.sampling.greedy:
        keys = ("identical", "divergences", "max_divergence_gap", "near_ties_only")
        return {**dict.fromkeys(keys), "divergence_list": []}
    found = [] if tokens == plain else divergences(pair.target, cache, prompt, tokens)
    limit = NEAR_TIE[str(pair.dtype).removeprefix("torch.")]
    return {
        "identical": tokens == plain,
        "divergences": len(found),
        "divergence_list": found,
        "max_divergence_gap": max((d["gap"] for d in found), default=0.0),
        "near_ties_only": all(d["shortfall"] < limit for d in found),
    }


def divergences(
    target: Decoder, cache: KVCache, prompt: torch.Tensor, tokens: Sequence[int]
) -> list[dict[str, Any]]:
    """Where an output is not what single steps along it would have chosen.

    The output is fed token by token from the prompt on, so that the cache holds what single steps
    write. Each difference is counted by itself: the walk goes on along the output.

    Parameters
    ----------
    cache
        The target's, filled at least with all of ``prompt`` ``[T]`` but its last token.

    Returns
    -------
    list of dict
        ``position`` among ``tokens``; the ``token`` there; the one ``expected``, the argmax; ``gap``
        between the two largest logits; ``shortfall`` of the token's logit below the largest.
    """
    import torch

    cache.rewind(len(prompt) - 1)
    found, last = [], int(prompt[-1])
    with torch.inference_mode():
        for position, token in enumerate(tokens):
            logits = target(torch.tensor([[last]], device=target.device), cache)[0, -1]
            best = int(logits.argmax())
            if best != token:
                top = logits.topk(2).values
                found.append(
                    {
                        "position": position,
                        "token": token,
                        "expected": best,
                        "gap": float(top[0] - top[1]),
                        "shortfall": float(top[0] - logits[token]),
                    }
                )
            last = token
    return found


def by_position(result: Generation) -> list[list[int]]:
    """For each draft position ``[rounds that came to it, accepted there]``.

    A round comes to a position if it drafted that far and every draft before it was accepted, so
    the ratio is the chance of one more token, given all those before.
    """
    longest = max((len(r.drafted) for r in result.rounds), default=0)
    return [
        [
            sum(len(r.drafted) > i and r.accepted >= i for r in result.rounds),
            sum(r.accepted > i for r in result.rounds),
        ]
        for i in range(longest)
    ]


def add_positions(lists: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """The counts of :func:`by_position` of several runs, added up; runs may differ in length."""
    longest = max(map(len, lists), default=0)
    return [
        [sum(one[i][k] for one in lists if i < len(one)) for k in (0, 1)] for i in range(longest)
    ]


def ngram_acceptance(
    prompt: torch.Tensor, tokens: Sequence[int], gamma: int
) -> tuple[float | None, float]:
    """Acceptance rate and tokens per round of n-gram lookup on an output that is known already.

    No model runs. For greedy output this is what decoding with lookup gives. For sampled output it
    has the same distribution: lookup is certain of its drafts, so each is accepted with the
    probability that the target draws that very token.
    """
    from bdlib.decoding import GREEDY
    from bdlib.drafters import NGramDrafter

    drafter = NGramDrafter()
    drafter.start(prompt, None, 0)
    rounds = drafted = accepted = done = 0
    while done < len(tokens):
        last = int(prompt[-1]) if not done else tokens[done - 1]
        room = min(gamma, len(tokens) - done - 1)
        guess = drafter.propose(last, room, GREEDY, None).tokens.tolist() if room else []
        agreed = 0
        while agreed < len(guess) and guess[agreed] == tokens[done + agreed]:
            agreed += 1
        drafter.commit(list(tokens[done : done + agreed + 1]), agreed)
        rounds, drafted, accepted = rounds + 1, drafted + len(guess), accepted + agreed
        done += agreed + 1
    return accepted / drafted if drafted else None, len(tokens) / rounds


def synchronise(device: torch.device) -> None:
    """Wait for a GPU, so that a clock read next has seen its work done; nothing to do on CPU."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


# -------------------------------------------------------------------------- numbers


def check_bound(record: Mapping[str, Any]) -> None:
    """Refuse a record in which tokens per round exceed ``1 + gamma * acceptance_rate``.

    A round drafts at most ``gamma`` tokens and emits the accepted ones and one more, so no drafter
    can break this; a harness can. Where nothing was drafted, acceptance is undefined and a round
    gives one token.

    Raises
    ------
    ValueError
        If the bound is broken by more than rounding (1e-9, relative).
    """
    for kind in ("", "ngram_"):
        rate, length = record[f"{kind}acceptance_rate"], record[f"{kind}accepted_length"]
        most = 1 + record["gamma"] * (rate or 0.0)
        if not length <= most * (1 + 1e-9):
            raise ValueError(
                f"{kind}accepted_length {length:.6g} tokens per round is impossible: at most"
                f" {most:.6g} with gamma {record['gamma']} and acceptance {rate}"
            )


def distinct_n(tokens: Sequence[int], n: int) -> float | None:
    """Distinct over all runs of ``n`` neighbouring tokens; ``None`` for fewer than ``n`` tokens.

    1 when nothing repeats, near 0 for a loop (Li et al., arXiv 1510.03055).
    """
    if n < 1:
        raise ValueError(f"n {n} must be at least 1")
    runs = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(runs)) / len(runs) if runs else None


class Interval(NamedTuple):
    """A mean (or the median asked for), its confidence interval, and how many values it is of."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


def interval(
    values: Sequence[float | None], level: float = 0.95, seed: int = 0, median: bool = False
) -> Interval:
    """Mean and its bootstrap confidence interval (bias-corrected and accelerated, scipy).

    Undefined values (``None``, not a number) are left out. One value alone has no interval; equal
    values have one of no width. With ``median`` all of it is about the median, by percentiles: the
    correction is unstable for a statistic that jumps.
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} must be between 0 and 1")
    kept = [float(v) for v in values if v is not None and not math.isnan(v)]
    if len(kept) < 2:
        return Interval(kept[0] if kept else None, None, None, len(kept))
    mean = statistics.median(kept) if median else statistics.fmean(kept)
    if max(kept) == min(kept):
        return Interval(mean, mean, mean, len(kept))
    import numpy as np
    from scipy.stats import bootstrap

    rng = np.random.default_rng(seed)
    statistic, method = (np.median, "percentile") if median else (np.mean, "BCa")
    drawn = bootstrap((kept,), statistic, confidence_level=level, method=method, rng=rng)
    found = drawn.confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(kept))


def aggregate(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What records of the same settings add up to, under the same names.

    Means over samples of rates and lengths; medians of speeds and speed-ups; totals of counts (those
    of ``by_position`` too) and seconds; the largest of memory and gaps; ``identical`` and
    ``near_ties_only`` if all are. Besides, ``samples``, and in ``intervals`` for every mean and
    median ``{mean, low, high, n}``: the mean over samples and its 95 % bootstrap interval
    (:func:`interval`).
    """
    if not records:
        raise ValueError("there are no records to add up")

    def known(name: str) -> list[Any]:
        return [r[name] for r in records if r[name] is not None]

    out: dict[str, Any] = {"samples": len(records)}
    intervals = {name: interval([r[name] for r in records]) for name in (*MEANS, *MEDIANS)}
    rules: dict[str, Callable[[list[Any]], Any]] = {
        **dict.fromkeys(MEANS, statistics.fmean),
        **dict.fromkeys(MEDIANS, statistics.median),
        **dict.fromkeys(TOTALS, sum),
        **dict.fromkeys(LARGEST, max),
        **dict.fromkeys(("identical", "near_ties_only"), all),
        "ar_decode_seconds": sum,
    }
    for name in FIELDS:
        if name in rules:
            out[name] = rules[name](known(name)) if known(name) else None
        elif name == "by_position":
            out[name] = add_positions([r[name] for r in records])
        elif name == "seconds":
            phases = records[0][name]
            out[name] = {phase: sum(r[name][phase] for r in records) for phase in phases}
        elif name not in OWN:
            out[name] = records[0][name]
    out["intervals"] = {name: found._asdict() for name, found in intervals.items()}
    return out


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


# -------------------------------------------------------------------------- where it ran


def machine() -> dict[str, Any]:
    """Processor, cores, memory in bytes, platform and GPU (or None); no name of the machine."""
    import psutil
    import torch

    return {
        "cpu": doctor.cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def provenance() -> dict[str, Any]:
    """What a result has to say of where it came from: machine, threads, versions, commit."""
    import importlib.metadata

    import torch

    versions = {"bdlib": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    threads = torch.get_num_threads()
    return {"threads": threads, "machine": machine(), "versions": versions, "commit": commit()}


def commit() -> str | None:
    """The short hash of the checkout's commit, ``-dirty`` if its files differ; None outside one.

    A copy of the files without their history (on a cluster, say) is told by ``BDLIB_COMMIT``.
    """
    root = assets.checkout()
    if root is None or not (root / ".git").exists():
        told = os.environ.get("BDLIB_COMMIT", "").strip()
        return told if re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", told) else None
    found = []
    for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno")):
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None
        found.append(done.stdout.strip())
    return found[0] + ("-dirty" if found[1] else "")


def peak_rss() -> int:
    """Most memory that this process has held so far, in bytes."""
    import resource  # not on Windows, where this module must still import

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


# -------------------------------------------------------------------------- writing


def check_output(path: str | os.PathLike[str]) -> Path:
    """Refuse, before any work is done, a file that could not be written after it.

    Returns
    -------
    Path
        The file itself where ``path`` is a link to one.

    Raises
    ------
    ValueError
        If the folder is not there or cannot be written, or something other than a file is in place.
    """
    path = Path(path).expanduser().resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"cannot write {path}: it is there already and is not a plain file")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: {path.parent} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    return path


def write_json(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name, then rename: the file is complete or absent.

    Raises
    ------
    ValueError
        If the document holds what JSON cannot (not a number, infinity), or see :func:`check_output`.
    """
    path = check_output(path)
    text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with assets.replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
