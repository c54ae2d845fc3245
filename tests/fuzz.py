"""Random decodings of tiny models, against what has to hold of every one.

``python tests/fuzz.py --cases 10000`` (``make fuzz``) tries as many; the tests try the first 500. All of
a case follows from its number, so the line that is printed for one that fails repeats it. Models are
in float64: rows of many and rows of one then round alike to far less than any gap between two logits.

Of every decoding: greedy output is the argmax of the target's logits over the whole text, without a
cache; sampled output is possible at each place, and the same again with the same seed; rounds add up,
and no more than one token beyond the accepted comes out of each; caches hold what they say, never more
than their budget, and no position twice. A setting that cannot be is a ValueError that names it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import tiny
import torch

from bdlib import models
from bdlib.cache import KVCache, SparseKVCache
from bdlib.controllers import Arms, Choice, Controller, ControllerSettings
from bdlib.decoding import Generation, decode
from bdlib.drafters import Drafter, ModelDrafter, NGramDrafter, SelfDrafter, prefill
from bdlib.sampling import Sampling
from bdlib.selection import POLICIES, Policy, make_policy
from bdlib.transformer import Decoder, DecoderConfig

EDGES = (1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)  # of chunks, windows, alignment
LONG = (126, 127, 128, 129, 130)  # as many queries take another path through attention
FAMILIES: tuple[dict[str, Any], ...] = (
    {"model_type": "llama"},
    {"model_type": "llama", "attention_bias": True, "output_bias": True, "mlp_bias": True},
    {"model_type": "mistral"},
    {"model_type": "qwen2", "attention_bias": True},
    {"model_type": "qwen3", "qk_norm": True},
)


# ------------------------------------------------------------------ making cases


def random_rope(rng: random.Random, positions: int) -> dict[str, Any]:
    kind = rng.choice(("default", "default", "linear", "llama3", "yarn"))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": rng.choice((50.0, 1e4, 5e5))}
    if kind != "default":
        rope["factor"] = rng.choice((1.5, 2.0, 8.0))
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = max(1, int(positions / rope["factor"]))
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": rng.choice((2.0, 4.0))}
    return rope


def random_config(rng: random.Random, vocabulary: int, positions: int) -> DecoderConfig:
    kv_heads = rng.choice((1, 1, 2, 3))
    return DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=2 * rng.randint(4, 16),
        intermediate_size=rng.randint(5, 40),
        num_layers=rng.choice((1, 1, 2, 3)),
        num_heads=kv_heads * rng.choice((1, 2, 3)),
        num_kv_heads=kv_heads,
        head_dim=rng.choice((2, 4, 6, 8, 16)),
        max_positions=positions,
        rope=random_rope(rng, positions),
        tie_embeddings=rng.random() < 0.5,
        **rng.choice(FAMILIES),
    )


def random_model(rng: random.Random, config: DecoderConfig) -> Decoder:
    made = Decoder.random(config, seed=rng.randrange(10_000), dtype=torch.float64)
    for layer in made.layers:  # sharper attention: which entries are kept then matters more
        layer.qkv.weight[: config.num_heads * config.head_dim] *= rng.choice((1.0, 4.0))
    return made


def random_policy(rng: random.Random) -> Policy:
    name = rng.choice(list(POLICIES))
    settings: dict[str, Any] = {}
    if rng.random() < 0.4:
        settings = {
            "sink_window": {"sinks": rng.choice((0, 1, 9))},
            "chunk_topk": {"chunk_size": rng.choice((1, 3, 8))},
            "chunk_topk_recent": {
                "chunk_size": rng.choice((1, 3, 8)),
                "recent": rng.choice((0.01, 0.5, 1.0)),
            },
            "random": {"seed": rng.randrange(9), "chunk_size": rng.choice((1, 5))},
            "snapkv": {"pool": rng.choice((1, 3, 13))},
        }.get(name, {})
    return make_policy(name, **settings)


def random_sampling(rng: random.Random) -> Sampling:
    if rng.random() < 0.6:
        return Sampling()
    return Sampling(
        rng.choice((1e-3, 0.3, 0.7, 1.0, 2.5)),
        top_k=rng.choice((0, 0, 1, 2, 7, 99)),
        top_p=rng.choice((1.0, 1.0, 0.05, 0.5, 0.9)),
    )


class Scripted:
    """A controller whose choices are drawn beforehand."""

    settings = ControllerSettings()

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def start(self, arms, max_new_tokens):
        self.rng, self.arms = random.Random(self.seed), len(arms)
        self.off = self.rng.choice((0.1, 0.5, 0.9))

    def choose(self, left):
        gamma = 0 if self.rng.random() < self.off else self.rng.randint(1, 9)
        return Choice(gamma, self.rng.randrange(self.arms), "drawn")

    def record(self, one):
        pass


@dataclass
class Case:
    """One decoding; ``drafter`` and ``controller`` make new ones."""

    target: Decoder
    prompt: torch.Tensor
    new_tokens: int
    capacity: int
    piece: int
    policy: Policy
    kind: str
    drafter: Callable[[], Drafter | None]
    gamma: int
    control: str
    controller: Callable[[], Any]
    sampling: Sampling
    stops: set[int]
    seed: int


def random_case(rng: random.Random) -> Case:
    length = rng.choice(LONG) if rng.random() < 0.04 else rng.choice((*EDGES, rng.randint(1, 80)))
    new_tokens = rng.choice((1, 2, 3, 8, rng.randint(1, 20)))
    end = length + new_tokens - 1  # the last token is never fed
    capacity = end + rng.choice((0, 0, 1, 64))
    vocabulary = rng.choice((2, 3, 11, 23, 70))
    target = random_model(rng, random_config(rng, vocabulary, end + rng.choice((0, 200))))
    prompt = torch.tensor([rng.randrange(vocabulary) for _ in range(length)])
    if length > 5 and rng.random() < 0.4:  # text that repeats, for lookup
        prompt[length // 2 :] = prompt[: length - length // 2].clone()
    kind = rng.choice(("self", "model", "model", "feature", "ngram", "arms", "none"))
    policy = random_policy(rng)
    maker = partial(random_drafter, rng, target, policy, capacity)
    if kind == "none":
        drafter = lambda: None  # noqa: E731
    elif kind == "arms":
        parts = [maker(rng.choice(("self", "model", "ngram"))) for _ in range(rng.randint(1, 3))]
        drafter = lambda: Arms([part() for part in parts])  # noqa: E731
    else:
        drafter = maker(kind)
    control = "none" if kind == "none" else rng.choice(("none", "none", "scripted", "real"))
    settings = ControllerSettings(
        max_gamma=rng.choice((1, 3, 12)),
        max_loss=rng.choice((0.025, 1.0)),  # 1: it may try a lot
        probe_after=rng.choice((1, 8)),
        recheck=rng.choice((1, 96)),
    )
    drawn = rng.randrange(10_000)
    controllers = {"none": lambda: None, "scripted": lambda: Scripted(drawn)}
    stops = rng.choice(((), (), (rng.randrange(vocabulary),), range(vocabulary // 2), (10**6,)))
    return Case(
        target=target,
        prompt=prompt,
        new_tokens=new_tokens,
        capacity=capacity,
        piece=rng.choice((1, 2, 5, 8, 1024, 1024)),
        policy=policy,
        kind=kind,
        drafter=drafter,
        gamma=rng.choice((1, 1, 2, 3, 4, 5, 8, 16)),
        control=control,
        controller=controllers.get(control, lambda: Controller(settings)),
        sampling=random_sampling(rng),
        stops=set(stops),
        seed=rng.randrange(10_000),
    )


def random_drafter(
    rng: random.Random, target: Decoder, policy: Policy, capacity: int, kind: str
) -> Callable[[], Drafter]:
    """Makes new drafters of one kind on the same weights; the budget is anything allowed."""
    if kind == "ngram":
        longest = rng.randint(1, 5)
        return partial(NGramDrafter, longest, rng.randint(1, longest))
    least = getattr(policy, "chunk_size", 1)
    budget = max(least, rng.choice((1, 2, 5, 8, 9, 13, 16, 24, 40, 64, 300)))
    if policy.name == "full":
        budget = capacity + rng.choice((0, 1, 50))
    refresh = rng.choice((None, None, 1, 2, 3, 7))
    if kind == "self":
        return partial(SelfDrafter, target, policy, budget, refresh)
    model = random_feature(rng, target) if kind == "feature" else random_second(rng, target)
    piece = rng.choice((1, 3, 8, 1024))
    return partial(ModelDrafter, model, policy, rng.choice((budget, budget, None)), refresh, piece)


def random_rows(rng: random.Random, vocabulary: int) -> torch.Tensor | None:
    """A draft vocabulary, or all of it."""
    if rng.random() < 0.5:
        return None
    return torch.tensor(sorted(rng.sample(range(vocabulary), rng.randint(1, vocabulary))))


def random_second(rng: random.Random, target: Decoder) -> Decoder:
    """A model of another shape, or the target with noise, which is right now and then."""
    c = target.config
    if rng.random() < 0.5:
        model = random_model(rng, random_config(rng, c.vocab_size, c.max_positions))
    else:
        model = tiny.perturbed(target, rng.choice((0.02, 0.1, 0.3)), seed=rng.randrange(99))
    if (rows := random_rows(rng, c.vocab_size)) is not None:
        models.restrict_head(model, rows)
    return model.requires_grad_(False)


def random_feature(rng: random.Random, target: Decoder) -> Decoder:
    layers = range(target.config.num_layers)
    taps = tuple(sorted(rng.sample(layers, rng.randint(1, len(layers)))))
    rows = random_rows(rng, target.config.vocab_size)
    model = models.conditioned_on(target, taps, rows, rng.choice((1, 2)), rng.randrange(99))
    return model.double().requires_grad_(False)


# ------------------------------------------------------------------ what has to hold


def check_caches(drafter: Drafter | None) -> None:
    """Within the budget, no position twice, the recent part in order and behind all others."""
    for one in getattr(drafter, "drafters", (drafter,)):
        cache: SparseKVCache | None = getattr(one, "cache", None)
        if cache is None:
            continue
        assert cache.size <= cache.budget, f"{cache.size} entries, budget {cache.budget}"
        assert one.kv_entries <= cache.budget, f"{one.kv_entries} entries, budget {cache.budget}"
        recent = cache._recent
        assert all(a < b for a, b in pairwise(recent)), recent
        for layer in range(cache.config.num_layers):
            held = cache.positions(layer)
            ordered = held.sort(-1).values
            assert (ordered.diff(dim=-1) > 0).all(), f"positions are not distinct: {held}"
            assert held.numel() == 0 or 0 <= int(held.min()) <= int(held.max()) < cache.length


def check_rounds(result: Generation, case: Case, controlled: bool) -> None:
    """Rounds add up, and nothing comes out of one that was not accepted or the target's own."""
    left = case.new_tokens
    for number, one in enumerate(result.rounds):
        assert one.index == number
        assert len(one.drafted) <= min(one.gamma, left - 1), one
        assert controlled or one.gamma in (0, case.gamma), one
        assert 1 <= len(one.emitted) <= one.accepted + 1 <= len(one.drafted) + 1, one
        assert one.emitted[: one.accepted] == one.drafted[: one.accepted][: len(one.emitted)], one
        assert not case.stops & set(one.emitted[:-1]), one
        if len(one.emitted) <= one.accepted:
            assert one.emitted[-1] in case.stops, one
        elif one.accepted < len(one.drafted):
            assert one.kind == "corrected"
            assert case.sampling.temperature or one.emitted[-1] != one.drafted[one.accepted], one
        else:
            assert one.kind == ("bonus" if one.drafted else "plain")
        left -= len(one.emitted)
    assert left == 0 or result.tokens[-1] in case.stops
    rounds, drafted = len(result.rounds), result.drafted
    rate = result.accepted / drafted if drafted else 0.0
    most = max(one.gamma for one in result.rounds)
    assert len(result.tokens) <= rounds + result.accepted
    assert len(result.tokens) / rounds <= 1 + most * rate + 1e-12


@torch.inference_mode()
def check_text(tokens: list[int], case: Case) -> None:
    """Each token against the target's logits after all before it, in one pass without a cache.

    For greedy decoding this is plain decoding token by token: if every token is the favourite after
    the ones before it, then so was the first, and the second after it, and so on.
    """
    text = torch.cat((case.prompt, torch.tensor(tokens)))
    logits = case.target(text[None, :-1])[0, len(case.prompt) - 1 :]
    if case.sampling.greedy:
        assert tokens == logits.argmax(-1).tolist(), "not what greedy decoding gives"
        return
    chance = case.sampling.probs(logits)[torch.arange(len(tokens)), text[len(case.prompt) :]]
    assert (chance > 0).all(), "a token that the target cannot sample"


def run(
    case: Case, drafter: Drafter | None, cache: KVCache | None = None
) -> tuple[Generation, KVCache]:
    """Decode, looking at the caches after each round."""
    controller = case.controller()
    if cache is None:
        needs = {} if drafter is None else {"observe": drafter.observe, "taps": drafter.taps}
        cache = prefill(case.target, case.prompt, case.capacity, piece=case.piece, **needs)
    length = len(case.prompt)
    assert cache.length == length - 1
    result = Generation(length, case.gamma)
    for one in decode(
        case.target, cache, case.prompt, drafter, gamma=case.gamma, controller=controller,
        max_new_tokens=case.new_tokens, sampling=case.sampling, stop_tokens=case.stops,
        generator=torch.Generator().manual_seed(case.seed),
    ):  # fmt: skip
        result.rounds.append(one)
        assert cache.length == length + len(result.tokens) - 1
        check_caches(drafter)
    check_rounds(result, case, controller is not None)
    check_text(result.tokens, case)
    return result, cache


def check_decoding(rng: random.Random) -> Counter:
    """A whole case; counts of what happened in it."""
    case = random_case(rng)
    drafter = case.drafter()
    first, cache = run(case, drafter)
    repeats = case.control != "real"  # whose choices follow measured times
    if rng.random() < 0.5:  # a new drafter, the same seed
        again, _ = run(case, case.drafter())
        same = again.tokens == first.tokens
        assert same or not (repeats or case.sampling.greedy), "the same seed, another output"
        if repeats:
            drafts = [[one.drafted for one in found.rounds] for found in (first, again)]
            assert drafts[0] == drafts[1], "the same seed, other drafts"
    else:  # the same drafter and cache once more
        cache.rewind(len(case.prompt) - 1)
        again, _ = run(case, drafter, cache)
        assert again.tokens == first.tokens or not (repeats or case.sampling.greedy)
    stopped = len(first.tokens) < case.new_tokens
    return Counter(
        {
            f"drafter {case.kind}": 1,
            f"policy {case.policy.name}": case.kind not in ("ngram", "none"),
            f"controller {case.control}": 1,
            f"rope {case.target.config.rope['rope_type']}": 1,
            f"family {case.target.config.model_type}": 1,
            "sampled": not case.sampling.greedy,
            "stopped": stopped,
            "accepted": first.accepted,
            "rejected": first.drafted - first.accepted,
        }
    )


# ------------------------------------------------------------------ what cannot be


def refusals(rng: random.Random) -> dict[str, tuple[Callable[[], object], str]]:
    """Settings that cannot be: what is done with each, and what the error has to say."""
    target = tiny.model(num_layers=rng.choice((1, 2)))
    prompt, window = tiny.text(rng.randint(3, 20)), make_policy("sink_window")
    below = rng.choice((0, -1, -rng.randint(2, 99)))
    part = rng.choice((0.5, 2.5, float("nan"), float("inf"), "4", True))
    number = rng.choice((below, part))
    far = rng.choice((-1, -7, target.config.vocab_size, 10**9))
    layer = rng.choice((-1, target.config.num_layers, 99))
    negative = rng.choice((-1, -0.5, float("nan"), float("inf"), -float("inf")))
    cold = rng.choice((negative, 1e-7, 1e-320))

    def decoding(drafter=None, **settings):
        cache = prefill(target, prompt, 60)
        return list(decode(target, cache, prompt, drafter, **{"max_new_tokens": 4, **settings}))

    def with_prompt(tokens):
        return lambda: prefill(target, tokens, 60)

    def with_config(**changes):
        return lambda: replace(tiny.CONFIG, **changes)

    def with_second(**changes):
        model = tiny.model(**changes)
        return lambda: decoding(ModelDrafter(model, window, 8))

    feature = models.conditioned_on(target, (0,)).double()
    size = rng.choice(("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"))
    whole = rng.choice((below, 2.5))
    return {
        "gamma": (lambda: decoding(gamma=number), f"gamma {number!r} must be"),
        "new tokens": (lambda: decoding(max_new_tokens=number), f"max_new_tokens {number!r} must"),
        "budget, self": (lambda: SelfDrafter(target, window, number), f"budget {number!r} must be"),
        "budget, model": (
            lambda: ModelDrafter(target, window, number),
            f"budget {number!r} must be",
        ),
        "less than a chunk": (
            lambda: SelfDrafter(target, make_policy("chunk_topk"), rng.randint(1, 7)),
            "must be at least one chunk of 8",
        ),
        "refresh": (
            lambda: rng.choice((SelfDrafter, ModelDrafter))(target, window, 8, number),
            f"refresh {number!r} must be",
        ),
        "piece": (lambda: prefill(target, prompt, 60, piece=number), f"piece {number!r} must be"),
        "drafter's piece": (
            lambda: ModelDrafter(target, window, 8, piece=number),
            f"piece {number!r} must be",
        ),
        "capacity": (lambda: prefill(target, prompt, number), f"capacity {number!r} must be"),
        "too small": (
            lambda: decoding(max_new_tokens=100),
            "cache of 60 tokens is too small: this decoding may reach",
        ),
        "longest": (lambda: NGramDrafter(number), "shortest <= longest"),
        "temperature": (lambda: Sampling(cold), f"temperature {cold} must be"),
        "top_k": (lambda: Sampling(1.0, top_k=-1), "top_k -1 must be"),
        "part of a token": (lambda: Sampling(1.0, top_k=part), f"top_k {part!r} must be"),
        "top_p": (lambda: Sampling(1.0, top_p=negative), f"top_p {negative} must be"),
        "no generator": (
            lambda: decoding(sampling=Sampling(1.0)),
            "sampling needs an explicit torch.Generator",
        ),
        "no prompt": (with_prompt(prompt[:0]), "prompt must hold at least one token"),
        "several prompts": (with_prompt(prompt[None]), "prompt must hold at least one token"),
        "numbers, not tokens": (with_prompt(prompt.double()), "prompt must hold token ids"),
        "unknown token": (
            with_prompt(torch.cat((prompt, torch.tensor([far])))),
            f"prompt holds token {far}, the model's vocabulary has 23",
        ),
        "another prompt": (
            lambda: list(decode(target, prefill(target, prompt, 60), tiny.text(40))),
            f"holds {len(prompt) - 1} tokens, a prompt of 40 needs 39",
        ),
        "taps": (
            lambda: prefill(target, prompt, 60, taps=(layer,)),
            f"taps {(layer,)} must be layers in 0",
        ),
        "no features": (
            lambda: decoding(ModelDrafter(feature, window, 8)),
            "this drafter reads (0,); prefill it with taps",
        ),
        "no queries": (
            lambda: decoding(SelfDrafter(target, make_policy("snapkv"), 8)),
            "policy 'snapkv' needs 32 recent queries",
        ),
        "positions": (
            with_second(max_positions=1),
            "is beyond the model's 1 positions",
        ),
        "another vocabulary": (
            with_second(vocab_size=rng.choice((9, 99))),
            "the target's vocabulary has 23 tokens, the drafter's",
        ),
        "nobody": (lambda: Arms([]), "there are no drafters to choose from"),
        "nothing to control": (
            lambda: decoding(controller=Controller()),
            "a controller needs a drafter",
        ),
        "controller": (
            lambda: ControllerSettings(max_gamma=number),
            f"max_gamma {number!r} must be",
        ),
        "policy": (lambda: make_policy("best"), "unknown policy 'best'; allowed: full"),
        "policy's setting": (
            lambda: make_policy("snapkv", sinks=4),
            "policy 'snapkv' has no setting 'sinks'; allowed: pool",
        ),
        "sinks": (lambda: make_policy("sink_window", sinks=-1), "sinks -1 must be"),
        "chunk": (
            lambda: make_policy(rng.choice(("chunk_topk", "random")), chunk_size=number),
            f"chunk_size {number!r} must be",
        ),
        "pool": (lambda: make_policy("snapkv", pool=number), f"pool {number!r} must be"),
        "full": (
            lambda: decoding(SelfDrafter(target, make_policy("full"), len(prompt) - 2)),
            f"policy 'full' needs a budget of {len(prompt) - 1}, got {len(prompt) - 2}",
        ),
        "size": (with_config(**{size: whole}), f"{size} {whole!r} must be"),
        "grouping": (with_config(num_heads=5), "num_heads 5 is not a multiple of num_kv_heads 2"),
        "odd head": (with_config(head_dim=5), "head_dim 5 is odd"),
        "rotation": (
            with_config(rope={"rope_type": "spiral", "rope_theta": 1e4}),
            "rope_type 'spiral' is not supported",
        ),
        "theta": (
            with_config(rope={"rope_type": "default", "rope_theta": below}),
            f"rope_theta {below!r} must be",
        ),
        "factor": (
            with_config(rope={"rope_type": "linear", "rope_theta": 1e4, "factor": below}),
            f"factor {below!r} must be",
        ),
    }  # fmt: skip


def check_refusal(rng: random.Random) -> Counter:
    """One setting that cannot be."""
    made = refusals(rng)
    name = rng.choice(list(made))
    action, message = made[name]
    try:
        with torch.inference_mode():
            action()
    except Exception as error:
        if not isinstance(error, ValueError) or message not in str(error):
            raise AssertionError(f"{name}: should be a ValueError with {message!r}") from error
    else:
        raise AssertionError(f"{name}: accepted, should be refused with {message!r}")
    return Counter({f"refused {name}": 1})


# ------------------------------------------------------------------ running many


def check(number: int) -> Counter:
    """Case ``number``; raises an AssertionError that says how to repeat it."""
    rng = random.Random(f"case {number}")
    try:
        return check_refusal(rng) if rng.random() < 0.15 else check_decoding(rng)
    except Exception as error:
        raise AssertionError(
            f"case {number}: {type(error).__name__}: {error}\n"
            f"again: python tests/fuzz.py --first {number} --cases 1"
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    seen, failures, began = Counter(), [], time.perf_counter()
    for number in range(chosen.first, chosen.first + chosen.cases):
        try:
            seen += check(number)
        except AssertionError as error:
            failures.append(number)
            print(f"FAILED {error}", flush=True)
            if chosen.cases == 1:
                traceback.print_exc()
        if (number + 1 - chosen.first) % 1000 == 0:
            seconds = time.perf_counter() - began
            print(f"{number + 1 - chosen.first} cases, {seconds:.0f} s", flush=True)
    for name, count in sorted(seen.items()):
        print(f"{count:8} {name}")
    print(f"{chosen.cases} cases, {len(failures)} failed {failures or ''}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
