"""The target's own text as a source of training windows.

A drafter meets the target's text when it decodes, not only human text, and a target answers requests in
words that no novel has. So some windows are a passage, a request about it in the chat format, and the
target's own answer, sampled many sequences at a time. Others are a meeting that the target makes up from
two opening turns: the project has no public-domain transcript to train on. The third kind puts a question
about such a meeting, and has the answer. The fourth goes on from a passage, without any request.

Contract: the same target, documents and settings give the same windows on the same machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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


QUESTIONS = (
    "What was said about {topic}?",
    "Summarise the discussion about {topic}.",
    "What did the {speaker} think about {topic}?",
    "What was decided about {topic}, and why?",
    "What were the problems with {topic}, and how did the group want to solve them?",
    "Why did the {speaker} bring up {topic}?",
    "What were the main points of the meeting?",
    "Summarise the whole meeting.",
)
SOURCES = ("chat", "transcript", "meeting", "passage")
TRANSCRIPT = 1024  # tokens of one meeting that is made up; the target loops in longer ones
TOPICS = (
    "the budget for next year",
    "the design of the remote control",
    "the new library software",
    "the results of the speech recogniser",
    "school meals in rural districts",
    "the plan for the flood defences",
    "how we collect the recordings",
    "the market research for the phone",
    "funding for mental health services",
    "the schedule of the user tests",
    "the error rates on noisy data",
    "the colour and the material of the case",
    "the training of new teachers",
    "the housing strategy of the council",
    "the user interface and its buttons",
    "the paper that is due on Friday",
)
OPENINGS = (
    "Project Manager: Okay , um so welcome everybody to the meeting . Today we 're going to talk about"
    " {topic} . I think everyone has had time to look at the notes from last week , yeah ?\n"
    "Industrial Designer: Yeah , I 've had a look at it . I have a few slides , but um they 're not"
    " quite finished yet .\n",
    "Professor A: OK . So what should we do about {topic} ? I guess we should start with whatever"
    " happened since last time .\n"
    "PhD B: Well , I did uh a couple of things . I mean , it 's mostly working , but there 's one"
    " thing that I don't really understand yet .\n",
    "Chair: Good morning , and welcome to this meeting of the committee . We 're here today to take"
    " evidence on {topic} . I 'd like to thank our witnesses for coming .\n"
    "Witness: Thank you , Chair . I 'm very pleased to be here . If I may , I will start by saying a few"
    " words about what we have done so far .\n",
    "Marketing: So um , I did some research on {topic} , and it turns out that most people don't like"
    " what they have now .\n"
    "User Interface: Hmm . Right . Is that because it 's uh too complicated , or because it looks"
    " old ?\nMarketing: I think it 's both , really . Yeah .\n",
    "Grad A: Um , shall we go on to {topic} ? I sent out an email about it .\nPostdoc B: Uh , yeah .\n"
    "Grad A: So , basically , what I did is that I took everything that we have and then I ran it"
    " again , and I got a slightly different answer .\nProfessor C: Mm-hmm .\n",
    "Hon. Member: Mr. Chair , my question is about {topic} . Can the minister tell us what the"
    " government will do , and when ?\n"
    "The Minister: Mr. Chair , I thank the member for the question . We have been working on this with"
    " the provinces for several months .\n",
)


@dataclass(frozen=True)
class ContinuationSettings:
    """What is sampled.

    Attributes
    ----------
    windows
        How many.
    length
        Tokens of a sequence: prompt and answer.
    answer
        Tokens of the answer.
    temperature
        Of sampling.
    batch
        Sequences sampled together.
    source
        ``"chat"``: requests about passages; ``"transcript"``: openings of meetings; ``"meeting"``:
        questions about meetings (:func:`meetings`); ``"passage"``: passages, to be continued.
    spoken
        Share of the passages that are given in the form of a transcript (:func:`bdlib.corpora.spoken`).
    pack
        Sequences laid end to end in one window of ``pack * length`` tokens. Each is sampled alone; the
        targets of a window are what the target says having read all of it.
    """

    windows: int
    length: int = 1024
    answer: int = 384
    temperature: float = 0.7
    batch: int = 16
    seed: int = 0
    source: str = "chat"
    spoken: float = 0.0
    pack: int = 1

    def __post_init__(self) -> None:
        for name in ("windows", "length", "answer", "batch", "pack"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.answer >= self.length:
            raise ValueError(
                f"answer {self.answer} must be shorter than the window of {self.length}"
            )
        if self.source not in SOURCES:
            raise ValueError(f"source {self.source!r} is not one of {', '.join(SOURCES)}")
        if not 0 <= self.spoken <= 1:
            raise ValueError(f"spoken {self.spoken} must be in 0..1")
        Sampling(self.temperature)

    @property
    def sequences(self) -> int:
        """Sequences in all windows."""
        return self.windows * self.pack


def prompts(
    tokenizer: Any, documents: Sequence[Document], settings: ContinuationSettings
) -> Tensor:
    """What the target goes on from, ``[windows * pack, length - answer]``.

    Raises
    ------
    ValueError
        If an opening of a transcript has fewer tokens than ``length - answer``.
    """
    from bdlib import corpora

    tokens = settings.length - settings.answer
    sequences = settings.sequences
    choice = random.Random(settings.seed)
    if settings.source == "transcript":
        return torch.stack(
            [_head(tokenizer, text, tokens) for text, _, _ in _openings(sequences, choice)]
        )
    if settings.source == "meeting":
        if len(documents) != sequences:
            raise ValueError(f"{len(documents)} meetings for {sequences} sequences")
        return torch.stack([corpora.chat_request(tokenizer, d, tokens) for d in documents])
    as_speech = round(sequences * settings.spoken)
    cut = []
    for texts, count in (
        (documents, sequences - as_speech),
        ([corpora.spoken(d, settings.seed) for d in documents] if as_speech else [], as_speech),
    ):
        if count:
            cut += corpora.windows(tokenizer, texts, tokens, count, settings.seed)
    if settings.pack > 1:
        choice.shuffle(cut)  # a window of several sequences has different ones
    if settings.source == "passage":
        return torch.stack([window for _, _, window in cut])
    asked = [
        corpora.chat_request(tokenizer, document, tokens, choice.choice(REQUESTS), offset)
        for document, offset, _ in cut
    ]
    return torch.stack(asked)


def meetings(
    target: Decoder,
    tokenizer: Any,
    settings: ContinuationSettings,
    stop_tokens: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Document]:
    """A meeting for each sequence, with a question about it (``query``); the target makes both up.

    Where one needs more than one meeting, it gets several, and the question is about the first.
    """
    from bdlib import corpora

    each = math.ceil(1.05 * (settings.length - settings.answer) / TRANSCRIPT)  # decoding loses some
    count = settings.sequences * each
    openings = _openings(count, random.Random(settings.seed))
    opened = min(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t, _, _ in openings)
    opened = min(opened, TRANSCRIPT - 1)
    told = replace(
        settings,
        windows=count,
        pack=1,
        length=TRANSCRIPT,
        answer=TRANSCRIPT - opened,
        temperature=0.9,
        source="transcript",
    )
    texts = tokenizer.batch_decode(
        continued(target, prompts(tokenizer, [], told), told, stop_tokens, progress)
    )
    choice = random.Random(settings.seed + 1)
    return [
        corpora.Document(
            f"meeting {i}",
            "\n".join(texts[i * each : (i + 1) * each]),
            kind="meeting",
            query=choice.choice(QUESTIONS).format(topic=topic, speaker=speaker),
        )
        for i, (_, topic, speaker) in enumerate(openings[::each])
    ]


def _openings(count: int, choice: random.Random) -> list[tuple[str, str, str]]:
    """Opening, its topic and its first speaker."""
    found = []
    for _ in range(count):
        text, topic = choice.choice(OPENINGS), choice.choice(TOPICS)
        found.append((text.format(topic=topic), topic, text.partition(":")[0]))
    return found


def _head(tokenizer: Any, text: str, tokens: int) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < tokens:
        raise ValueError(f"an opening has {len(ids)} tokens, length - answer asks for {tokens}")
    return torch.tensor(ids[:tokens])


@torch.inference_mode()
def continued(
    target: Decoder,
    asked: Tensor,
    settings: ContinuationSettings,
    stop_tokens: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Prompts ``[N, P]`` with the target's sampled answers, ``[N / pack, pack (P + answer)]``.

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
    return torch.cat(done).view(-1, settings.pack * (asked.shape[1] + settings.answer))
