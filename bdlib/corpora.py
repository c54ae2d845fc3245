"""Texts to train and measure on, and the windows of tokens cut from them.

Three sources give the same :class:`Document`:

- :func:`embedded`: public-domain books fetched by :mod:`bdlib.assets`, split by author
  into ``train`` and ``held-out``;
- :func:`load_texts`: a file or folder of your own, in plain text or in the jsonl layouts
  of PG-19, LongBench, NarrativeQA/LWM and QMSum;
- :func:`pg19`, :func:`longbench_qmsum`, :func:`narrativeqa`: the three benchmarks of the
  paper, streamed from the Hugging Face hub or read from a local file.

:func:`spoken` rewrites a book in the form of a transcript of speech, to train on.

:func:`window`, :func:`windows` and :func:`chat_request` turn documents into prompts of
an exact number of tokens.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bdlib import assets

if TYPE_CHECKING:
    import torch

DEFAULT_REQUEST = "Summarise the passage above."
SPLITS = ("train", "held-out", "all")
_EMBEDDED_PREFIX = "embedded:"
_MARKER = re.compile(r"\s*\{[a-z][a-z_ ]*\}", re.IGNORECASE)  # {disfmarker}, {vocalsound}


class CorpusError(ValueError):
    """A text is missing, empty, too short, or not in a known layout."""


@dataclass(frozen=True)
class Document:
    """One text.

    ``kind`` groups texts in results (book, verse, meeting, narrative, text, ...).
    ``query`` is the question that a benchmark asks about the text. ``weight`` says how
    often training draws the text, compared with its length.
    """

    name: str
    text: str
    author: str | None = None
    kind: str = "text"
    query: str | None = None
    weight: float = 1.0


# ------------------------------------------------------------------- embedded texts


def embedded(split: Literal["train", "held-out", "all"] = "train") -> list[Document]:
    """The fetched public-domain texts of one side of the split, which is by author.

    Raises
    ------
    CorpusError
        If ``split`` is not one of ``train``, ``held-out``, ``all``.
    bdlib.assets.AssetError
        If a file is absent or damaged.
    """
    if split not in SPLITS:
        raise CorpusError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    decoded: dict[str, str] = {}
    documents = []
    for entry in assets.manifest().texts:
        if split not in ("all", entry.split):
            continue
        if entry.file not in decoded:
            raw = assets.text_file(entry.file).read_bytes()
            decoded[entry.file] = raw.decode(entry.encoding)
        text = decoded[entry.file][entry.start : entry.end]
        if entry.drop_first_line:
            text = text.partition("\n")[2]
        documents.append(
            Document(
                name=entry.name,
                text=text.strip("\n"),
                author=entry.author,
                kind=entry.kind,
                weight=entry.weight,
            )
        )
    return documents


# ------------------------------------------------------------- another form

_SENTENCE = re.compile(r"(?<=[.!?;])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)[\"')\]]*\s+")
_BEFORE_MARK = re.compile(r"(?<=\w)([.,?!;:])(?=\s|$)")
_CLITIC = re.compile(r"(?<=\w)('(?:s|m|re|ve|ll|d))\b", re.IGNORECASE)
_FILLERS = ("Um ,", "Uh ,", "Yeah ,", "OK ,", "So", "Well ,", "You know ,", "I mean ,", "Right .")
_LABELS = (
    ("Chair", "Secretary", "Treasurer", "Member"),
    ("Manager", "Designer", "Engineer", "Marketing"),
    ("Teacher A", "Teacher B", "Student C", "Student D"),
    ("Speaker A", "Speaker B", "Speaker C", "Speaker D"),
    ("Dr Hughes", "Ms Patel", "Mr Evans", "Mrs Brown"),
)


def spoken(document: Document, seed: int = 0) -> Document:
    """A text in the form of a transcript: turns with speakers, split marks, fillers, restarts.

    A transcript of speech is written unlike a book (``Chair: Um , I 'm I 'm not sure .``), and none is
    in the public-domain texts that train the shipped drafters. What a drafter learns from this form is
    how the target continues it; the words are still the book's.

    The sentences keep their order. Each turn has one to four of them; one sentence in six begins with a
    filler, one in ten begins twice. The same document and seed give the same transcript.
    """
    chance = random.Random(f"spoken:{seed}:{document.name}")
    text = re.sub(r"[\"_*]+|--+", " ", document.text)
    sentences = [" ".join(part.split()) for part in _SENTENCE.split(text)]
    sentences = [part for part in sentences if part]
    turns, at, labels = [], 0, chance.choice(_LABELS)
    while at < len(sentences):
        if chance.random() < 0.002:
            labels = chance.choice(_LABELS)  # another meeting
        said = []
        for sentence in sentences[at : at + chance.randint(1, 4)]:
            at += 1
            sentence = re.sub(r";$", ".", sentence)
            sentence = _CLITIC.sub(r" \1", _BEFORE_MARK.sub(r" \1", sentence))
            if chance.random() < 0.1:
                again = " ".join(sentence.split()[: chance.randint(1, 3)])
                sentence = f"{again} {sentence}"
            if chance.random() < 1 / 6:
                sentence = f"{chance.choice(_FILLERS)} {sentence}"
            said.append(sentence)
        turns.append(f"{chance.choice(labels)}: {' '.join(said)}")
    return _with(document, name=f"{document.name}-spoken", text="\n".join(turns), kind="spoken")


# ------------------------------------------------------------- files and folders


def load_texts(path: str | os.PathLike[str], kind: str | None = None) -> list[Document]:
    """The documents of a file or a folder.

    Parameters
    ----------
    path
        A ``.txt`` file (one document), a ``.jsonl`` file (one document a line, in any
        layout below), a folder of such files (searched recursively, in sorted order),
        or ``embedded:train``, ``embedded:held-out``, ``embedded:all``, or one embedded text by
        its name, ``embedded:austen-emma``.
    kind
        Overrides the kind that the layout implies.

    Notes
    -----
    jsonl layouts, told apart by their fields: PG-19 ``{text}``; LongBench
    ``{context, input}``; NarrativeQA as LWM stores it ``{idx, document_text}``;
    NarrativeQA of the hub ``{document: {text}, question: {text}}``; QMSum
    ``{meeting_transcripts, general_query_list, specific_query_list}``.

    Raises
    ------
    CorpusError
        If nothing is there, a file is empty or not UTF-8, or a line is not JSON in a
        known layout. The message names the file and the line.
    """
    if str(path).startswith(_EMBEDDED_PREFIX):
        name = str(path).removeprefix(_EMBEDDED_PREFIX)
        named = [] if name in SPLITS else [d for d in embedded("all") if d.name == name]
        documents = named or embedded(name)
    else:
        documents = list(_load_path(Path(path).expanduser()))
    if kind is None:
        return documents
    return [_with(document, kind=kind) for document in documents]


def _with(document: Document, **changes: Any) -> Document:
    return Document(**{**vars(document), **changes})


def _load_path(path: Path) -> Iterator[Document]:
    if path.is_dir():
        found = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in (".txt", ".jsonl")
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not found:
            raise CorpusError(f"{path} holds no .txt or .jsonl file")
        for file in found:
            yield from _load_path(file)
    elif not path.exists():
        raise CorpusError(
            f"{path} does not exist; give a .txt or .jsonl file, a folder of them, "
            f"or one of {', '.join(_EMBEDDED_PREFIX + split for split in SPLITS)}"
        )
    elif path.suffix.lower() == ".jsonl":
        yield from _read_jsonl(path)
    elif path.suffix.lower() == ".txt":
        yield Document(name=path.stem, text=_read_text(path))
    else:
        raise CorpusError(f"{path} is neither a .txt nor a .jsonl file")


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at position "
            f"{error.start}; convert it to UTF-8"
        ) from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
    text = text.replace("\r\n", "\n")
    if not text.strip():
        raise CorpusError(f"{path} is empty")
    return text


def _read_jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{place}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise CorpusError(f"{place}: expected an object, found {type(record).__name__}")
        try:
            document = _document_of(record, f"{path.stem}:{number}")
        except CorpusError as error:
            raise CorpusError(f"{place}: {error}") from error
        yield document


# -------------------------------------------------------------------------- layouts


def _document_of(record: dict[str, Any], name: str) -> Document:
    """The document of one record, whose layout is known by its fields."""
    if "meeting_transcripts" in record:
        document = _from_qmsum(record, name)
    elif "document_text" in record:
        if "idx" in record:
            name = f"{name.rpartition(':')[0]}:{record['idx']}"
        document = Document(name, _string(record, "document_text"), kind="narrative")
    elif isinstance(record.get("document"), dict):
        document = Document(
            name,
            _string(record["document"], "text"),
            kind="narrative",
            query=_query(record.get("question", {}), "text"),
        )
    elif "context" in record:
        document = Document(
            name, _string(record, "context"), kind="meeting", query=_query(record, "input")
        )
    elif "text" in record:
        document = Document(name, _string(record, "text"), kind="book")
    else:
        fields = ", ".join(sorted(map(str, record))) or "none"
        raise CorpusError(
            f"unknown layout with fields {fields}; known: text (PG-19), context and input "
            "(LongBench), document_text (LWM), document and question (NarrativeQA), "
            "meeting_transcripts (QMSum)"
        )
    if not document.text.strip():
        raise CorpusError("the text is empty")
    return document


def _string(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise CorpusError(f"field {field!r} must be a string, found {type(value).__name__}")
    return value


def _query(record: Any, field: str) -> str | None:
    value = record.get(field) if isinstance(record, dict) else None
    return value.strip() or None if isinstance(value, str) else None


def _from_qmsum(record: dict[str, Any], name: str) -> Document:
    """A meeting as ``Speaker: content`` lines, with its first general query."""
    turns = record["meeting_transcripts"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise CorpusError("field 'meeting_transcripts' must be a list of {speaker, content}")
    lines = []
    for turn in turns:
        content = _MARKER.sub("", _string(turn, "content")).strip()
        if content:
            lines.append(f"{_string(turn, 'speaker')}: {content}")
    queries = [
        _query(item, "query")
        for field in ("general_query_list", "specific_query_list")
        for item in record.get(field) or []
    ]
    query = next((query for query in queries if query), None)
    return Document(name, "\n".join(lines), kind="meeting", query=query)


# --------------------------------------------------------- the paper's benchmarks


def pg19(
    path: str | os.PathLike[str] | None = None, limit: int | None = None, split: str = "test"
) -> list[Document]:
    """Whole books of PG-19 (Rae et al., 2019).

    With ``path``: a local ``gs.jsonl`` of ``{text}``, or a folder of text files.
    Without: the hub data set ``emozilla/pg19``, streamed; needs the extra ``hub``.
    """
    return _benchmark("emozilla/pg19", None, split, "book", path, limit)


def longbench_qmsum(
    path: str | os.PathLike[str] | None = None, limit: int | None = None
) -> list[Document]:
    """Meetings and queries of QMSum as LongBench (Bai et al., 2023) stores them.

    With ``path``: a local ``longbench.jsonl`` of ``{context, input}``. Without: the hub
    data set ``Xnhyacinth/LongBench`` (the original in a form that needs no loading
    script), streamed; needs the extra ``hub``.
    """
    return _benchmark("Xnhyacinth/LongBench", "qmsum", "test", "meeting", path, limit)


def narrativeqa(
    path: str | os.PathLike[str] | None = None, limit: int | None = None, split: str = "test"
) -> list[Document]:
    """Stories of NarrativeQA (Kocisky et al., 2018), each with its first question.

    With ``path``: a local ``lwm.jsonl`` of ``{idx, document_text}``. Without: the hub
    data set ``deepmind/narrativeqa``, streamed; needs the extra ``hub``. Give a
    ``limit``: the data set repeats the whole story for each of its questions.
    """
    return _benchmark("deepmind/narrativeqa", None, split, "narrative", path, limit)


def _benchmark(
    data_set: str,
    configuration: str | None,
    split: str,
    kind: str,
    path: str | os.PathLike[str] | None,
    limit: int | None,
) -> list[Document]:
    if limit is not None and limit < 1:
        raise CorpusError(f"limit must be at least 1, found {limit}")
    if path is not None:
        return load_texts(path, kind=kind)[:limit]
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"reading {data_set} from the hub needs the package datasets: "
            "pip install 'bdlib[hub]', or give the path of a local file"
        ) from error
    documents: list[Document] = []
    seen: set[str] = set()
    try:
        rows = datasets.load_dataset(data_set, configuration, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            inner = row.get("document")
            name = str(
                row.get("short_book_title")
                or row.get("_id")
                or (inner.get("id") if isinstance(inner, dict) else None)
                or f"{split}:{number}"
            )
            if name in seen:
                continue
            seen.add(name)
            documents.append(_with(_document_of(row, name), name=name, kind=kind))
            if len(documents) == limit:
                break
    except CorpusError:
        raise
    except Exception as error:  # the hub client raises many unrelated types
        raise CorpusError(
            f"could not stream {data_set} from the hub ({type(error).__name__}: {error}); "
            "check the network, or give the path of a local file"
        ) from error
    if not documents:
        raise CorpusError(f"{data_set} has no document in split {split!r}")
    return documents


# ----------------------------------------------------------------- prompts of tokens


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _checked_tokens(tokens: int) -> int:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise CorpusError(f"tokens must be a whole number of at least 1, found {tokens!r}")
    return tokens


def _encode_document(tokenizer: Any, document: Document) -> torch.Tensor:
    if not document.text.strip():
        raise CorpusError(f"the text of {document.name!r} is empty")
    return _encoded(tokenizer, document.text)


@functools.lru_cache(maxsize=32)
def _encoded(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids as an int32 tensor. Kept: a novel takes a second, and is cut into many windows."""
    import torch

    return torch.tensor(_encode(tokenizer, text), dtype=torch.int32)


def window(tokenizer: Any, document: Document, tokens: int, offset: int = 0) -> torch.Tensor:
    """``tokens`` consecutive tokens of a document, as an int64 tensor ``[tokens]``.

    Parameters
    ----------
    offset
        The position of the first token, in tokens from the start of the document.

    Raises
    ------
    CorpusError
        If the text is empty, or shorter than ``offset + tokens``.
    """

    _checked_tokens(tokens)
    if offset < 0:
        raise CorpusError(f"offset must be at least 0, found {offset}")
    ids = _encode_document(tokenizer, document)
    if len(ids) < offset + tokens:
        start = f" from offset {offset}" if offset else ""
        raise CorpusError(
            f"{document.name!r} has {len(ids)} tokens, but {tokens} were asked for{start}"
        )
    return ids[offset : offset + tokens].long()


def windows(
    tokenizer: Any,
    documents: Sequence[Document],
    tokens: int,
    samples: int,
    seed: int = 0,
    within: int | None = None,
) -> list[tuple[Document, int, torch.Tensor]]:
    """``samples`` distinct windows of ``tokens`` tokens, spread over the documents.

    The documents are taken in an order drawn from ``seed``, each once before any is
    taken again; the windows of one document are spread along it. Documents that are too
    short are passed over. The same arguments give the same windows.

    Parameters
    ----------
    within
        Cut windows of so many tokens, and keep the last ``tokens`` of each: windows of several lengths
        then end at the same places of the same documents, and differ in nothing but what comes before.

    Returns
    -------
    list of (document, offset in tokens, int64 tensor ``[tokens]``)

    Raises
    ------
    CorpusError
        If the documents that are long enough do not hold that many distinct windows, or ``within`` is
        below ``tokens``.
    """

    _checked_tokens(tokens)
    if within is not None:
        if within < tokens:
            raise CorpusError(f"within {within} must be at least the {tokens} tokens of a window")
        cut = windows(tokenizer, documents, within, samples, seed)
        earlier = within - tokens
        return [(document, offset + earlier, whole[earlier:]) for document, offset, whole in cut]
    if samples < 1:
        raise CorpusError(f"samples must be at least 1, found {samples}")
    if not documents:
        raise CorpusError("there are no documents to cut windows from")
    generator = random.Random(seed)
    order = list(documents)
    generator.shuffle(order)
    eligible: list[tuple[Document, torch.Tensor]] = []
    lengths: dict[str, int] = {}
    for document in order:
        ids = _encode_document(tokenizer, document)
        lengths[document.name] = len(ids)
        if len(ids) >= tokens:
            eligible.append((document, ids))
        if len(eligible) == samples:
            break
    if not eligible:
        longest = max(lengths, key=lambda name: lengths[name])
        raise CorpusError(
            f"{tokens} tokens were asked for, but the longest of {len(order)} document(s), "
            f"{longest!r}, has {lengths[longest]}"
        )
    # A document of n tokens holds n - tokens + 1 distinct windows.
    room = [len(ids) - tokens + 1 for _, ids in eligible]
    if sum(room) < samples:
        raise CorpusError(
            f"{samples} windows of {tokens} tokens were asked for, but the documents hold "
            f"{sum(room)} distinct ones"
        )
    counts = [0] * len(eligible)
    turns: list[tuple[int, int]] = []  # (which document, which of its windows)
    while len(turns) < samples:
        for index in range(len(eligible)):
            if counts[index] < room[index] and len(turns) < samples:
                turns.append((index, counts[index]))
                counts[index] += 1
    # One offset from each of count equal stretches: distinct, and spread along the text.
    offsets = [
        [
            generator.randrange(part * space // count, (part + 1) * space // count)
            for part in range(count)
        ]
        for space, count in zip(room, counts, strict=True)
    ]
    result = []
    for index, part in turns:
        document, ids = eligible[index]
        offset = offsets[index][part]
        piece = ids[offset : offset + tokens].long()
        result.append((document, offset, piece))
    return result


def tiles(
    tokenizer: Any, documents: Sequence[Document], tokens: int, seed: int = 0
) -> list[torch.Tensor]:
    """Disjoint windows of ``tokens`` tokens that cover the documents, in a random order.

    A document with ``weight`` below 1 gives that share of its windows. What is left over at
    the end of a document is dropped, so a short document may give none.

    Raises
    ------
    CorpusError
        If no document is long enough.
    """

    _checked_tokens(tokens)
    generator = random.Random(seed)
    pieces = []
    for document in documents:
        whole = list(_encode_document(tokenizer, document).long().split(tokens))
        if len(whole[-1]) < tokens:
            whole.pop()
        pieces += generator.sample(whole, round(len(whole) * min(document.weight, 1.0)))
    if not pieces:
        raise CorpusError(f"no document has the {tokens} tokens that a window needs")
    generator.shuffle(pieces)
    return pieces


def chat_request(
    tokenizer: Any,
    document: Document,
    tokens: int,
    request: str | None = None,
    offset: int = 0,
) -> torch.Tensor:
    """A chat prompt of exactly ``tokens`` tokens: a passage, then a request about it.

    The user's message is the passage, an empty line and the request (``request``, else
    the document's own query, else :data:`DEFAULT_REQUEST`), in the tokenizer's chat
    template, followed by the start of the assistant's turn. The passage starts at token
    ``offset`` of the document and is as long as the total allows.

    Returns
    -------
    int64 tensor ``[tokens]``

    Raises
    ------
    CorpusError
        If the tokenizer has no chat template, or ``tokens`` leaves no room for a passage,
        or the document is too short.
    """
    import torch

    _checked_tokens(tokens)
    if offset < 0:
        raise CorpusError(f"offset must be at least 0, found {offset}")
    if not getattr(tokenizer, "chat_template", None):
        raise CorpusError("the tokenizer has no chat template; use a window of plain text")
    request = request or document.query or DEFAULT_REQUEST
    passage_mark = "[[passage]]"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{passage_mark}\n\n{request}"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    before, _, after = rendered.partition(passage_mark)
    head, tail = _encode(tokenizer, before), _encode(tokenizer, after)
    ids = _encode_document(tokenizer, document)
    needed = tokens - len(head) - len(tail)
    if needed < 1:
        raise CorpusError(
            f"a chat prompt needs at least {len(head) + len(tail) + 1} tokens for its frame "
            f"and one token of text, but {tokens} were asked for"
        )
    if len(ids) < offset + needed:
        start = f" from offset {offset}" if offset else ""
        raise CorpusError(
            f"{document.name!r} has {len(ids)} tokens, but a chat prompt of {tokens} needs "
            f"{needed} of it{start}"
        )
    passage = ids[offset : offset + needed].long()
    frame = [torch.tensor(part, dtype=torch.long) for part in (head, tail)]
    return torch.cat((frame[0], passage, frame[1]))
