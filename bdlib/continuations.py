"""The target's own text as a source of training windows.

A drafter meets the target's text when it decodes, not only human text, and a target answers requests in
words that no novel has. So some windows are a passage, a request about it in the chat format, and the
target's own answer, sampled many sequences at a time.

Contract: the same target, documents and settings give the same windows on the same machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bdlib.cache import KVCache
from bdlib.sampling import Sampling
from bdlib.transformer import Decoder

if TYPE_CHECKING:
    from bdlib.corpora import Document

REQUESTS = (
    "Summarise the passage above.",
    "Who appears in the passage above, and what do they want?",
    "Explain the passage above to a child.",
    "Write the passage above as a discussion in a project meeting.",
    "What are the main decisions and questions in the passage above?",
    "Continue the passage above in the same style.",
    "List the most important facts of the passage above, with reasons.",
    "Write a letter about what happens in the passage above.",
)


@dataclass(frozen=True)
class ContinuationSettings:
    """What is sampled.

    Attributes
    ----------
    windows
        How many.
    length
        Tokens of a window: prompt and answer.
    answer
        Tokens of the answer.
    temperature
        Of sampling.
    batch
        Sequences sampled together.
    """

    windows: int
    length: int = 1024
    answer: int = 384
    temperature: float = 0.7
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("windows", "length", "answer", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.answer >= self.length:
            raise ValueError(
                f"answer {self.answer} must be shorter than the window of {self.length}"
            )
        Sampling(self.temperature)


def prompts(
    tokenizer: Any, documents: Sequence[Document], settings: ContinuationSettings
) -> Tensor:
    """Chat requests about passages, ``[windows, length - answer]``."""
    from bdlib import corpora

    tokens = settings.length - settings.answer
    cut = corpora.windows(tokenizer, documents, tokens, settings.windows, settings.seed)
    choice = random.Random(settings.seed)
    asked = [
        corpora.chat_request(tokenizer, document, tokens, choice.choice(REQUESTS), offset)
        for document, offset, _ in cut
    ]
    return torch.stack(asked)


@torch.inference_mode()
def continued(
    target: Decoder,
    asked: Tensor,
    settings: ContinuationSettings,
    stop_tokens: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Prompts ``[N, P]`` with the target's sampled answers, ``[N, P + answer]``.

    Stop tokens are never drawn, so that every window is full: an answer goes on where it would end.
    """
    sampling = Sampling(settings.temperature)
    generator = torch.Generator(target.device).manual_seed(settings.seed)
    banned = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=target.device)
    done = []
    for part in asked.to(target.device).split(settings.batch):
        capacity = part.shape[1] + settings.answer
        cache = KVCache(target.config, capacity, len(part), target.dtype, target.device)
        if part.shape[1] > 1:
            target.hidden(part[:, :-1], cache)
        tokens, last = [part], part[:, -1:]
        for _ in range(settings.answer):
            logits = target(last, cache)[:, 0].index_fill(-1, banned, float("-inf"))
            last = sampling.draw(logits, generator)[0][:, None]
            tokens.append(last)
        done.append(torch.cat(tokens, 1).cpu())
        if progress is not None:
            progress(sum(len(d) for d in done), len(asked))
    return torch.cat(done)
