"""Trained drafters as files: made from a target, saved without its embedding, loaded beside it.

The standalone drafter is the paper's kind (arXiv 2606.00144): a small Llama. Here it is cut out of the
target itself, as a few of its layers with its embedding and final norm, so it starts with a shared
vocabulary and some sense of the target's representations. It may score a *draft vocabulary*, the most
frequent tokens, instead of all of them: a smaller head is a cheaper draft step, and the target still
scores everything, so decoding stays lossless.

The feature-conditioned drafter (EAGLE-3's idea, arXiv 2503.01840) reads what the target has computed
already: next to each token, a mix of the target's residual streams one position earlier. One layer
then does what a standalone drafter needs several for; from the second draft step on it reads its own
output in place of the target's.

A drafter's folder holds ``drafter.json`` (shape, layers, provenance), ``drafter.safetensors`` (its own
weights; the target's frozen embedding is not copied) and ``README.md``, a model card. Matrices are
stored in 8 bits with a scale a row, half the size of bfloat16, and come back in the asked dtype; a few
rows at a time C computes from the 8 bits themselves (:meth:`bdlib.transformer.Linear.keep`). A
drafter that was trained on from another with some weights frozen holds the others alone, and names the
folder beside its own (``base``) that has the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlib.kernels import native
from bdlib.transformer import Decoder, DecoderConfig, Linear

SCHEMA = 1
CONFIG_FILE, WEIGHTS_FILE, SCALE = "drafter.json", "drafter.safetensors", ":scale"
SHIPPED = "data/checkpoints"  # in a checkout


def export(drafter: Decoder, folder: str | Path, target: Decoder) -> None:
    """Write a standalone drafter as a plain Hugging Face model with a full head.

    Tokens outside the draft vocabulary get the target's own rows, from which the trained ones started,
    so their scores are comparable.

    Raises
    ------
    ValueError
        For a feature-conditioned drafter: transformers has no model that reads another's states.
    """
    if isinstance(drafter, FeatureDecoder):
        raise ValueError(
            "a feature-conditioned drafter reads the target's states and cannot stand alone"
        )
    tied = drafter.vocabulary is None and drafter.config.tie_embeddings
    whole = Decoder(replace(drafter.config, tie_embeddings=tied))
    state = {"embedding": drafter.embedding.detach(), "final_norm": drafter.final_norm.detach()}
    head = drafter.head.dense()
    if drafter.vocabulary is not None:
        head = target.head.dense().to(drafter.dtype, copy=True)
        head[drafter.vocabulary] = drafter.head.dense()
    state["head.weight"] = head
    for name, module in drafter.layers.named_modules(prefix="layers"):
        if isinstance(module, Linear):  # packed matrices are in no state dictionary
            state[f"{name}.weight"] = module.dense()
    state |= {k: v for k, v in drafter.state_dict().items() if k not in state and "layers." in k}
    whole.load_state_dict(state, assign=True)
    whole.save(folder)


def draft_vocabulary(tokens: Iterable[Tensor], vocabulary: int, size: int) -> Tensor:
    """The ``size`` token ids a drafter should score, ascending ``[size]``; ties go to the smaller id.

    The most frequent ones of a mixture: half the counts in ``tokens``, half a prior for other kinds of
    text. A byte-pair tokenizer numbers its merges in the order of their frequency in the text that it
    was made from, so the prior is Zipf's law over the ids. Novels alone would miss the words of a
    meeting: of the target's probability there, 16,384 rows hold 85 % by counts, 91 % by the mixture.
    """
    if not 1 <= size <= vocabulary:
        raise ValueError(f"draft vocabulary of {size} tokens must be in 1..{vocabulary}")
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for part in tokens:
        counts += torch.bincount(part.flatten(), minlength=vocabulary)
    prior = 1 / (torch.arange(vocabulary, dtype=torch.float64) + 300)
    mixture = counts / counts.sum().clamp_min(1) + prior / prior.sum()
    return mixture.sort(descending=True, stable=True).indices[:size].sort().values


def cut_from(target: Decoder, layers: Iterable[int], vocabulary: Tensor | None = None) -> Decoder:
    """A standalone drafter from some layers of a target (not packed), in float32 for training.

    Parameters
    ----------
    layers
        Which layers to copy, in order.
    vocabulary
        Token ids the head scores, ascending ``[R]``; ``None`` scores all.
    """
    chosen = list(layers)
    for layer in chosen:
        if not 0 <= layer < target.config.num_layers:
            raise ValueError(f"layer {layer} must be in 0..{target.config.num_layers - 1}")
    config = replace(target.config, num_layers=len(chosen))
    with torch.device("meta"):
        drafter = Decoder(config)
    state = target.state_dict()
    wanted = {}
    for name in drafter.state_dict():
        source = name
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            source = f"layers.{chosen[int(index)]}.{rest}"
        if source not in state:
            raise ValueError(
                "the target is packed; load it with pack=False to cut a drafter from it"
            )
        wanted[name] = state[source].detach().float().clone()
    drafter.load_state_dict(wanted, assign=True)
    if config.tie_embeddings:
        drafter.head.weight = drafter.embedding
    trainable(drafter)
    if vocabulary is not None:
        restrict_head(drafter, vocabulary)
    return drafter


def trainable(drafter: Decoder) -> Decoder:
    """Let everything but the embedding, which is the target's, be trained; returns the drafter."""
    for name, parameter in drafter.named_parameters():
        parameter.requires_grad_(name != "embedding")
    return drafter


class FeatureDecoder(Decoder):
    """One or a few layers on token embeddings and the target's states.

    Slot ``t`` reads token ``t`` and the state of position ``t - 1`` and predicts token ``t + 1``; the
    state of slot 0, which nothing precedes, is zero.

    Parameters
    ----------
    taps
        Layers of the target whose output is read, ascending.
    """

    def __init__(self, config: DecoderConfig, taps: tuple[int, ...]) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.taps = taps
        self.tap_norm = nn.Parameter(torch.ones(len(taps), width))
        self.embedding_norm = nn.Parameter(torch.ones(width))
        self.state_norm = nn.Parameter(torch.ones(width))
        self.fuse = Linear(len(taps) * width, width)
        self.mix = Linear(2 * width, width)

    def state(self, features: Tensor) -> Tensor:
        """One state for each position from the target's streams: ``[..., taps, C] -> [..., C]``."""
        wide = features.to(self._wide)
        if self.fuse.in_c and native.takes(rows := wide.flatten(0, -3)[None]):
            fused = native.normed_product(self.fuse, self.tap_norm, rows, self.config.rms_eps)
            return fused.view(*wide.shape[:-2], -1)
        normed = F.rms_norm(wide, wide.shape[-1:], None, self.config.rms_eps) * self.tap_norm
        return self.fuse(normed.flatten(-2).to(self.dtype)).to(self._wide)

    def inputs(self, tokens: Tensor, states: Tensor) -> Tensor:
        """The residual stream that enters the first layer: ``[B, n]`` and ``[B, n, C]``."""
        parts, norms = (self.embed(tokens), states), (self.embedding_norm, self.state_norm)
        if self.mix.in_c and native.takes(states):
            norm, both = torch.stack(norms), torch.stack(parts, -2)
            return native.normed_product(self.mix, norm, both, self.config.rms_eps)
        normed = [self._norm(part, weight) for part, weight in zip(parts, norms, strict=True)]
        return self.mix(torch.cat(normed, -1)).to(self._wide)

    def states_of(self, features: Tensor) -> Tensor:
        """The states that slots 0 to ``T - 1`` read, from features ``[T, taps, C]`` of their positions."""
        return F.pad(self.state(features)[:-1], (0, 0, 1, 0))


def conditioned_on(
    target: Decoder,
    taps: tuple[int, ...],
    vocabulary: Tensor | None = None,
    layers: int = 1,
    seed: int = 0,
) -> FeatureDecoder:
    """An untrained feature-conditioned drafter of a target, in float32 for training.

    Its head starts as the target's, everything else at random (``seed`` makes it repeatable).

    Parameters
    ----------
    vocabulary
        Token ids the head scores, ascending ``[R]``; ``None`` scores all.
    """
    if not taps or not all(0 <= layer < target.config.num_layers for layer in taps):
        raise ValueError(f"taps {taps} must be layers in 0..{target.config.num_layers - 1}")
    drafter = FeatureDecoder(replace(target.config, num_layers=layers), tuple(taps))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in drafter.modules():
            if isinstance(module, Linear) and module is not drafter.head:
                module.weight.normal_(0.0, module.shape[1] ** -0.5, generator=generator)
        # A quarter: the first guesses are then nearly even, and training need not undo loud ones.
        drafter.final_norm.copy_(target.final_norm * 0.25)
    drafter.embedding = nn.Parameter(target.embedding.detach().float().clone(), False)
    if drafter.config.tie_embeddings:
        drafter.head.weight = drafter.embedding
    else:
        drafter.head.weight = nn.Parameter(target.head.dense().float().clone())
    if vocabulary is not None:
        restrict_head(drafter, vocabulary)
    return drafter


def restrict_head(drafter: Decoder, vocabulary: Tensor) -> None:
    """Give the drafter a trainable head of its own that scores ``vocabulary`` only."""
    whole = drafter.head.dense()
    vocabulary = vocabulary.to(whole.device)
    _score(drafter, vocabulary, whole[vocabulary].detach().clone())


def revise_head(drafter: Decoder, target: Decoder, vocabulary: Tensor) -> None:
    """Let a drafter score another ``vocabulary``: trained rows stay, new tokens begin with the target's.

    Raises
    ------
    ValueError
        If the drafter scores every token.
    """
    if drafter.vocabulary is None:
        raise ValueError("this drafter scores every token: there is no draft vocabulary to revise")
    vocabulary = vocabulary.to(drafter.head.weight.device)
    trained = row_of(drafter)[vocabulary]
    rows = target.head.dense().to(drafter.head.weight)[vocabulary]
    known = trained >= 0
    rows[known] = drafter.head.weight.detach()[trained[known]]
    _score(drafter, vocabulary, rows)


def _score(drafter: Decoder, vocabulary: Tensor, rows: Tensor) -> None:
    """Give the drafter a trainable head with these ``rows`` ``[R, C]``, one for each token it scores."""
    drafter.head = Linear(drafter.config.hidden_size, len(vocabulary))
    drafter.head.weight = nn.Parameter(rows)
    drafter.vocabulary = vocabulary


def row_of(drafter: Decoder) -> Tensor | None:
    """Head row of each token id ``[V]``, -1 where the drafter does not score it.

    On the drafter's device; made once for a draft vocabulary, and again when that has moved.
    """
    ids = drafter.vocabulary
    if ids is None:
        return None
    made_of, rows = getattr(drafter, "_rows", (None, None))
    if made_of is not ids:
        with torch.inference_mode(False):
            rows = ids.new_full((drafter.config.vocab_size,), -1)
            rows[ids] = torch.arange(len(ids), device=ids.device)
        drafter._rows = ids, rows
    return rows


def _own_weights(drafter: Decoder) -> dict[str, Tensor]:
    weights = {}
    tied = drafter.vocabulary is None and drafter.config.tie_embeddings
    for name, tensor in drafter.state_dict().items():
        if name != "embedding" and not (name == "head.weight" and tied):
            weights[name] = tensor.detach()
    if drafter.vocabulary is not None:
        weights["vocabulary"] = drafter.vocabulary.to(torch.int32)
    return weights


def save_drafter(
    drafter: Decoder,
    folder: str | Path,
    card: str,
    provenance: Mapping[str, Any] | None = None,
    base: str | Path | None = None,
    shared: Collection[str] = (),
) -> None:
    """Write a drafter's folder; each file under a temporary name first.

    Parameters
    ----------
    base, shared
        Folder of the drafter that has the weights named ``shared``, and its draft vocabulary: they are
        not written again.
    """
    from safetensors.torch import save_file

    from bdlib import assets

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, tensor in _own_weights(drafter).items():
        if base is not None and (name in shared or name == "vocabulary"):
            continue
        if tensor.dim() == 2 and tensor.is_floating_point() and not name.endswith("norm"):
            scale = tensor.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            weights[name] = (tensor.float() / scale).round().to(torch.int8)
            weights[f"{name}{SCALE}"] = scale
        else:
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    meta = {
        "schema": SCHEMA,
        "kind": "feature" if isinstance(drafter, FeatureDecoder) else "standalone",
        "taps": list(getattr(drafter, "taps", ())),
        "reach": drafter.reach,
        "config": drafter.config.to_hf(torch.bfloat16),
        "provenance": dict(provenance or {}),
    }
    if base is not None:
        base = Path(base)
        meta["base"] = {"folder": base.name, "sha256": assets.sha256_of(base / WEIGHTS_FILE)}
    with assets.replacing(
        folder / WEIGHTS_FILE
    ) as scratch:  # one in another: all are written first
        save_file({k: v.contiguous() for k, v in weights.items()}, scratch)
        meta["sha256"] = assets.sha256_of(scratch)
        with assets.replacing(folder / CONFIG_FILE) as config:
            config.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf8")
            # safetensors leaves files that only their owner may read: as the umask says instead.
            shutil.copymode(config, scratch)
            with assets.replacing(folder / "README.md") as about:
                about.write_text(card, encoding="utf8")


def checkpoint(name: str) -> Path:
    """The folder of a shipped drafter, for example ``"budgetdraft-feature-gpu"``.

    Raises
    ------
    ValueError
        If this is no checkout, or no drafter of that name is shipped; names those that are.
    """
    from bdlib import assets

    root = assets.checkout()
    if root is None:
        raise ValueError("shipped drafters lie in data/checkpoints of a checkout; this is none")
    shipped = sorted(path.parent.name for path in (root / SHIPPED).glob(f"*/{CONFIG_FILE}"))
    if name not in shipped:
        raise ValueError(f"no shipped drafter {name!r}; there: {', '.join(shipped) or 'none'}")
    return root / SHIPPED / name


def _check_shape(folder: Path, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"{folder}: weight {name} has shape {tuple(tensor.shape)}, {CONFIG_FILE} says {wanted}"
        )


def _weights_of_base(folder: Path, name: str, wanted: str) -> dict[str, Tensor]:
    """The weights of the drafter beside ``folder`` that the one in it was trained on from."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from bdlib import assets

    file = folder.resolve().parent / Path(name).name / WEIGHTS_FILE
    try:
        weights = load_file(file)
        found = assets.sha256_of(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds only what differs from {name!r}, whose folder must lie beside it: {error}"
        ) from error
    if found != wanted:
        raise ValueError(f"{folder} goes with another {name!r}: sha256 {wanted}, found {found}")
    return weights


def load_drafter(
    folder: str | Path, target: Decoder, dtype: torch.dtype | None = None, pack: bool = True
) -> Decoder:
    """Read a drafter's folder; the embedding is the target's own (shared, not copied, where it can be).

    Raises
    ------
    ValueError
        If a file is missing or damaged, or the drafter was made for another target shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from bdlib import assets

    folder = Path(folder)
    dtype = dtype or target.dtype
    try:
        meta = json.loads((folder / CONFIG_FILE).read_text(encoding="utf8"))
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a drafter's folder, or is damaged: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: it holds no object")
    if meta.get("schema") != SCHEMA:
        raise ValueError(f"{folder}: drafter of schema {meta.get('schema')}, need {SCHEMA}")
    found, written = assets.sha256_of(folder / WEIGHTS_FILE), meta.get("sha256")
    if written not in (None, found):
        raise ValueError(
            f"{folder / WEIGHTS_FILE} is damaged: its sha256 is {found}, {CONFIG_FILE} says {written}"
        )
    try:
        config = DecoderConfig.from_hf(meta["config"])
        feature, taps = meta["kind"] == "feature", tuple(meta["taps"])
        reach, base = int(meta.get("reach", 0)), meta.get("base")
        if base is not None:
            base = base["folder"], base["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: {error!r}") from error
    for name in ("vocab_size", "hidden_size"):
        if getattr(config, name) != getattr(target.config, name):
            raise ValueError(
                f"{folder}: the drafter's {name} is {getattr(config, name)},"
                f" the target's {getattr(target.config, name)}"
            )
    if base is not None:
        weights = {**_weights_of_base(folder, *base), **weights}
    # Positions and their scaling are the target's: YaRN, when it is used, stretches both. A drafter of
    # short reach stays within the positions that it was trained on.
    rope = config.rope if reach else target.config.rope
    config = replace(config, max_positions=target.config.max_positions, rope=rope)
    vocabulary = weights.pop("vocabulary", None)
    scales = {k: weights.pop(k) for k in list(weights) if k.endswith(SCALE)}
    stored: dict[str, tuple[Tensor, Tensor]] = {}
    for name, scale in scales.items():
        if (base := name.removesuffix(SCALE)) in weights:
            rows = weights[base].shape[:1]
            _check_shape(folder, name, scale, (*rows, 1))
            stored[base] = weights[base], scale
            weights[base] = weights[base].float() * scale
    with torch.device("meta"):
        drafter = FeatureDecoder(config, taps) if feature else Decoder(config)
    if vocabulary is not None:
        _check_shape(folder, "vocabulary", vocabulary, (vocabulary.numel(),))
        if (
            not vocabulary.numel()
            or not 0 <= vocabulary.min() <= vocabulary.max() < config.vocab_size
        ):
            raise ValueError(
                f"{folder}: its draft vocabulary is not within the {config.vocab_size} tokens"
            )
        drafter.head = Linear(config.hidden_size, len(vocabulary))
    state = {k: v.to(target.device, dtype) for k, v in weights.items()}
    state["embedding"] = target.embedding.detach().to(dtype)
    if vocabulary is None and config.tie_embeddings:
        state["head.weight"] = state["embedding"]
    missing = set(drafter.state_dict()) ^ set(state)
    if missing:
        raise ValueError(
            f"{folder}: missing or unexpected weights: {', '.join(sorted(missing)[:4])}"
        )
    for name, wanted in drafter.state_dict().items():
        _check_shape(folder, name, state[name], tuple(wanted.shape))
    drafter.load_state_dict(state, assign=True)
    drafter.vocabulary = None if vocabulary is None else vocabulary.long().to(target.device)
    if vocabulary is None and config.tie_embeddings:
        drafter.head.weight = drafter.embedding
    drafter.reach = reach
    drafter.requires_grad_(False)
    del weights, state  # packing copies: what is not held here is freed as it goes
    if not pack:
        return drafter
    drafter.pack()
    for name, numbers in stored.items():
        drafter.get_submodule(name.removesuffix(".weight")).keep(*numbers)
    return drafter
