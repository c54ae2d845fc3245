"""The target's own text: sampled as single sequences would be, full windows, the same each time."""

from collections import Counter

import pytest
import tiny
import torch
from scipy import stats

from bdlib import assets, continuations, corpora
from bdlib.continuations import (
    OPENINGS,
    REQUESTS,
    ContinuationSettings,
    continued,
    meetings,
    prompts,
)


def test_answers_follow_their_prompts_and_repeat():
    target = tiny.model(seed=1)
    asked = torch.stack([tiny.text(9, seed=i) for i in range(5)])
    settings = ContinuationSettings(5, length=21, answer=12, batch=2, seed=3)
    found = continued(target, asked, settings, stop_tokens=(0, 4))
    assert found.shape == (5, 21)
    assert torch.equal(found[:, :9], asked)
    assert not set(found[:, 9:].flatten().tolist()) & {0, 4}
    assert torch.equal(found, continued(target, asked, settings, stop_tokens=(0, 4)))


def test_first_tokens_have_the_targets_distribution():
    target, prompt = tiny.model(seed=2), tiny.text(11, seed=7)
    settings = ContinuationSettings(3000, length=12, answer=1, temperature=0.7, batch=500)
    found = continued(target, prompt.expand(3000, -1), settings)[:, -1]
    probs = torch.softmax(target(prompt[None])[0, -1] / 0.7, -1)
    counts = Counter(found.tolist())
    likely = probs * 3000 > 5
    seen = torch.tensor([counts[i] for i in range(len(probs))], dtype=torch.float64)
    observed, expected = seen[likely].tolist(), (probs[likely] * 3000).tolist()
    if not likely.all():
        observed.append(float(seen[~likely].sum()))
        expected.append(float(probs[~likely].sum() * 3000))
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_greedy_answers_are_those_of_single_sequences():
    target = tiny.model(seed=4)
    asked = torch.stack([tiny.text(8, seed=i) for i in range(3)])
    settings = ContinuationSettings(3, length=18, answer=10, temperature=0.0, batch=3)
    found = continued(target, asked, settings)
    for row, prompt in zip(found, asked, strict=True):
        assert row[8:].tolist() == tiny.greedy(target, prompt, 10)


def test_prompts_are_requests_about_passages():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder("smollm2"))
    settings = ContinuationSettings(4, length=300, answer=100)
    asked = prompts(tokenizer, corpora.embedded("held-out")[:1], settings)
    assert asked.shape == (4, 200)
    texts = [tokenizer.decode(row) for row in asked]
    assert all(any(request in text for request in REQUESTS) for text in texts)
    assert len(set(texts)) == 4


def test_transcripts_begin_with_an_opening():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder("smollm2"))
    settings = ContinuationSettings(6, length=100, answer=44, source="transcript")
    asked = prompts(tokenizer, [], settings)
    assert asked.shape == (6, 56)
    assert all(any(t.startswith(o[:12]) for o in OPENINGS) for t in map(tokenizer.decode, asked))
    with pytest.raises(ValueError, match="length - answer asks for 500"):
        prompts(tokenizer, [], ContinuationSettings(2, length=600, answer=100, source="transcript"))


def test_questions_are_about_meetings_that_the_target_makes_up(monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder("smollm2"))
    monkeypatch.setattr(continuations, "TRANSCRIPT", 200)
    settings = ContinuationSettings(3, length=390, answer=60, batch=6, source="meeting")
    target = tiny.model(seed=5, vocab_size=len(tokenizer))
    told = meetings(target, tokenizer, settings, stop_tokens=(0,))
    assert told == meetings(target, tokenizer, settings, stop_tokens=(0,))
    asked = prompts(tokenizer, told, settings)
    assert asked.shape == (3, 330)  # two meetings in each
    for document, row in zip(told, asked, strict=True):
        shown = tokenizer.decode(row)
        assert document.text[:60] in shown
        assert document.query in shown.rpartition("\n\n")[2]
        assert "{" not in document.query
    with pytest.raises(ValueError, match="2 meetings for 3 sequences"):
        prompts(tokenizer, told[:2], settings)


def test_a_share_of_the_passages_is_spoken():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder("smollm2"))
    settings = ContinuationSettings(4, length=300, answer=100, spoken=0.5)
    texts = map(tokenizer.decode, prompts(tokenizer, corpora.embedded("held-out")[:1], settings))
    assert [" , " in text and " . " in text for text in texts] == [False, False, True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": 0}, "windows 0"),
        ({"answer": 30}, "answer 30 must be shorter than the window of 30"),
        ({"temperature": -1}, "temperature -1"),
        ({"source": "novel"}, "source 'novel' is not one of chat, transcript, meeting"),
        ({"spoken": 1.5}, "spoken 1.5 must be in 0..1"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ContinuationSettings(**{"windows": 2, "length": 30, "answer": 10, **change})


def test_sequences_are_sampled_alone_and_laid_end_to_end():
    target = tiny.model(seed=4)
    asked = torch.stack([tiny.text(8, seed=i) for i in range(6)])
    alone = ContinuationSettings(6, length=18, answer=10, temperature=0.0, batch=6)
    packed = ContinuationSettings(2, length=18, answer=10, temperature=0.0, batch=6, pack=3)
    assert torch.equal(
        continued(target, asked, packed), continued(target, asked, alone).view(2, 3 * 18)
    )
    with pytest.raises(ValueError, match="pack 0 must be at least 1"):
        ContinuationSettings(2, pack=0)


def test_passages_are_continued_without_a_request():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder("smollm2"))
    document = corpora.embedded("held-out")[0]
    settings = ContinuationSettings(
        2, length=120, answer=40, source="passage", spoken=0.5, pack=3, seed=5
    )
    asked = prompts(tokenizer, [document], settings)
    assert asked.shape == (6, 80)
    texts = [
        corpora._encode_document(tokenizer, d) for d in (document, corpora.spoken(document, 5))
    ]
    joined = [" ".join(map(str, ids.tolist())) for ids in texts]
    found = [[" ".join(map(str, row.tolist())) in whole for whole in joined] for row in asked]
    assert sum(plain for plain, _ in found) == sum(speech for _, speech in found) == 3
