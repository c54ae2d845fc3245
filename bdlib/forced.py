"""Teacher-forced agreement: how often, along a given text, a drafter would say what the target says.

No text is generated. The target reads a window once with its full cache; each drafter reads it once in
full and then replays the last positions in blocks under every view (:mod:`bdlib.views`), so a block's
tokens see the entries that a sparse cache would hold there and, causally, each other. Two figures a
position: top-1 agreement (the acceptance of greedy verification) and alpha = sum min(p, q) (that of
sampling at temperature 1, exact over the whole vocabulary).

On human text this is the fairest figure there is: free-running greedy text of a small target loops, and
a loop flatters any drafter. It is also quick, because one pass of the target serves every drafter and
every view.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bdlib import measure
from bdlib.decoding import GREEDY
from bdlib.drafters import HEAD, NGramDrafter, positions_read, prefill
from bdlib.models import FeatureDecoder
from bdlib.selection import make_policy
from bdlib.transformer import Decoder
from bdlib.views import View, drafted_view, full_stream

if TYPE_CHECKING:
    from bdlib.corpora import Document
    from bdlib.pairs import Pair

SCHEMA = 1


@dataclass(frozen=True)
class ForcedSettings:
    """What to measure.

    Attributes
    ----------
    drafters
        Folders of trained drafters.
    policies, budgets
        Every pair of them is a view; a budget of 0 stands for the full cache.
    context
        Tokens of each window.
    positions
        Positions at its end that are measured.
    block
        Tokens replayed together; a view's budget includes them.
    draft_steps
        Depth to which a feature-conditioned drafter runs on its own output.
    """

    drafters: tuple[str, ...]
    policies: tuple[str, ...] = ("chunk_topk_recent",)
    budgets: tuple[int, ...] = (256, 0)
    context: int = 4096
    positions: int = 256
    block: int = 64
    draft_steps: int = 4
    text: str = "embedded:held-out"
    samples: int = 4
    seed: int = 0
    pair: str = "smollm2"
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.drafters:
            raise ValueError("drafters () must name at least one folder")
        for name in ("context", "positions", "block", "samples", "draft_steps"):
            measure._whole(name, getattr(self, name), 1)
        if self.positions % self.block:
            raise ValueError(f"positions {self.positions} must be a multiple of block {self.block}")
        if self.context < self.positions + self.block:
            raise ValueError(
                f"context {self.context} must be at least {self.positions + self.block}:"
                f" {self.positions} positions and a block before them"
            )
        if self.draft_steps > self.block:
            raise ValueError(f"draft_steps {self.draft_steps} must be at most block {self.block}")
        for budget in self.budgets:
            if budget != 0 and budget <= self.block:
                raise ValueError(
                    f"budget {budget} must be 0 (the full cache) or above the block of {self.block}"
                )
        for policy in self.policies:
            make_policy(policy)

    def views(self) -> list[View]:
        """Every view once; the full cache is the same under any policy."""
        found = [
            View(budget, make_policy(policy))
            for policy in self.policies
            for budget in self.budgets
            if budget
        ]
        if 0 in self.budgets:
            found.append(View(self.context + self.block, make_policy("full")))
        return found


def along(*arguments: Any, **settings: Any) -> list[dict[str, Any]]:
    """All that :func:`walk` yields, as a list."""
    return list(walk(*arguments, **settings))


@torch.inference_mode()
def walk(
    target: Decoder,
    drafters: Mapping[str, Decoder],
    window: Tensor,
    views: Sequence[View] | Mapping[str, Sequence[View]],
    positions: int = 256,
    block: int = 64,
    draft_steps: int = 4,
) -> Iterator[dict[str, Any]]:
    """Agreement and alpha of every drafter under every view along one window ``[T]``.

    ``views`` are those of every drafter, or of each by its name.

    Yields
    ------
    dict
        ``drafter``, ``policy``, ``budget`` (``None`` for the full cache), ``agreement``, ``alpha``,
        ``by_step``: agreement of each draft step of a feature-conditioned drafter (else of the first),
        and ``ngram_agreement``, that of n-gram lookup at the same positions (no guess is a miss).
    """
    length = len(window)
    taps = sorted({t for d in drafters.values() for t in getattr(d, "taps", ())})
    window = window.to(target.device)
    # All but the last positions, then those: only they need logits.
    cache = prefill(target, window[: length - positions + 1], length, taps=tuple(taps))
    hidden = torch.cat(
        [target.hidden(part[None], cache) for part in window[-positions:].split(64)], 1
    )
    probs = torch.softmax(target.logits(hidden)[0].float(), -1)  # [positions, V]
    best = probs.argmax(-1)
    ngram = _ngram_agreement(window, best.tolist())
    for name, drafter in drafters.items():
        states, x, steps = None, None, 1
        read, stated = (t.to(target.device) for t in positions_read(length, drafter.reach))
        if len(read) < positions + HEAD:
            raise ValueError(
                f"positions {positions} do not fit into drafter {name!r}'s reach of {drafter.reach}"
            )
        tokens = window[read]
        starts = list(range(len(read) - positions, len(read), block))
        if isinstance(drafter, FeatureDecoder):
            chosen = [taps.index(t) for t in drafter.taps]
            states = drafter.states_of(cache.features(0, length)[0][stated][:, chosen])
            x, steps = drafter.inputs(tokens[None], states[None]), draft_steps
        stream = full_stream(drafter, tokens, x)
        scored = probs if drafter.vocabulary is None else probs[:, drafter.vocabulary]
        for view in views[name] if isinstance(views, Mapping) else views:
            outputs = drafted_view(drafter, tokens, stream, view, starts, block, states, steps)
            agreement, alpha = zip(*_compared(drafter, outputs, scored, best), strict=True)
            full = view.policy.name == "full"
            yield {
                "drafter": name,
                "policy": None if full else view.policy.name,
                "budget": None if full else view.budget,
                "agreement": agreement[0],
                "alpha": alpha[0],
                "by_step": list(agreement),
                "ngram_agreement": ngram,
            }


def _compared(
    drafter: Decoder, steps: Sequence[Tensor], scored: Tensor, best: Tensor
) -> Iterator[tuple[float, float]]:
    """Agreement and alpha of each draft step, from the states ``[blocks, n, C]`` it ended in.

    ``scored`` ``[positions, R]`` is what the target gives the tokens that the drafter scores, ``best``
    ``[positions]`` its favourites; step ``k`` has nothing to say of the first ``k`` slots of a block.
    """
    for step, hidden in enumerate(steps):
        blocks, n = hidden.shape[:2]
        logits = drafter.logits(hidden[:, step:].flatten(0, 1)).float()
        p, wanted = (t.unflatten(0, (blocks, n))[:, step:].flatten(0, 1) for t in (scored, best))
        guess = logits.argmax(-1)
        if drafter.vocabulary is not None:
            guess = drafter.vocabulary[guess]
        overlap = torch.minimum(p, torch.softmax(logits, -1)).sum(-1)
        yield float((guess == wanted).double().mean()), float(overlap.mean())


def _ngram_agreement(window: Tensor, ids: list[int]) -> float:
    """How often lookup's first guess is the target's choice at the last ``len(ids)`` positions."""
    tokens, right = window.tolist(), 0
    first = len(tokens) - len(ids)
    drafter = NGramDrafter()
    drafter.start(window[: first + 1], None, 0)
    for position, wanted in enumerate(ids, start=first):
        guess = drafter.propose(tokens[position], 1, GREEDY, None).tokens.tolist()
        right += guess == [wanted]
        drafter.commit(tokens[position + 1 : position + 2], 0)
    return right / len(ids)


def run(
    settings: ForcedSettings,
    pair: Pair | None = None,
    documents: Sequence[Document] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure; a dictionary that JSON can hold, with one record a window, drafter and view.

    ``summary`` has the mean over windows and its 95 % bootstrap interval for each drafter and view.

    Raises
    ------
    ValueError
        For texts, folders or a context that do not serve; each names the value.
    """
    from bdlib import corpora, models, pairs

    documents = corpora.load_texts(settings.text) if documents is None else documents
    if pair is None:
        pair = pairs.load_pair(
            settings.pair,
            device=settings.device,
            dtype=settings.dtype,
            context=settings.context,
        )
    drafters = {_name(path): models.load_drafter(path, pair.target) for path in settings.drafters}
    cut = corpora.windows(
        pair.tokenizer, documents, settings.context, settings.samples, settings.seed
    )
    records = []
    for number, (document, offset, window) in enumerate(cut):
        for row in along(
            pair.target,
            drafters,
            window,
            settings.views(),
            settings.positions,
            settings.block,
            settings.draft_steps,
        ):
            records.append({"sample": number, "document": document.name, "offset": offset} | row)
        if progress is not None:
            progress(number + 1)
    return {
        "schema": SCHEMA,
        "settings": asdict(settings)
        | {"drafters": list(drafters), "text": measure._label(settings.text)},
        "scaling": pair.scaling,
        "dtype": str(pair.dtype).removeprefix("torch."),
        "summary": summary(records),
        "records": records,
        **measure.provenance(),
    }


def _name(path: str | os.PathLike[str]) -> str:
    return Path(path).resolve().name


def summary(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and interval over windows of each drafter and view, in the order they came."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in records:
        key = record["drafter"], record["policy"], record["budget"]
        groups.setdefault(key, []).append(record)
    return [
        {
            "drafter": drafter,
            "policy": policy,
            "budget": budget,
            **{
                name: measure.interval([r[name] for r in rows])._asdict()
                for name in ("agreement", "alpha")
            },
            "by_step": [
                sum(r["by_step"][step] for r in rows) / len(rows)
                for step in range(len(rows[0]["by_step"]))
            ],
        }
        for (drafter, policy, budget), rows in groups.items()
    ]


def table(result: Mapping[str, Any]) -> str:
    """The summary as a few lines of text."""
    width = max(len(row["drafter"]) for row in result["summary"])
    lines = [f"{'drafter':<{width}}  {'policy':<18}{'budget':>7}  agreement              alpha"]
    for row in result["summary"]:
        view = f"{row['policy'] or 'full cache':<18}{row['budget'] or '':>7}"
        shown = []
        for name in ("agreement", "alpha"):
            found = row[name]
            spread = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
            shown.append(f"{found['mean']:.3f}{spread}")
        lines.append(f"{row['drafter']:<{width}}  {view}  {shown[0]:<22} {shown[1]}")
    return "\n".join(lines)
