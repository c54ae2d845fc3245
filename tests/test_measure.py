"""Measuring: records that hold what they say, bounds that refuse, one-line errors at the command line."""

import copy
import json

import pytest
import tiny
import torch

from bdlib import __main__ as cli
from bdlib import measure, pairs
from bdlib.corpora import Document
from bdlib.decoding import generate
from bdlib.drafters import NGramDrafter, SelfDrafter, prefill
from bdlib.measure import FIELDS, MeasureSettings
from bdlib.selection import make_policy

WORDS = 47
NAMED = (
    *("acceptance_rate", "accepted_length", "rounds", "tokens", "tokens_per_second"),
    *("ar_tokens_per_second", "speedup_decode", "speedup_with_prefill", "identical"),
    *("divergences", "kv_entries_max", "kv_bytes_drafter", "kv_bytes_target", "peak_rss_bytes"),
    *("distinct_2", "seconds", "machine", "dtype", "seed", "commit"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two model folders with one vocabulary, one with another, a damaged one, and texts."""
    folder = tmp_path_factory.mktemp("models")
    target = tiny.model(seed=3, dtype=torch.float32, vocab_size=WORDS, max_positions=256)
    tiny.save_folder(folder / "target", target)
    tiny.save_folder(folder / "drafter", tiny.perturbed(target, 0.05))
    other = [f"w{i}" for i in range(WORDS)]
    other[5] = "five"
    tiny.save_folder(folder / "other", target, other)
    tiny.save_folder(folder / "damaged", target)
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    broken = tiny.model(seed=3, dtype=torch.float32, vocab_size=WORDS, max_positions=256)
    broken.final_norm[0] = float("nan")
    tiny.save_folder(folder / "nan", broken)
    ids = tiny.text(3000, seed=1, vocabulary=WORDS).tolist()
    (folder / "text.txt").write_text(tiny.words(ids), encoding="utf8")
    (folder / "empty.txt").write_text("  \n", encoding="utf8")
    (folder / "short.txt").write_text(tiny.words(ids[:20]), encoding="utf8")
    return folder


@pytest.fixture(scope="module")
def pair(place):
    return pairs.load_pair(target=place / "target", dtype="float32")


def settings(place, **changes):
    usual = {"budget": 16, "context": 120, "samples": 3, "new_tokens": 20, "dtype": "float32"}
    return MeasureSettings(text=str(place / "text.txt"), **{**usual, **changes})


@pytest.fixture(scope="module")
def report(place, pair):
    return measure.measure(settings(place), pair)


# --------------------------------------------------------------------------- records


def test_a_record_holds_every_field_and_no_other(report):
    assert set(NAMED) <= set(FIELDS)
    for record in report.records:
        assert list(record) == list(FIELDS)
    assert set(NAMED) <= set(report.aggregate)
    json.dumps(report.records, allow_nan=False)


def test_a_record_agrees_with_decoding_by_hand(place, pair, report):
    from bdlib import corpora

    documents = corpora.load_texts(place / "text.txt")
    cut = corpora.windows(pair.tokenizer, documents, 100, 3, 0)
    for record, (_, offset, prompt) in zip(report.records, cut, strict=True):
        who = SelfDrafter(pair.target, make_policy("chunk_topk_recent"), 16)
        found = generate(pair.target, prompt, who, gamma=4, max_new_tokens=20)
        assert record["offset"] == offset
        assert record["acceptance_rate"] == found.acceptance_rate
        assert record["accepted_length"] == found.accepted_length
        assert (record["rounds"], record["tokens"]) == (len(found.rounds), 20)
        assert record["distinct_2"] == measure.distinct_n(found.tokens, 2)
        assert record["identical"] is True
        assert record["divergences"] == 0
        assert record["kv_entries_max"] <= 16
        assert record["kv_bytes_target"] == pair.target.config.kv_bytes(120, torch.float32)
        assert all(seconds >= 0 for seconds in record["seconds"].values())


def test_an_aggregate_adds_up(report):
    found, records = report.aggregate, report.records
    assert found["samples"] == 3
    for name in ("acceptance_rate", "accepted_length", "distinct_2"):
        assert found[name] == pytest.approx(sum(r[name] for r in records) / 3)
        spread = found["intervals"][name]
        assert spread["low"] <= found[name] <= spread["high"]
    assert found["tokens"] == 60
    assert found["speedup_decode"] == sorted(r["speedup_decode"] for r in records)[1]
    assert found["identical"] is True
    assert "document" not in found


@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_other_drafters_are_measured_too(place, drafter):
    chosen = settings(
        place, pair=str(place / "target"), samples=1,
        drafter="ngram" if drafter == "ngram" else str(place / "drafter"),
    )  # fmt: skip
    record = measure.measure(chosen).records[0]
    assert record["drafter"] == ("ngram" if drafter == "ngram" else "drafter")
    assert record["identical"] is True
    if drafter == "ngram":
        assert record["policy"] is None
        assert record["acceptance_rate"] == record["ngram_acceptance_rate"]


def test_sampling_has_no_identity(place, pair):
    record = measure.measure(settings(place, temperature=0.7, samples=1), pair).records[0]
    assert record["identical"] is None
    assert record["divergences"] is None


def test_the_same_settings_give_the_same_tokens(place, pair, report):
    again = measure.measure(settings(place), pair)
    for name in ("acceptance_rate", "rounds", "distinct_2", "offset"):
        assert [r[name] for r in again.records] == [r[name] for r in report.records]


# --------------------------------------------------------------------------- refusals


def test_an_impossible_record_is_refused_and_not_written(report, tmp_path):
    doctored = copy.deepcopy(report)
    record = doctored.records[1]
    record["accepted_length"] = 1 + record["gamma"] * record["acceptance_rate"] + 0.01
    with pytest.raises(ValueError, match="tokens per round is impossible: at most"):
        doctored.write(tmp_path / "out.json")
    assert not list(tmp_path.iterdir())
    report.write(tmp_path / "out.json")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["records"] == json.loads(json.dumps(report.records))


def test_a_paper_row_breaks_the_bound():
    row = {"gamma": 5, "acceptance_rate": 0.2043, "accepted_length": 2.13}
    row |= {"ngram_acceptance_rate": None, "ngram_accepted_length": 1.0}
    with pytest.raises(ValueError, match=r"at most 2\.0215"):
        measure.check_bound(row)
    measure.check_bound(row | {"accepted_length": 2.0215})


def test_a_doctored_output_diverges_where_it_was_doctored(pair):
    prompt = tiny.text(40, vocabulary=WORDS)
    cache = prefill(pair.target, prompt, 80)
    plain = generate(pair.target, prompt, max_new_tokens=16).tokens
    assert measure.divergences(pair.target, cache, prompt, plain) == []
    wrong = [*plain]
    wrong[7] = (plain[7] + 1) % WORDS
    found = measure.divergences(pair.target, cache, prompt, wrong)
    assert found[0]["position"] == 7
    assert (found[0]["token"], found[0]["expected"]) == (wrong[7], plain[7])
    assert found[0]["shortfall"] >= found[0]["gap"] > 0


@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_ngram_acceptance_is_that_of_decoding(pair, gamma):
    prompt = tiny.text(60, vocabulary=WORDS)
    found = generate(pair.target, prompt, NGramDrafter(), gamma=gamma, max_new_tokens=40)
    rate, length = measure.ngram_acceptance(prompt, found.tokens, gamma)
    assert length == pytest.approx(found.accepted_length)
    assert rate == pytest.approx(found.acceptance_rate, nan_ok=True)


def test_distinct_n():
    assert measure.distinct_n([1, 2, 3, 4], 2) == 1
    assert measure.distinct_n([1, 2] * 4, 2) == pytest.approx(2 / 7)
    assert measure.distinct_n([1], 2) is None
    with pytest.raises(ValueError, match="n 0"):
        measure.distinct_n([1], 0)


def test_intervals():
    found = measure.interval([0.1, 0.4, 0.2, None, float("nan"), 0.3])
    assert (found.mean, found.n) == (pytest.approx(0.25), 4)
    assert found.low < 0.25 < found.high
    assert found == measure.interval([0.1, 0.4, 0.2, 0.3])
    assert measure.interval([0.5]) == (0.5, None, None, 1)
    assert measure.interval([0.5, 0.5]) == (0.5, 0.5, 0.5, 2)
    assert measure.interval([]) == (None, None, None, 0)
    with pytest.raises(ValueError, match="level 1"):
        measure.interval([1.0], level=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0}, "gamma 0 must be"),
        ({"budget": 0}, "budget 0 must be"),
        ({"samples": True}, "samples True must be"),
        ({"new_tokens": 120}, "new_tokens 120 must be fewer than the context of 120"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"policy": "chunk_topk", "budget": 7}, "budget 7 must be at least one chunk"),
        ({"refresh": 0}, "refresh 0 must be"),
    ],
)
def test_bad_settings_are_refused(place, change, message):
    with pytest.raises(ValueError, match=message):
        settings(place, **change)


def test_documents_of_ones_own(place, pair):
    text = (place / "text.txt").read_text()
    chosen = settings(place, samples=1)
    record = measure.measure(chosen, pair, [Document("mine", text)]).records[0]
    assert record["document"] == "mine"
    assert record["text"] is None


# ----------------------------------------------------------------------- command line


def run(monkeypatch, capsys, *arguments):
    """Exit status and standard error of the command, in this process."""
    monkeypatch.setattr("sys.argv", ["bdlib", "measure", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_the_command_writes_records(place, monkeypatch, capsys, tmp_path):
    status, out, _ = run(
        monkeypatch, capsys, "--pair", place / "target", "--text", place / "text.txt",
        "--budget", 16, "--context", 100, "--new-tokens", 12, "--samples", 2,
        "--dtype", "float32", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert status == 0
    assert "same as greedy    yes, every token" in out
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written["records"]) == 2
    assert set(NAMED) <= set(written["records"][0])


BAD = {
    "unknown pair": (["--pair", "nothing"], "unknown pair 'nothing'; allowed: smollm2, paper"),
    "vocabulary": (
        ["--drafter", "{other}"],
        "vocabularies differ: the target has 47 tokens, the drafter 47; the first difference is"
        " token 5: 'w5' against 'five'",
    ),
    "budget 0": (["--budget", "0"], "budget 0 must be a whole number of at least 1"),
    "negative budget": (["--budget", "-4"], "budget -4 must be"),
    "gamma 0": (["--gamma", "0"], "gamma 0 must be a whole number of at least 1"),
    "positions": (["--context", "3000"], "context 3000 is beyond the model's positions: 256"),
    "empty text": (["--text", "{empty.txt}"], "empty.txt is empty"),
    "short text": (["--text", "{short.txt}"], "'short', has 20"),
    "absent text": (["--text", "{absent.txt}"], "absent.txt does not exist"),
    "output": (["--json", "{nowhere}/out.json"], "is not a folder"),
    "output is a folder": (["--json", "{target}"], "is not a plain file"),
    "damaged": (["--pair", "{damaged}"], "model.safetensors is damaged"),
    "damaged drafter": (["--drafter", "{damaged}"], "model.safetensors is damaged"),
    "not a number": (["--pair", "{nan}"], "logits are not numbers"),
    "drafter not a number": (["--drafter", "{nan}"], "are not numbers"),
    "unknown drafter": (["--drafter", "best"], "unknown drafter 'best'; allowed: self, ngram"),
    "dtype": (["--dtype", "int4"], "unknown dtype 'int4'"),
    "device": (["--device", "tpu9"], "device 'tpu9'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(place, monkeypatch, capsys, name):
    changes, message = BAD[name]
    changes = [
        str(place / c.strip("{}").replace("}", "")) if c.startswith("{") else c for c in changes
    ]
    usual = {"--pair": str(place / "target"), "--text": str(place / "text.txt")}
    usual |= {"--context": "100", "--new-tokens": "12", "--samples": "1", "--budget": "16"}
    usual |= {"--dtype": "float32"} | dict([changes])
    status, _, err = run(monkeypatch, capsys, *[part for item in usual.items() for part in item])
    lines = [line for line in err.splitlines() if "sample" not in line and line.strip()]
    assert status == 2
    assert lines[-1].startswith("error: "), err
    assert message in lines[-1]
    assert "Traceback" not in err


def test_missing_assets_are_one_line(place, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("BDLIB_DATA", str(tmp_path / "none"))
    status, _, err = run(monkeypatch, capsys, "--text", place / "text.txt", "--context", "100")
    assert status == 2
    assert "is missing; run: python -m bdlib fetch" in err
    assert err.count("error: ") == 1
