"""The same job done otherwise: every method of decoding in one run, on the same prompts and target.

For each prompt the target reads it once. Then every method (:data:`METHODS`, and every trained drafter
by its folder's name) decodes from a copy of that one cache, in turns whose order is reversed every
other time, so that a drift of the machine falls on all of them. Speeds are of decoding alone:

* this library's methods are charged from the first round on; a drafter's own reading of the prompt is
  a column of its own;
* transformers' methods get a ``DynamicCache`` filled with the very same keys and values. Their clock
  starts at the first forward pass, when ``generate`` has set itself up, and an assistant's first pass,
  in which it reads the prompt and makes one draft, is taken off. Both favour transformers, slightly.

Greedy outputs are compared with plain decoding's, token for token, as :mod:`bdlib.measure` does it;
beside each acceptance stand the repetition of the output and the acceptance of n-gram lookup on it.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from bdlib import measure
from bdlib.controllers import Controller, ControllerSettings

if TYPE_CHECKING:
    import torch

    from bdlib.cache import KVCache
    from bdlib.corpora import Document
    from bdlib.drafters import Drafter
    from bdlib.pairs import Pair
    from bdlib.sampling import Sampling
    from bdlib.selection import Policy
    from bdlib.transformer import Decoder

SCHEMA = 1
REGIMES = ("greedy", "sampling", "chat")
"""Plain text continued greedily, or at a temperature; a summary of a passage asked for, greedily."""

METHODS = {
    "plain": "this library's decoder, one token a pass",
    "generate": "transformers: generate",
    "assisted": "transformers: assisted generation, the standalone drafter with its full cache",
    "assisted-own": "the same with transformers' own draft length: 20 tokens, cut by confidence",
    "prompt-lookup": "transformers: prompt lookup",
    "ngram": "n-gram lookup in the text so far",
    "self-window": "the target on sink + window (MagicDec, arXiv 2408.11049)",
    "self-snapkv": "the target on a SnapKV cache (MagicDec)",
    "triforce": "standalone drafter, target on a sparse cache, target (TriForce, arXiv 2404.11912)",
    "untrained": "the standalone drafter as it was cut from the target, before training",
}
"""What there is besides trained drafters."""
TRANSFORMERS = ("generate", "assisted", "assisted-own", "prompt-lookup")
FULL = "@full"  # after a drafter's name: with its full cache
AUTO = "auto"  # after a colon, for a draft length: a controller chooses
OTHER_ENGINE = 4
"""Rounding explains that many times more (:data:`bdlib.measure.NEAR_TIE`) where transformers chose.

It rounds states and logits to the number type, this library does neither. In bfloat16, on 2,400
positions of prose and chat, its favourite was at most 0.25 below ours."""

FIELDS = {
    "method": "a name in METHODS or of a drafter's folder; with @full, on its full cache",
    "engine": "bdlib or transformers",
    "sample": "number of the sample, from 0",
    "document": "name of the text",
    "offset": "first token of the prompt in the text; the passage's, with chat",
    "prompt_tokens": "tokens of the prompt",
    "gamma": "most tokens drafted in a round; empty without drafts. NAME:auto: a controller chooses",
    "policy": "what the drafter's cache keeps; empty without a cache",
    "budget": "entries kept per layer and KV head; empty without a cache",
    "tokens": "tokens generated",
    "stopped": "whether a stop token ended the output",
    "rounds": "passes of the target",
    "drafted": "tokens drafted",
    "accepted": "drafted tokens that the target agreed to",
    "acceptance_rate": "accepted over drafted; empty when nothing was drafted",
    "accepted_length": "tokens a round, the target's own included",
    "inner_acceptance_rate": "triforce: what the middle model accepts of the small one's drafts",
    "inner_rounds": "triforce: passes of the middle model",
    "distinct_2": "distinct over all pairs of neighbouring generated tokens; low means repetition",
    "ngram_acceptance_rate": "acceptance of n-gram lookup on the same output, drafts of settings.gamma",
    "ngram_accepted_length": "its tokens a round",
    "seconds": "decoding, median over repeats",
    "tokens_per_second": "tokens over seconds",
    "speedup": "plain time a token over this method's, of the same turn; median over repeats",
    "drafter_prefill_seconds": "the drafter's own reading of the prompt, median over repeats",
    "identical": "greedy: whether the output is plain decoding's; empty when sampling",
    "divergences": "greedy: emitted tokens that are not the single-step argmax; empty when sampling",
    "max_divergence_gap": "largest top-two gap of logits among them",
    "max_shortfall": "most that one of them is below the largest logit",
    "near_ties_only": "whether rounding explains every one of them; empty when sampling",
    "kv_bytes_drafter": "bytes of keys and values for drafting alone, above the target's cache",
    "kv_bytes_target": "bytes of keys and values of the target for the whole context",
    "weight_bytes_drafter": "bytes of matrices that a draft step reads besides the target's",
}
"""What each column of the results is."""
_NAMES = ("method", "engine", "document", "policy")
_FLAGS = ("stopped", "identical", "near_ties_only")


@dataclass(frozen=True)
class BaselineSettings:
    """What to compare, and on what.

    Attributes
    ----------
    methods
        Names, see :func:`available`; ``()`` takes all of them. ``NAME:GAMMA`` gives a method a draft
        length of its own, ``NAME:auto`` a :class:`bdlib.controllers.Controller` that chooses in each
        round. Plain decoding always takes part: the others are measured against it.
    regime
        One of :data:`REGIMES`.
    context
        Tokens of prompt and output together.
    gamma
        Tokens drafted a round.
    inner_gamma
        Tokens that the small model drafts for the middle one (TriForce).
    budget
        Entries of every sparse cache, per layer and KV head.
    policy
        What the trained drafters' caches keep, and the middle model's.
    temperature
        Of regime ``sampling``.
    standalone
        The drafter that transformers gets, and TriForce: one that can do without the target's states.
    drafters
        A folder of drafters, besides the shipped ones.
    repeats
        Turns a prompt. When sampling, each turn writes texts of its own; counts are of the first one.
    """

    methods: tuple[str, ...] = ()
    regime: str = "chat"
    context: int = 2048
    samples: int = 4
    new_tokens: int = 64
    gamma: int = 4
    inner_gamma: int = 2
    budget: int = 256
    policy: str = "chunk_topk_recent"
    temperature: float = 0.7
    text: str = "embedded:held-out"
    standalone: str = "budgetdraft"
    drafters: str | None = None
    repeats: int = 1
    seed: int = 0
    pair: str = "smollm2"
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise ValueError(f"unknown regime {self.regime!r}; allowed: {', '.join(REGIMES)}")
        measure._whole("inner_gamma", self.inner_gamma, 1)
        if self.regime == "sampling" and not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} must be above 0 for sampling")
        self.measured()  # refuses what is out of range
        self.chosen()

    def measured(self) -> measure.MeasureSettings:
        """What :mod:`bdlib.measure` calls the same."""
        return measure.MeasureSettings(
            pair=self.pair,
            policy=self.policy,
            budget=self.budget,
            context=self.context,
            gamma=self.gamma,
            text=self.text,
            samples=self.samples,
            new_tokens=self.new_tokens,
            temperature=self.temperature if self.regime == "sampling" else 0.0,
            chat=self.regime == "chat",
            repeats=self.repeats,
            seed=self.seed,
            dtype=self.dtype,
            device=self.device,
        )

    def chosen(self) -> dict[str, tuple[str, int]]:
        """By label (``NAME``, ``NAME:GAMMA``, ``NAME:auto``): the method's name and draft length.

        Plain decoding comes first. With a controller the length is the most that it may draft.

        Raises
        ------
        ValueError
            For a method that is not there, and a draft length that is none.
        """
        known = available(self.drafters)
        copying = [f"{name}{measure.COPIES}" for name in _folders(self.drafters)]
        found = {"plain": ("plain", self.gamma)}
        for label in self.methods or known:
            name, colon, length = label.partition(":")
            if name not in known and name not in copying:
                raise ValueError(
                    f"unknown method {name!r}; allowed: {', '.join(known)}, and a trained drafter's"
                    f" name with {measure.COPIES}"
                )
            if length == AUTO:
                if name == "plain" or name in TRANSFORMERS:
                    raise ValueError(
                        f"method {label!r}: {name} has no draft for a controller to choose"
                    )
                found[label] = name, ControllerSettings().max_gamma
                continue
            if colon and not (length.isdecimal() and int(length) >= 1):
                raise ValueError(
                    f"method {label!r}: a draft length is a whole number of at least 1, or {AUTO!r}"
                )
            found[label] = name, int(length) if colon else self.gamma
        return found


def _folders(drafters: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Trained drafters by the names of their folders: shipped ones, then those of another folder."""
    from bdlib import assets, models

    root = assets.checkout()
    places = [] if root is None else [root / models.SHIPPED]
    if drafters is not None:
        places.append(Path(drafters).expanduser())
        if not places[-1].is_dir():
            raise ValueError(f"drafters {str(drafters)!r} is not a folder")
    return {
        path.parent.name: path.parent
        for place in places
        for path in sorted(place.glob(f"*/{models.CONFIG_FILE}"))
    }


def available(drafters: str | os.PathLike[str] | None = None) -> list[str]:
    """Names of all methods: :data:`METHODS`, and each trained drafter that is there, twice."""
    found = _folders(drafters)
    return [*METHODS, *found, *(f"{name}{FULL}" for name in found)]


def _trained(name: str) -> str:
    """The trained drafter that a method's name begins with."""
    return name.removesuffix(FULL).removesuffix(measure.COPIES)


# ------------------------------------------------------------------------- one decoding


class Outcome(NamedTuple):
    """One decoding of one prompt. ``seconds`` are of decoding alone; ``inner`` is the lower level's
    (passes, drafted, accepted), where there is one."""

    tokens: list[int]
    rounds: int
    drafted: int
    accepted: int
    seconds: float
    drafter_prefill_seconds: float = 0.0
    inner: tuple[int, int, int] | None = None


class Transformers:
    """A target in transformers that goes on from a cache of this library, timed pass by pass.

    Parameters
    ----------
    target
        Copied with its number type and its positions, stretched ones too.
    """

    def __init__(self, target: Decoder) -> None:
        self.decoder = target
        self.model = _exported(target.save, target)

    def assistant(self, drafter: Decoder) -> Any:
        """A standalone drafter as a model of transformers, with a head over the whole vocabulary."""
        from bdlib import models

        made = _exported(lambda folder: models.export(drafter, folder, self.decoder), self.decoder)
        # A drafter works at its target's positions; its own limit would only make a warning.
        made.config.max_position_embeddings = self.decoder.config.max_positions
        return made

    def cache(self, full: KVCache, length: int) -> Any:
        """A ``DynamicCache`` with the first ``length`` positions of a full cache, copied."""
        from transformers import DynamicCache

        made = DynamicCache(config=self.model.config)
        for layer in range(full.config.num_layers):
            keys, values = full.rows(layer, 0, length), full.values(layer, 0, length)
            made.update(keys.clone().contiguous(), values.clone(), layer)
        return made

    def decode(
        self,
        prompt: torch.Tensor,
        full: KVCache,
        sampling: Sampling,
        stops: Collection[int] = (),
        seed: int = 0,
        **ways: Any,
    ) -> Outcome:
        """Generate after a prompt ``[T]``, all of which but the last token is in the cache.

        ``ways`` are for ``generate``: ``max_new_tokens``, ``assistant_model`` and the like.
        """
        import torch
        from transformers import GenerationConfig

        how: dict[str, Any] = {"do_sample": not sampling.greedy}
        if how["do_sample"]:
            how |= {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
        # generate falls back on the model's own settings: they must not end a text, nor name a token
        # for padding. An assistant is given no mask, and would make one that leaves such tokens out.
        self.model.generation_config = GenerationConfig()
        how["eos_token_id"] = sorted(stops) or None
        cache = self.cache(full, len(prompt) - 1)
        watch = _Passes(self.model, ways.get("assistant_model"), cache)
        devices = [prompt.device] if prompt.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode(), _quiet(), watch:
            torch.manual_seed(seed)
            out = self.model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                cache=cache,
                **how,
                **ways,
            )
            measure.synchronise(prompt.device)
            seconds = time.perf_counter() - watch.began - watch.assistant_seconds
        tokens = out[0, len(prompt) :].tolist()
        rounds, drafted = len(watch.fed), sum(watch.fed) - len(watch.fed)
        accepted = len(tokens) - rounds
        return Outcome(tokens, rounds, drafted, accepted, seconds, watch.assistant_seconds)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of transformers about how it calls itself."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _exported(write: Callable[[str], None], target: Decoder) -> Any:
    """What ``write`` writes into a folder, as a model of transformers like the target."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=target.dtype, attn_implementation="sdpa"
        )
    return model.to(target.device).eval()


class _Passes:
    """Notes the forward passes of a target and an assistant while it is entered.

    ``fed`` holds the tokens of each of the target's passes, ``began`` when the first pass of either
    began. Assisted generation feeds the whole prompt to a cache that holds it already; here the first
    pass is cut to what the cache lacks, as plain ``generate`` does by itself.
    """

    def __init__(self, target: Any, assistant: Any, cache: Any) -> None:
        self._target, self._assistant, self._cache = target, assistant, cache
        self.fed: list[int] = []
        self.began: float | None = None
        self.assistant_seconds = 0.0

    def __enter__(self) -> _Passes:
        self._hooks = [self._target.register_forward_pre_hook(self._on_target, with_kwargs=True)]
        if self._assistant is not None:
            self._hooks += [
                self._assistant.register_forward_pre_hook(self._before_assistant),
                self._assistant.register_forward_hook(self._after_assistant),
            ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, device: torch.device) -> None:
        if self.began is None:
            measure.synchronise(device)
            self.began = time.perf_counter()

    def _on_target(self, module: Any, args: Any, named: dict[str, Any]) -> tuple[Any, Any]:
        self._begin(module.device)
        ids, held = named["input_ids"], self._cache.get_seq_length()
        if not self.fed and ids.shape[1] > held:
            new = ids.shape[1] - held
            named["input_ids"] = ids = ids[:, -new:]
            if named.get("position_ids") is not None:
                named["position_ids"] = named["position_ids"][..., -new:]
        self.fed.append(ids.shape[1])
        return args, named

    def _before_assistant(self, module: Any, args: Any) -> None:
        self._begin(module.device)

    def _after_assistant(self, module: Any, args: Any, output: Any) -> None:
        if not self.assistant_seconds:
            measure.synchronise(module.device)
            self.assistant_seconds = time.perf_counter() - self.began


class Contest:
    """The methods of some settings, made once; :meth:`decode` runs one of them on one prompt.

    Raises
    ------
    ValueError
        For a standalone drafter that is not there or reads the target's states, and whatever else
        cannot be made; before anything is decoded.
    """

    def __init__(self, settings: BaselineSettings, pair: Pair) -> None:
        self.settings, self.pair = settings, pair
        self.measured = settings.measured()
        self.chosen = settings.chosen()
        self._folders = _folders(settings.drafters)
        self._models: dict[str, Decoder] = {}
        self.drafters = {label: self._drafter(name) for label, (name, _) in self.chosen.items()}
        looks = [look for look in map(_observed, self.drafters.values()) if look is not None]
        if len({look.observe for look in looks}) > 1:
            raise ValueError(
                f"policy {self.settings.policy!r} needs another log of queries than SnapKV:"
                " leave self-snapkv or triforce out"
            )
        self._observe = max(looks, key=lambda look: look.observed_queries, default=None)
        self.theirs = self._assistant = None
        names = {name for name, _ in self.chosen.values()}
        if names & set(TRANSFORMERS):
            self.theirs = Transformers(pair.target)
        if any(name.startswith("assisted") for name in names):
            self._assistant = self.theirs.assistant(self._standalone())

    def _model(self, name: str) -> Decoder:
        from bdlib import models

        if name not in self._folders:
            there = ", ".join(self._folders) or "none"
            raise ValueError(f"no drafter {name!r}; there: {there}")
        if name not in self._models:
            self._models[name] = models.load_drafter(self._folders[name], self.pair.target)
        return self._models[name]

    def _standalone(self) -> Decoder:
        model = self._model(self.settings.standalone)
        if getattr(model, "taps", ()):
            raise ValueError(
                f"standalone {self.settings.standalone!r} reads the target's states; give the name"
                " of a drafter that stands alone"
            )
        return model

    def _untrained(self) -> Decoder:
        """The standalone drafter's layers as they are in the target, with the same output rows."""
        from bdlib import models, pairs, recipes

        trained = self._standalone()
        folder = self._folders[self.settings.standalone]
        about = json.loads((folder / models.CONFIG_FILE).read_text(encoding="utf8"))
        layers = recipes.get(about["provenance"].get("recipe", "")).layers
        target = self.pair.target
        named = self.settings.pair in pairs.NAMES
        whole = pairs.load_pair(
            self.settings.pair if named else "smollm2",
            target=None if named else self.settings.pair,
            device=str(target.device),
            dtype=str(target.dtype).removeprefix("torch."),
            context=self.settings.context,
            pack=False,
        ).target
        made = models.cut_from(whole, layers, trained.vocabulary)
        return made.to(target.dtype).requires_grad_(False).pack()

    def _drafter(self, name: str) -> Drafter | None:
        from bdlib.drafters import ModelDrafter, NGramDrafter, SelfDrafter
        from bdlib.hierarchy import HierarchyDrafter
        from bdlib.selection import make_policy

        target, budget = self.pair.target, self.settings.budget
        policy, window = make_policy(self.settings.policy), make_policy("sink_window")
        if name == "plain" or name in TRANSFORMERS:
            return None
        if name == "ngram":
            return NGramDrafter()
        if name == "self-window":
            return SelfDrafter(target, window, budget)
        if name == "self-snapkv":
            return SelfDrafter(target, make_policy("snapkv"), budget)
        if name == "triforce":
            small = self._standalone(), window, budget, self.settings.inner_gamma
            return HierarchyDrafter(target, policy, budget, *small)
        if name == "untrained":
            return ModelDrafter(self._untrained(), policy, budget)
        model = self._model(_trained(name))
        if name.endswith(FULL):
            return ModelDrafter(model, make_policy("full"))
        return ModelDrafter(model, policy, budget, copies=name.endswith(measure.COPIES))

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end a text: with chat."""
        return self.pair.stop_tokens if self.measured.chat else frozenset()

    def fill(self, prompt: torch.Tensor) -> dict[tuple[int, ...], measure.Filled]:
        """Let the target read a prompt ``[T]``; once for each set of layers that drafters read."""
        taps = {d.taps for d in self.drafters.values() if d is not None and d.taps} or {()}
        capacity = len(prompt) + self.settings.new_tokens
        return {
            layers: measure.fill(
                self.pair, SimpleNamespace(observe=self._observe, taps=layers), prompt, capacity
            )
            for layers in sorted(taps)
        }

    def decode(
        self,
        label: str,
        prompt: torch.Tensor,
        filled: Mapping[tuple[int, ...], measure.Filled],
        seed: int = 0,
        new_tokens: int | None = None,
    ) -> Outcome:
        """Decode a prompt ``[T]`` with one method, after :meth:`fill`; the caches may be used again.

        ``new_tokens`` asks for fewer than the settings do.
        """
        import torch

        from bdlib import decoding

        name, gamma = self.chosen[label]
        drafter = self.drafters[label]
        taps = () if drafter is None else drafter.taps
        cache, log, _ = filled[taps] if taps in filled else next(iter(filled.values()))
        cache.rewind(len(prompt) - 1)
        if name in TRANSFORMERS:
            return self._transformers(name, gamma, prompt, cache, seed, new_tokens)
        # Runs write over the oldest queries of a log, and a policy reads as many as are wanted.
        cache.log = None
        if (look := _observed(drafter)) is not None:
            cache.log = copy.deepcopy(log)
            cache.log.wanted = look.observed_queries
        done = decoding.generate(
            self.pair.target,
            prompt,
            drafter,
            cache=cache,
            gamma=gamma,
            controller=Controller() if label.endswith(f":{AUTO}") else None,
            max_new_tokens=new_tokens or self.settings.new_tokens,
            sampling=self.measured.sampling,
            stop_tokens=self.stops,
            generator=torch.Generator(prompt.device).manual_seed(seed),
        )
        cache.log = None
        inner = None
        if hasattr(drafter, "inner_rounds"):
            inner = drafter.inner_rounds, drafter.inner_drafted, drafter.inner_accepted
        counts = len(done.rounds), done.drafted, done.accepted
        seconds = done.decode_seconds, done.seconds["prefill"]
        return Outcome(done.tokens, *counts, *seconds, inner)

    def _transformers(self, name, gamma, prompt, cache, seed, new_tokens) -> Outcome:
        from transformers import GenerationConfig

        from bdlib import serving

        ways: dict[str, Any] = {}
        if name == "prompt-lookup":
            ways = {"prompt_lookup_num_tokens": gamma, "max_matching_ngram_size": 3}
        elif name != "generate":
            ends = self.pair.target.config.eos_token_ids
            own = {} if name == "assisted-own" else serving.assistant_settings(gamma, ends)
            self._assistant.generation_config = GenerationConfig(**own)
            ways = {"assistant_model": self._assistant}
        ways["max_new_tokens"] = new_tokens or self.settings.new_tokens
        return self.theirs.decode(prompt, cache, self.measured.sampling, self.stops, seed, **ways)

    def about(self, label: str) -> dict[str, Any]:
        """What a record says of a method itself; after it has run."""
        name, gamma = self.chosen[label]
        drafter, target = self.drafters[label], self.pair.target
        policy = getattr(drafter, "policy", None)
        model = getattr(drafter, "model", None) or getattr(drafter, "inner", drafter)
        model = getattr(model, "model", model)  # of the small one in a hierarchy
        out = {
            "method": label,
            "engine": "transformers" if name in TRANSFORMERS else "bdlib",
            "gamma": None if name in ("plain", "generate") else gamma,
            "policy": None if policy is None else policy.name,
            "budget": None if policy is None else drafter.budget or self.settings.context,
            "kv_bytes_drafter": 0 if drafter is None else drafter.kv_bytes,
            "kv_bytes_target": target.config.kv_bytes(self.settings.context, target.dtype),
            "weight_bytes_drafter": model.weight_bytes() if hasattr(model, "weight_bytes") else 0,
        }
        if name.startswith("assisted"):
            small = self._standalone()
            entries = self.settings.context
            out |= {
                "gamma": gamma if name == "assisted" else 20,
                "policy": "full",
                "budget": entries,
                "kv_bytes_drafter": small.config.kv_bytes(entries, small.dtype),
                # exported with the target's whole head
                "weight_bytes_drafter": sum(
                    p.numel() * p.element_size()
                    for p in self._assistant.parameters()
                    if p.dim() == 2
                ),
            }
        return out


def _observed(drafter: Drafter | None) -> Policy | None:
    """The policy whose queries the target's cache must log for a drafter, if it must."""
    look = None if drafter is None else drafter.observe
    return None if look is None or look.observe == "none" else look


# -------------------------------------------------------------------------- all of them


def compare(
    settings: BaselineSettings,
    pair: Pair | None = None,
    documents: Sequence[Document] | None = None,
    done: Sequence[Mapping[str, Any]] = (),
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Decode every prompt with every method; a record (:data:`FIELDS`) for each.

    Parameters
    ----------
    pair, documents
        Loaded already, instead of what the settings name.
    done
        Records of an earlier run with these settings: what they hold is not measured again.
    keep
        Called with the new records of a prompt when all its methods have run.
    progress
        Called with a few words before each decoding.

    Raises
    ------
    ValueError
        For texts that are missing or too short, a context beyond the target's positions, methods that
        cannot be made; all before anything is decoded. For a broken bound
        (:func:`bdlib.measure.check_bound`).
    """
    from bdlib import corpora

    measured, say = settings.measured(), progress or (lambda words: None)
    documents = corpora.load_texts(settings.text) if documents is None else documents
    pair = measure.load(measured) if pair is None else pair
    if settings.context > pair.target.config.max_positions:
        raise ValueError(
            f"context {settings.context} is beyond the target's {pair.target.config.max_positions}"
            " positions; load the pair with load_pair(..., context=N)"
        )
    prompts = measure._prompts(measured, pair.tokenizer, documents)
    had = {(record["method"], record["sample"]) for record in done}
    missing = {
        index: [label for label in settings.chosen() if (label, index) not in had]
        for index in range(len(prompts))
    }
    if not any(missing.values()):
        return list(done)
    say("loading")
    contest = Contest(settings, pair)
    _warm_up(contest, prompts[0][2])
    records = list(done)
    for index, (document, offset, prompt) in enumerate(prompts):
        if not missing[index]:
            continue
        labels = ["plain", *(label for label in missing[index] if label != "plain")]
        found = _one_prompt(contest, labels, prompt.to(pair.device), index, say)
        where = {"sample": index, "document": document.name, "offset": offset}
        fresh = [where | record for record in found if record["method"] in missing[index]]
        fresh = [{name: record[name] for name in FIELDS} for record in fresh]
        for record in fresh:
            # Lookup has drafts of settings.gamma, a method may have others: its bound is apart.
            own = {"ngram_acceptance_rate": None, "ngram_accepted_length": 1.0}
            measure.check_bound(record | {"gamma": record["gamma"] or 0} | own)
        records += fresh
        if keep is not None:
            keep(fresh)
    return records


def _warm_up(contest: Contest, prompt: torch.Tensor) -> None:
    """Each method once, on the beginning of a prompt: nothing measured pays for first-time set-up."""
    prompt = prompt[:128].to(contest.pair.device)
    filled = contest.fill(prompt)
    most = contest.settings.new_tokens
    for label, (_, gamma) in contest.chosen.items():
        contest.decode(label, prompt, filled, new_tokens=min(gamma + 2, most))


def _one_prompt(
    contest: Contest, labels: Sequence[str], prompt: torch.Tensor, index: int, say: Callable
) -> list[dict[str, Any]]:
    settings = contest.settings
    filled = contest.fill(prompt)
    turns: list[dict[str, Outcome]] = []
    for repeat in range(settings.repeats):
        turn = {}
        seed = settings.seed + index
        if not contest.measured.sampling.greedy:  # another text each turn: times average over them
            seed += repeat * settings.samples
        for label in labels if repeat % 2 == 0 else reversed(labels):
            say(f"prompt {index + 1} of {settings.samples}, turn {repeat + 1}: {label}")
            turn[label] = contest.decode(label, prompt, filled, seed)
        turns.append(turn)
    cache = next(iter(filled.values())).cache
    plain = turns[0]["plain"]
    return [
        contest.about(label)
        | _figures([turn[label] for turn in turns], [turn["plain"] for turn in turns])
        | _text(contest, prompt, turns[0][label].tokens)
        | _agreement(contest, label, cache, prompt, plain.tokens, turns[0][label].tokens)
        | {"prompt_tokens": len(prompt)}
        for label in labels
    ]


def _agreement(
    contest: Contest,
    label: str,
    cache: KVCache,
    prompt: torch.Tensor,
    plain: list[int],
    tokens: list[int],
) -> dict[str, Any]:
    found = measure._agreement(contest.measured, contest.pair, cache, prompt, plain, tokens)
    short = [one["shortfall"] for one in found["divergence_list"]]
    limit = measure.NEAR_TIE[str(contest.pair.dtype).removeprefix("torch.")]
    if contest.chosen[label][0] in TRANSFORMERS:
        limit *= OTHER_ENGINE
    if found["near_ties_only"] is not None:
        found["near_ties_only"] = all(s < limit for s in short)
        found["max_shortfall"] = max(short, default=0.0)
    return {"max_shortfall": None} | found


def _figures(runs: Sequence[Outcome], plain: Sequence[Outcome]) -> dict[str, Any]:
    first, inner = runs[0], runs[0].inner
    a_token = [run.seconds / len(run.tokens) for run in runs]
    plain_token = [run.seconds / len(run.tokens) for run in plain]
    ratios = [theirs / ours for theirs, ours in zip(plain_token, a_token, strict=True)]
    return {
        "tokens": len(first.tokens),
        "rounds": first.rounds,
        "drafted": first.drafted,
        "accepted": first.accepted,
        "acceptance_rate": first.accepted / first.drafted if first.drafted else None,
        "accepted_length": len(first.tokens) / first.rounds,
        "inner_acceptance_rate": inner[2] / inner[1] if inner and inner[1] else None,
        "inner_rounds": inner[0] if inner else None,
        "seconds": statistics.median(run.seconds for run in runs),
        "tokens_per_second": 1 / statistics.median(a_token),
        "speedup": statistics.median(ratios),
        "drafter_prefill_seconds": statistics.median(run.drafter_prefill_seconds for run in runs),
    }


def _text(contest: Contest, prompt: torch.Tensor, tokens: Sequence[int]) -> dict[str, Any]:
    rate, length = measure.ngram_acceptance(prompt, tokens, contest.settings.gamma)
    return {
        "stopped": tokens[-1] in contest.stops,
        "distinct_2": measure.distinct_n(tokens, 2),
        "ngram_acceptance_rate": rate,
        "ngram_accepted_length": length,
    }


# -------------------------------------------------------------------------- what it adds up to


def _by_document(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Means over the samples of each document, undefined values left out."""
    found: dict[str, list[float]] = {}
    for record in records:
        if record[name] is not None:
            found.setdefault(record["document"], []).append(record[name])
    return [statistics.fmean(values) for values in found.values()]


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a method, in the order in which they first appear.

    ``speedup`` and ``tokens_per_second`` are medians over documents, ``acceptance_rate``,
    ``inner_acceptance_rate``, ``accepted_length``, ``distinct_2``, ``ngram_acceptance_rate`` means;
    each is a :class:`bdlib.measure.Interval` with its 95 % bootstrap interval. Bytes are the largest,
    ``divergences`` the sum, ``identical`` and ``near_ties_only`` whether all are.
    """
    if not records:
        raise ValueError("there are no records to add up")
    rows = []
    for method in dict.fromkeys(record["method"] for record in records):
        of = [record for record in records if record["method"] == method]
        row: dict[str, Any] = {name: of[0][name] for name in ("method", "engine", "gamma")}
        row["samples"] = len(of)
        for name in ("speedup", "tokens_per_second"):
            row[name] = measure.interval(_by_document(of, name), median=True)
        for name in (
            "acceptance_rate",
            "inner_acceptance_rate",
            "accepted_length",
            "distinct_2",
            "ngram_acceptance_rate",
        ):
            row[name] = measure.interval(_by_document(of, name))
        for name in ("kv_bytes_drafter", "kv_bytes_target", "weight_bytes_drafter"):
            row[name] = max(record[name] for record in of)
        known = [record for record in of if record["identical"] is not None]
        for name, rule in (("identical", all), ("near_ties_only", all), ("divergences", sum)):
            row[name] = rule(record[name] for record in known) if known else None
        rows.append(row)
    return rows


def ratio(records: Sequence[Mapping[str, Any]], method: str, over: str) -> measure.Interval:
    """How many times faster than another: the median over documents of paired ratios of speed.

    Raises
    ------
    ValueError
        If the two have no document in common.
    """
    speed = {(r["method"], r["sample"]): r["tokens_per_second"] for r in records}
    pairs = [
        {"document": r["document"], "ratio": r["tokens_per_second"] / speed[over, r["sample"]]}
        for r in records
        if r["method"] == method and (over, r["sample"]) in speed
    ]
    if not pairs:
        raise ValueError(f"no prompt was decoded with both {method!r} and {over!r}")
    return measure.interval(_by_document(pairs, "ratio"), median=True)


def _plain(found: measure.Interval, digits: int = 2) -> str:
    return "-" if found.mean is None else f"{found.mean:.{digits}f}"


def _spread(found: measure.Interval) -> str:
    text = _plain(found)
    return text if found.low is None else f"{text} ({found.low:.2f}-{found.high:.2f})"


def _same(row: Mapping[str, Any]) -> str:
    if row["identical"] is None:
        return "-"
    if row["identical"]:
        return "yes"
    return f"{row['divergences']} near-tie(s)" if row["near_ties_only"] else "NO"


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The comparison for people: a line a method, with its 95 % interval over documents."""
    head = ("method", "speed-up", "tokens/s", "accepted", "tok/round", "lookup", "dist-2")
    rows = [(*head, "drafter KV MB", "as plain")]
    rows += [
        (
            row["method"],
            _spread(row["speedup"]),
            *(
                _plain(row[name], digits)
                for name, digits in (
                    ("tokens_per_second", 1),
                    ("acceptance_rate", 2),
                    ("accepted_length", 2),
                    ("ngram_acceptance_rate", 2),
                    ("distinct_2", 2),
                )
            ),
            f"{row['kv_bytes_drafter'] / 1e6:.1f}",
            _same(row),
        )
        for row in summarise(records)
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


# -------------------------------------------------------------------------------- files


def run(
    settings: BaselineSettings,
    out: str | os.PathLike[str],
    command: str = "bdlib.baselines.run",
    progress: Callable[[str], None] | None = None,
    **given: Any,
) -> list[dict[str, Any]]:
    """:func:`compare` into a CSV file and its JSON sidecar; what a stopped run has measured stays.

    The file is written anew after every prompt. A second run with the same settings measures what is
    missing, more methods or more samples too.

    Raises
    ------
    ValueError
        If the file cannot be written, or holds results of other settings; see :func:`compare`.
    """
    out = measure.check_output(out)
    if out.suffix != ".csv":
        raise ValueError(f"out {out.name!r} must end in .csv")
    sidecar = out.with_suffix(".json")
    about = {"kind": "baselines", "schema": SCHEMA, "command": command}
    about |= {"settings": _named(settings), "columns": FIELDS, "drafters": _digests(settings)}
    records: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    if out.exists():
        records, before = load(out)
        _check_same(before, about, out.name)
        runs = before["runs"]
    here = measure.provenance()
    if here not in runs:
        runs = [*runs, here]

    def keep(fresh: list[dict[str, Any]]) -> None:
        records.extend(fresh)
        methods = list(dict.fromkeys(record["method"] for record in records))
        _write(out, records)
        measure.write_json(
            sidecar, about | {"methods": methods, "seeds": [settings.seed], "runs": runs}
        )

    compare(settings, done=list(records), keep=keep, progress=progress, **given)
    return records


def _named(settings: BaselineSettings) -> dict[str, Any]:
    """The settings without a place of this machine, and without what a later run may add to."""
    out = asdict(settings)
    for name in ("methods", "drafters"):
        out.pop(name)
    return out | {name: measure._label(out[name]) for name in ("text", "pair")}


def _digests(settings: BaselineSettings) -> dict[str, str]:
    from bdlib.sweeps import _digest

    names = {_trained(name) for name, _ in settings.chosen().values()}
    names.add(settings.standalone)
    return {n: _digest(path) for n, path in _folders(settings.drafters).items() if n in names}


def _check_same(before: Mapping[str, Any], about: dict[str, Any], name: str) -> None:
    changed = [
        f"{key} {before['settings'].get(key)!r}"
        for key, value in about["settings"].items()
        if key != "samples" and before["settings"].get(key) != value
    ]
    changed += [
        f"another drafter {key!r}"
        for key, digest in about["drafters"].items()
        if before["drafters"].get(key, digest) != digest
    ]
    if changed:
        raise ValueError(f"{name} holds results with {', '.join(changed)}; give another file")
    about["drafters"] = before["drafters"] | about["drafters"]


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    from bdlib.sweeps import _write_csv

    order = {record["method"]: i for i, record in reversed(list(enumerate(records)))}
    _write_csv(path, sorted(records, key=lambda r: (r["sample"], order[r["method"]])), FIELDS)


def load_all(
    paths: Iterable[str | os.PathLike[str]],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Records of several files (other texts, the same settings), and what they say of themselves.

    Samples are numbered on, so that each prompt keeps a number of its own. What is said is the last
    file's, but for ``runs``, which are all of them. See :func:`load`.

    Raises
    ------
    ValueError
        If there are no files.
    """
    records: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    for path in paths:
        found, about = load(path)
        runs += [run for run in about.get("runs", ()) if run not in runs]
        before = 1 + max((r["sample"] for r in records), default=-1)
        records += [r | {"sample": before + r["sample"]} for r in found]
    if not records:
        raise ValueError("there are no files of a comparison")
    return records, about | {"runs": runs}


def load(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Records of a file of :func:`run`, and its sidecar.

    Raises
    ------
    ValueError
        If the file or the JSON file of the same name is missing, damaged, or of another kind or schema.
    """
    path = Path(path).expanduser()
    try:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf8"))
        with path.open(encoding="utf8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} and its JSON file cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("kind") != "baselines":
        raise ValueError(f"{path.name} is no comparison of methods")
    if about.get("schema") != SCHEMA:
        raise ValueError(
            f"{path.name}: results of schema {about.get('schema')!r}, this version reads {SCHEMA}"
        )
    try:
        return [{name: _parsed(name, row[name]) for name in FIELDS} for row in rows], about
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged: {error!r}") from error


def _parsed(name: str, field: str) -> Any:
    if field == "":
        return None
    if name in _NAMES:
        return field
    if name in _FLAGS:
        return {"true": True, "false": False}[field]
    return int(field) if field.lstrip("-").isdigit() else float(field)
