"""Loading texts in every layout, and cutting windows of an exact number of tokens."""

import json
import re

import pytest
import torch

from bdlib import assets, corpora
from bdlib.corpora import CorpusError, Document


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets.model_folder("smollm2"))


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# ------------------------------------------------------------------- embedded texts


def test_embedded_split_is_by_author():
    train, held_out = corpora.embedded("train"), corpora.embedded("held-out")
    assert {document.name for document in held_out} == {
        "carroll-alice",
        "chesterton-ball",
        "chesterton-brown",
        "chesterton-thursday",
        "doyle-sherlock",
    }
    assert not {d.author for d in train} & {d.author for d in held_out}
    assert len(corpora.embedded("all")) == len(train) + len(held_out) == 22
    weights = {document.name: document.weight for document in train}
    assert weights.pop("bible-kjv") < 1
    assert set(weights.values()) == {1.0}


def test_embedded_texts_hold_the_book_and_no_licence_text():
    for document in corpora.embedded("all"):
        assert len(document.text) > 30_000
        assert "***" not in document.text[:200]
        assert "Project Gutenberg" not in document.text
        assert "\x1a" not in document.text
    texts = {document.name: document.text for document in corpora.embedded("all")}
    assert "Whale" in texts["melville-moby_dick"]
    assert texts["tolstoy-war"].startswith("War and Peace")
    assert texts["doyle-sherlock"].rstrip().endswith("met with considerable success.")


def test_embedded_names_work_where_a_path_does():
    assert corpora.load_texts("embedded:held-out") == corpora.embedded("held-out")
    assert {document.kind for document in corpora.load_texts("embedded:train", "prose")} == {
        "prose"
    }
    for name in ("embedded:test", "embedded:"):
        with pytest.raises(CorpusError, match="allowed: train, held-out, all"):
            corpora.load_texts(name)


# ------------------------------------------------------------------ files and folders


def test_plain_text_file(tmp_path):
    path = tmp_path / "story.txt"
    path.write_bytes(b"\xef\xbb\xbfOnce.\r\nTwice \xc3\xa9.\r\n")
    assert corpora.load_texts(path) == [Document("story", "Once.\nTwice é.\n")]
    assert corpora.load_texts(str(path), kind="book")[0].kind == "book"


def test_folder_is_read_recursively_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "z.txt").write_text("z")
    (tmp_path / "b" / "a.txt").write_text("a")
    (tmp_path / ".hidden" / "no.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    write_lines(tmp_path / "c.jsonl", {"text": "c1"}, {"text": "c2"})
    names = [document.name for document in corpora.load_texts(tmp_path)]
    assert names == ["a", "c:1", "c:2", "z"]


def test_pg19_layout(tmp_path):
    path = write_lines(tmp_path / "gs.jsonl", {"text": "First book."}, {"text": "Second."})
    first, second = corpora.pg19(path)
    assert first == Document("gs:1", "First book.", kind="book")
    assert second.name == "gs:2"
    assert corpora.pg19(path, limit=1) == [first]


def test_longbench_layout(tmp_path):
    record = {"context": "Talk.", "input": "What was said?", "answers": ["Little."]}
    path = write_lines(tmp_path / "longbench.jsonl", record)
    expected = Document("longbench:1", "Talk.", kind="meeting", query="What was said?")
    assert corpora.longbench_qmsum(path) == [expected]


def test_lwm_layout(tmp_path):
    path = write_lines(tmp_path / "lwm.jsonl", {"idx": 7, "document_text": "A story."})
    assert corpora.narrativeqa(path) == [Document("lwm:7", "A story.", kind="narrative")]


def test_narrativeqa_layout_of_the_hub(tmp_path):
    record = {"document": {"id": "x", "text": "A story."}, "question": {"text": "Who?"}}
    path = write_lines(tmp_path / "hub.jsonl", record)
    expected = Document("hub:1", "A story.", kind="narrative", query="Who?")
    assert corpora.load_texts(path) == [expected]


def test_qmsum_layout(tmp_path):
    turns = [
        {"speaker": "Ann", "content": "So {disfmarker} hello {vocalsound} ."},
        {"speaker": "Bob", "content": "{vocalsound}"},
        {"speaker": "Bob", "content": "{gap} Yes ."},
    ]
    general = [{"query": "Summarise the meeting.", "answer": "..."}]
    specific = [{"query": "What did Bob say?", "answer": "..."}]
    path = write_lines(
        tmp_path / "meet.jsonl",
        {
            "meeting_transcripts": turns,
            "general_query_list": general,
            "specific_query_list": specific,
        },
        {
            "meeting_transcripts": turns,
            "general_query_list": [],
            "specific_query_list": specific,
        },
        {"meeting_transcripts": turns},
    )
    first, second, third = corpora.load_texts(path)
    assert first.text == "Ann: So hello .\nBob: Yes ."
    assert first.kind == "meeting"
    assert first.query == "Summarise the meeting."
    assert second.query == "What did Bob say?"
    assert third.query is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt is empty"),
        ("blank.txt", b" \n\n", r"blank\.txt is empty"),
        ("empty.jsonl", b"", r"empty\.jsonl is empty"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8: byte 0xe9 at position 3"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', r"bad\.jsonl, line 3: not JSON"),
        ("list.jsonl", b"[1]\n", r"list\.jsonl, line 1: expected an object, found list"),
        (
            "odd.jsonl",
            b'{"b": 1, "a": 2}\n',
            r"line 1: unknown layout with fields a, b; known: text",
        ),
        ("type.jsonl", b'{"text": 3}\n', r"line 1: field 'text' must be a string, found int"),
        ("void.jsonl", b'{"text": " "}\n', r"line 1: the text is empty"),
        ("turns.jsonl", b'{"meeting_transcripts": 1}\n', r"must be a list of"),
        ("table.csv", b"a,b\n", r"table\.csv is neither a \.txt nor a \.jsonl file"),
    ],
)
def test_bad_file_is_one_clear_error(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        corpora.load_texts(path)


def test_nothing_there_is_one_clear_error(tmp_path):
    with pytest.raises(CorpusError, match="does not exist; give a .txt"):
        corpora.load_texts(tmp_path / "absent.txt")
    with pytest.raises(CorpusError, match=r"holds no \.txt or \.jsonl file"):
        corpora.load_texts(tmp_path)
    path = write_lines(tmp_path / "gs.jsonl", {"text": "a"})
    with pytest.raises(CorpusError, match="limit must be at least 1, found 0"):
        corpora.pg19(path, limit=0)


def test_hub_loaders_ask_for_the_right_rows(monkeypatch):
    """The hub client is replaced: rows have the fields of the real data sets."""
    import sys
    import types

    asked = []
    rows = {
        "emozilla/pg19": [{"short_book_title": "A Book", "text": "One."}],
        "Xnhyacinth/LongBench": [{"_id": "q1", "context": "Talk.", "input": "What?"}],
        "deepmind/narrativeqa": [
            {"document": {"id": "d1", "text": "Story."}, "question": {"text": f"Q{n}?"}}
            for n in range(3)
        ],
    }

    def load_dataset(name, configuration, *, split, streaming):
        asked.append((name, configuration, split, streaming))
        return rows[name]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert corpora.pg19() == [Document("A Book", "One.", kind="book")]
    assert corpora.longbench_qmsum() == [Document("q1", "Talk.", kind="meeting", query="What?")]
    assert corpora.narrativeqa() == [Document("d1", "Story.", kind="narrative", query="Q0?")]
    assert asked == [
        ("emozilla/pg19", None, "test", True),
        ("Xnhyacinth/LongBench", "qmsum", "test", True),
        ("deepmind/narrativeqa", None, "test", True),
    ]

    def offline(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(CorpusError, match="could not stream emozilla/pg19 .*local file"):
        corpora.pg19()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        CorpusError, match=r"needs the package datasets: pip install 'bdlib\[hub\]'"
    ):
        corpora.pg19()


# ------------------------------------------------------------------ windows of tokens


def numbers(count, name="numbers"):
    return Document(name, " ".join(str(n) for n in range(count)))


def test_window_has_exactly_the_tokens_asked_for(tokenizer):
    document = numbers(300)
    ids = tokenizer(document.text)["input_ids"]
    piece = corpora.window(tokenizer, document, 64, offset=10)
    assert piece.dtype == torch.long
    assert piece.tolist() == ids[10:74]
    assert corpora.window(tokenizer, document, len(ids)).tolist() == ids


def test_window_errors_name_the_document_and_the_counts(tokenizer):
    document = Document("short", "hello world")
    with pytest.raises(CorpusError, match="'short' has 2 tokens, but 3 were asked for"):
        corpora.window(tokenizer, document, 3)
    with pytest.raises(CorpusError, match="2 were asked for from offset 1"):
        corpora.window(tokenizer, document, 2, offset=1)
    with pytest.raises(CorpusError, match="the text of 'void' is empty"):
        corpora.window(tokenizer, Document("void", "  "), 2)
    for tokens in (0, -1, 2.0, True):
        with pytest.raises(CorpusError, match="tokens must be a whole number of at least 1"):
            corpora.window(tokenizer, document, tokens)
    with pytest.raises(CorpusError, match="offset must be at least 0, found -1"):
        corpora.window(tokenizer, document, 1, offset=-1)


def test_windows_are_distinct_spread_and_repeatable(tokenizer):
    documents = [numbers(400, name) for name in "abc"] + [Document("short", "hello")]
    cut = corpora.windows(tokenizer, documents, 50, samples=7, seed=3)
    again = corpora.windows(tokenizer, documents, 50, samples=7, seed=3)
    places = [(document.name, offset) for document, offset, _ in cut]
    assert places == [(document.name, offset) for document, offset, _ in again]
    assert len(set(places)) == 7
    counts = sorted([name for name, _ in places].count(name) for name in "abc")
    assert counts == [2, 2, 3]
    for document, offset, piece in cut:
        assert torch.equal(piece, corpora.window(tokenizer, document, 50, offset))
    other = corpora.windows(tokenizer, documents, 50, samples=7, seed=4)
    assert places != [(document.name, offset) for document, offset, _ in other]


def test_windows_use_every_distinct_place_and_no_more(tokenizer):
    document = numbers(30)
    length = len(tokenizer(document.text)["input_ids"])
    cut = corpora.windows(tokenizer, [document], length - 2, samples=3)
    assert sorted(offset for _, offset, _ in cut) == [0, 1, 2]
    with pytest.raises(CorpusError, match="4 windows of .* hold 3 distinct ones"):
        corpora.windows(tokenizer, [document], length - 2, samples=4)


def test_windows_of_several_lengths_end_at_the_same_places(tokenizer):
    documents = [numbers(400, name) for name in "abc"] + [numbers(50, "short")]
    whole = corpora.windows(tokenizer, documents, 200, samples=5, seed=3)
    again = corpora.windows(tokenizer, documents, 200, samples=5, seed=3, within=200)
    assert [w[:2] for w in whole] == [w[:2] for w in again]
    short = corpora.windows(tokenizer, documents, 40, samples=5, seed=3, within=200)
    for (one, far, long), (other, offset, piece) in zip(whole, short, strict=True):
        assert one is other
        assert offset == far + 160
        assert torch.equal(piece, long[160:])
        assert torch.equal(piece, corpora.window(tokenizer, other, 40, offset))
    with pytest.raises(CorpusError, match="within 39 must be at least the 40 tokens of a window"):
        corpora.windows(tokenizer, documents, 40, samples=5, seed=3, within=39)


def test_windows_errors(tokenizer):
    with pytest.raises(CorpusError, match="longest of 2 document.*'b', has 3"):
        corpora.windows(tokenizer, [Document("a", "x"), Document("b", "x y z")], 10, samples=1)
    with pytest.raises(CorpusError, match="samples must be at least 1, found 0"):
        corpora.windows(tokenizer, [numbers(10)], 2, samples=0)
    with pytest.raises(CorpusError, match="there are no documents"):
        corpora.windows(tokenizer, [], 2, samples=1)


@pytest.mark.parametrize("tokens", [45, 63, 100, 257])
def test_chat_request_has_exactly_the_tokens_asked_for(tokenizer, tokens):
    prompt = corpora.chat_request(tokenizer, numbers(400), tokens)
    assert prompt.shape == (tokens,)
    text = tokenizer.decode(prompt)
    assert text.endswith(f"\n\n{corpora.DEFAULT_REQUEST}<|im_end|>\n<|im_start|>assistant\n")
    assert "<|im_start|>user\n0" in text


def test_chat_request_asks_what_it_is_given(tokenizer):
    document = Document("d", numbers(400).text, query="Which number is last?")
    assert "Which number is last?" in tokenizer.decode(
        corpora.chat_request(tokenizer, document, 80)
    )
    other = tokenizer.decode(corpora.chat_request(tokenizer, document, 80, "Count on.", offset=1))
    assert "Count on." in other
    assert "Which number" not in other
    assert "<|im_start|>user\n " in other


def test_chat_request_errors(tokenizer):
    with pytest.raises(CorpusError, match="a chat prompt needs at least .* 5 were asked for"):
        corpora.chat_request(tokenizer, numbers(10), 5)
    with pytest.raises(CorpusError, match="'numbers' has .* but a chat prompt of 500 needs"):
        corpora.chat_request(tokenizer, numbers(10), 500)

    class Plain:
        chat_template = None

    with pytest.raises(CorpusError, match="no chat template"):
        corpora.chat_request(Plain(), numbers(10), 50)


# ---------------------------------------------------------------------------- tiles


def test_tiles_are_disjoint_weighted_and_repeatable(tokenizer):
    words = " ".join(f"word{i}" for i in range(400))
    documents = [Document("a", words), Document("b", words.upper(), weight=0.5)]
    whole = tokenizer(words, add_special_tokens=False)["input_ids"]
    pieces = corpora.tiles(tokenizer, documents, 50, seed=1)
    lengths = [
        len(tokenizer(d.text, add_special_tokens=False)["input_ids"]) // 50 for d in documents
    ]
    assert len(pieces) == lengths[0] + round(lengths[1] / 2)
    of_first = {tuple(whole[i * 50 : i * 50 + 50]) for i in range(lengths[0])}
    assert of_first <= {tuple(piece.tolist()) for piece in pieces}
    again = corpora.tiles(tokenizer, documents, 50, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(pieces, again, strict=True))
    other = corpora.tiles(tokenizer, documents, 50, seed=2)
    assert not all(torch.equal(x, y) for x, y in zip(pieces, other, strict=True))
    with pytest.raises(CorpusError, match="no document has the 9000 tokens"):
        corpora.tiles(tokenizer, documents, 9000)


# ------------------------------------------------------------------ a book as speech


def test_a_text_as_speech_keeps_its_words_in_order():
    text = 'Mr. Knightley said, "I\'m sure of it!" Emma did not answer; she laughed. ' * 30
    document = corpora.Document("a", text)
    speech = corpora.spoken(document, seed=1)
    lines = speech.text.split("\n")
    assert all(re.match(r"[A-Z][A-Za-z ]+: \S", line) for line in lines)
    assert len(lines) > 10
    assert " , " in speech.text
    assert "I 'm sure" in speech.text
    assert "answer ." in speech.text
    words = speech.text.split()
    at = 0
    for word in ["Knightley", "said", "sure", "Emma", "answer", "laughed"] * 30:
        at = words.index(word, at) + 1  # raises where a word is lost or moved
    assert corpora.spoken(document, seed=1) == speech != corpora.spoken(document, seed=2)
    assert "Mr .\n" not in speech.text, "a title does not end a sentence"
