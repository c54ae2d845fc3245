"""Baselines: two levels are lossless, transformers is timed as it runs, and a comparison adds up."""

import json
import random
from collections import Counter

import pytest
import tiny
import torch
from typer.testing import CliRunner

from bdlib import __main__, baselines, models
from bdlib import measure as measuring
from bdlib.baselines import BaselineSettings, Contest, compare, summarise
from bdlib.decoding import generate
from bdlib.drafters import ModelDrafter, Proposal, prefill
from bdlib.hierarchy import HierarchyDrafter
from bdlib.pairs import load_pair
from bdlib.selection import make_policy

NEW = 24

# ------------------------------------------------------------------------- two levels


@pytest.fixture(scope="module")
def target():
    return tiny.model(seed=0, sharp=4.0)


@pytest.fixture(scope="module")
def smalls(target):
    part = tiny.perturbed(target, 0.12, seed=2)
    part.vocabulary = torch.arange(0, 23, 2)
    part.head.weight = torch.nn.Parameter(part.head.weight[part.vocabulary], requires_grad=False)
    return [tiny.perturbed(target, 0.12, seed=1), tiny.model(seed=99), part, target]


def two_levels(target, small, budget=16, inner=16, inner_gamma=2, refresh=None, policies=None):
    outer, lower = policies or ("chunk_topk_recent", "sink_window")
    policies = make_policy(outer), make_policy(lower)
    return HierarchyDrafter(
        target, policies[0], budget, small, policies[1], inner, inner_gamma, refresh
    )


def test_two_levels_output_equals_plain_greedy(target, smalls):
    rng, seen = random.Random(1), Counter()
    known = {}
    for _ in range(40):
        length, gamma = rng.choice((1, 2, 9, 33, 64, 75)), rng.choice((1, 2, 3, 5, 8, 16))
        if length not in known:
            prompt = tiny.text(length, seed=length)
            with torch.inference_mode():
                known[length] = prompt, tiny.greedy(target, prompt, NEW)
        prompt, expected = known[length]
        outer = rng.choice(("chunk_topk_recent", "sink_window", "snapkv", "chunk_topk"))
        inner_gamma, refresh = rng.choice((1, 2, 3, 7)), rng.choice((None, None, 1, 3))
        drafter = two_levels(
            target, rng.choice(smalls), rng.choice((8, 13, 24, 300)), rng.choice((8, 11, 64)),
            inner_gamma, refresh, (outer, rng.choice(("sink_window", "snapkv"))),
        )  # fmt: skip
        stops = {expected[7]} if rng.random() < 0.2 else set()
        wanted = expected[: expected.index(expected[7]) + 1] if stops else expected
        result = generate(
            target, prompt, drafter, gamma=gamma, max_new_tokens=NEW, stop_tokens=stops
        )
        assert result.tokens == wanted, (length, gamma, inner_gamma, outer)
        seen["accepted"] += result.accepted
        seen["rejected"] += result.drafted - result.accepted
        seen["inner accepted"] += drafter.inner_accepted
        seen["inner rejected"] += drafter.inner_drafted - drafter.inner_accepted
        left = NEW
        for r in result.rounds:  # a proposal is as long as it was asked for
            assert len(r.drafted) == min(gamma, left - 1)
            left -= len(r.emitted)
    assert all(
        seen[name] > 60 for name in ("accepted", "rejected", "inner accepted", "inner rejected")
    ), seen


def test_two_levels_keep_the_entries_of_what_was_emitted(target, smalls):
    """After every round the small model's cache holds what it would compute from the output alone."""
    small, prompt = smalls[0], tiny.text(31)
    drafter = two_levels(target, small, 12, 300, 2, policies=("sink_window", "sink_window"))
    rejected = 0
    commit = drafter.commit
    text = prompt.tolist()

    def checked(emitted, accepted):
        nonlocal rejected
        commit(emitted, accepted)
        rejected += accepted < len(emitted)
        text.extend(emitted)
        cache = drafter.inner.cache
        # All that is emitted but the newest token is known or waits for the next draft.
        assert drafter.inner._pending == text[cache.length : -1]
        fresh = prefill(small, torch.tensor(text[: cache.length + 1]), 80)
        for layer in range(small.config.num_layers):
            held = cache._keys[layer][:, :, : cache.size]
            order = cache.positions(layer)[0, 0]
            assert torch.allclose(held, fresh.keys(layer)[:, :, order], atol=1e-9)

    drafter.commit = checked
    generate(target, prompt, drafter, gamma=5, max_new_tokens=40)
    assert rejected > 3


def test_two_levels_are_perfect_where_both_models_are_the_target(target):
    full = ("full", "full")
    drafter = two_levels(target, target, 90, 90, 3, policies=full)
    result = generate(target, tiny.text(33), drafter, gamma=7, max_new_tokens=NEW)
    assert result.acceptance_rate == 1
    assert [len(r.emitted) for r in result.rounds] == [8, 8, 8]
    assert drafter.inner_accepted == drafter.inner_drafted
    # 7 tokens are two passes of the middle model: 3 drafts and one token more, then 2 and one
    assert drafter.inner_rounds == 6


class Shifted(HierarchyDrafter):
    """Hands over each token with the distribution of its neighbour: no longer lossless."""

    def propose(self, last, n, sampling, generator):
        made = super().propose(last, n, sampling, generator)
        return Proposal(made.tokens, made.probs.roll(1, 0))


@pytest.mark.parametrize(("kind", "lossless"), [(HierarchyDrafter, True), (Shifted, False)])
def test_two_levels_sample_from_the_target(kind, lossless):
    """Chi-square of three tokens; a drafter that mixes its distributions up fails it."""
    target, small = (
        tiny.model(seed=seed, vocab_size=4, sharp=6.0, num_layers=1) for seed in (2, 5)
    )
    target.head.weight *= 2
    window, prompt = make_policy("sink_window"), torch.tensor([1, 3, 2, 0, 1, 1, 2, 3, 0])
    drafter = kind(target, window, 4, small, window, 3, 1)
    p = tiny.chi_square(drafter, target, prompt, 400)
    assert (p > 1e-3) if lossless else (p < 1e-6)


def test_two_levels_refuse_what_does_not_fit(target, smalls):
    feature = models.conditioned_on(tiny.model(dtype=torch.float32), (0, 1))
    with pytest.raises(ValueError, match="reads the target's states; give one that stands alone"):
        two_levels(target, feature)
    for inner_gamma in (0, 16):
        with pytest.raises(ValueError, match=rf"inner_gamma {inner_gamma} must be in 1\.\.15"):
            two_levels(target, smalls[0], inner_gamma=inner_gamma)
    with pytest.raises(ValueError, match="chooses anew at each step"):
        two_levels(target, smalls[0], policies=("oracle", "sink_window"))


# ------------------------------------------------------------------------ a comparison


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a target, three drafters of it in a folder of their own, and texts."""
    place = tmp_path_factory.mktemp("baselines")
    target = tiny.model(seed=3, dtype=torch.float32, sharp=3.0, num_layers=3)
    tiny.save_folder(place / "target", target)
    models.save_drafter(models.cut_from(target, (0, 2)), place / "drafters" / "small", "# card\n")
    cut = models.cut_from(target, (0, 2), torch.arange(0, 23, 2))
    models.save_drafter(cut, place / "drafters" / "rows", "# card\n", {"recipe": "tiny"})
    feature = models.conditioned_on(target, (0, 2))
    models.save_drafter(feature, place / "drafters" / "states", "# card\n")
    (place / "texts").mkdir()
    for name, seed in (("one", 1), ("two", 2)):
        words = tiny.text(120, seed).tolist()
        (place / "texts" / f"{name}.txt").write_text(tiny.words(words + words))
    return place


@pytest.fixture(scope="module")
def pair(place):
    return load_pair(target=place / "target", dtype="float64", device="cpu")


OURS = ("ngram", "self-window", "self-snapkv", "triforce", "small", "small@full", "states")


@pytest.fixture(scope="module")
def asked(place):
    """Settings on the small pair, changed as asked."""

    def make(methods=(*baselines.TRANSFORMERS, *OURS), **changes):
        asked = {
            "methods": methods,
            "regime": "greedy",
            "context": 72,
            "samples": 2,
            "new_tokens": 12,
            "gamma": 3,
            "budget": 16,
            "text": str(place / "texts"),
            "standalone": "small",
            "drafters": str(place / "drafters"),
            "pair": str(place / "target"),
            "dtype": "float64",
            "device": "cpu",
        }
        return BaselineSettings(**asked | changes)

    return make


@pytest.fixture(scope="module")
def records(asked, pair):
    """Every method on the two texts, greedily."""
    return compare(asked(), pair=pair)


def test_every_greedy_output_is_plain_decodings(records):
    assert {r["method"] for r in records} == {"plain", *baselines.TRANSFORMERS, *OURS}
    assert len(records) == 2 * 12
    for record in records:
        assert record["identical"] is True, record["method"]
        assert record["divergences"] == 0
        assert record["tokens"] == 12
        assert list(record) == list(baselines.FIELDS)
        assert record["seconds"] > 0
    plain = [r for r in records if r["method"] == "plain"]
    assert {r["speedup"] for r in plain} == {1.0}
    assert {r["rounds"] for r in plain} == {12}


def of(records, method):
    return [r for r in records if r["method"] == method]


def test_transformers_rounds_are_ours(records):
    """The same drafter, the same draft length, both with full caches: the same rounds."""
    assert all(r["rounds"] < 12 for r in of(records, "assisted"))  # drafts were accepted
    for theirs, ours in zip(of(records, "assisted"), of(records, "small@full"), strict=True):
        for name in ("rounds", "drafted", "accepted", "kv_bytes_drafter"):
            assert theirs[name] == ours[name], name
    for one in of(records, "generate"):
        assert (one["rounds"], one["drafted"], one["acceptance_rate"]) == (12, 0, None)
    assert all(r["drafter_prefill_seconds"] > 0 for r in of(records, "assisted"))


def test_bytes_are_those_of_the_shapes(records, pair):
    entry = pair.target.config.kv_bytes(1, torch.float64)
    for method, wanted in (
        ("plain", 0),
        ("ngram", 0),
        ("self-snapkv", 16 * entry),
        ("small", 16 * entry * 2 // 3),  # two layers of three
        ("triforce", 16 * entry + 16 * entry * 2 // 3),
        ("small@full", 72 * entry * 2 // 3),
    ):
        (record, _) = of(records, method)
        assert record["kv_bytes_drafter"] == wanted, method
        assert record["kv_bytes_target"] == 72 * entry
    (states, _) = of(records, "states")
    assert states["kv_bytes_drafter"] > 16 * entry // 3  # the states that it reads count, too


def test_what_a_table_says(records):
    rows = {row["method"]: row for row in summarise(records)}
    small = of(records, "small")
    assert rows["small"]["speedup"].mean == pytest.approx(sum(r["speedup"] for r in small) / 2)
    assert rows["small"]["speedup"].n == 2  # documents
    assert rows["small"]["acceptance_rate"].mean == pytest.approx(
        sum(r["acceptance_rate"] for r in small) / 2
    )
    text = baselines.table(records)
    assert len(text.splitlines()) == 13
    assert all(line.endswith("yes") for line in text.splitlines()[1:])
    found = baselines.ratio(records, "small", "assisted")
    pairs = [
        a["tokens_per_second"] / b["tokens_per_second"]
        for a, b in zip(small, of(records, "assisted"), strict=True)
    ]
    assert found.mean == pytest.approx(sum(pairs) / 2)
    with pytest.raises(ValueError, match="both 'small' and 'nothing'"):
        baselines.ratio(records, "small", "nothing")
    with pytest.raises(ValueError, match="no records"):
        summarise([])


def test_figures_show_what_was_measured(records):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from bdlib import figures

    rows = summarise(records)
    _, (left, right) = figures.methods_compared(rows)
    drawn = [c.lines[0].get_xdata()[0] for c in left.containers]
    assert drawn == [row["speedup"].mean for row in rows]
    assert [t.get_text() for t in left.get_yticklabels()] == [row["method"] for row in rows]
    shares = sorted(c.lines[0].get_xdata()[0] for c in right.containers)
    names = ("acceptance_rate", "ngram_acceptance_rate", "distinct_2")
    known = [row[name].mean for row in rows for name in names if row[name].mean is not None]
    assert shares == sorted(known)
    _, (kv, weights) = figures.method_bytes(rows)
    drafting = [row for row in rows if row["method"] not in ("plain", "generate")]
    assert [p.get_width() for p in kv.patches] == [r["kv_bytes_drafter"] / 1e6 for r in drafting]
    assert len(weights.patches) == len(drafting)
    ax = figures.two_levels()[1]
    assert {"small model", "the target"} <= {text.get_text() for text in ax.texts}
    plt.close("all")


def test_documents_weigh_the_same():
    base = dict.fromkeys(baselines.FIELDS, 1) | {"method": "m", "inner_acceptance_rate": None}
    rows = [("a", 1.0), ("a", 3.0), ("b", 6.0)]
    found = [base | {"document": d, "sample": i, "speedup": s} for i, (d, s) in enumerate(rows)]
    (row,) = summarise(found)
    assert row["speedup"].mean == 4.0  # of 2 and 6
    assert row["inner_acceptance_rate"].mean is None


def test_differences_are_counted_and_named(records):
    """What is not a near-tie stands out in the table."""
    changed = [dict(r) for r in of(records, "small")]
    changed[0] |= {"identical": False, "divergences": 2, "near_ties_only": True}
    assert baselines.table(changed).endswith("2 near-tie(s)")
    changed[1] |= {"identical": False, "divergences": 1, "near_ties_only": False}
    assert baselines.table(changed).endswith("NO")


def test_transformers_rounding_is_given_more_room(asked, pair, monkeypatch):
    """A shortfall is judged by whose logits chose the token."""
    found = {"identical": False, "divergences": 1, "max_divergence_gap": 0.2}
    found |= {"near_ties_only": False, "divergence_list": [{"shortfall": 0.2}]}
    monkeypatch.setattr(measuring, "_agreement", lambda *rest: dict(found))
    monkeypatch.setitem(measuring.NEAR_TIE, "float64", 0.1)
    contest = Contest(asked(("generate", "ngram")), pair)
    judged = {
        label: baselines._agreement(contest, label, None, None, [], [])
        for label in ("generate", "ngram")
    }
    assert judged["generate"]["near_ties_only"] is True
    assert judged["ngram"]["near_ties_only"] is False
    assert judged["ngram"]["max_shortfall"] == 0.2


def test_sampling_and_draft_lengths_of_their_own(asked, pair):
    methods = ("assisted", "prompt-lookup", "triforce:5", "small:1", "small")
    state = torch.random.get_rng_state()
    found = compare(asked(methods, regime="sampling", temperature=1.0, samples=1), pair=pair)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing is seeded globally
    by = {r["method"]: r for r in found}
    assert list(by) == ["plain", *methods]
    assert [by[m]["gamma"] for m in methods] == [3, 3, 5, 1, 3]
    assert all(r["identical"] is None and r["near_ties_only"] is None for r in found)
    assert all(r["tokens"] == 12 for r in found)
    assert by["small:1"]["drafted"] <= by["small:1"]["rounds"]
    assert by["triforce:5"]["inner_rounds"] > 0
    assert "-" in baselines.table(found)


def test_stop_tokens_end_every_method(asked, pair):
    contest = Contest(asked(("generate", "assisted", "prompt-lookup", "small")), pair)
    prompt = tiny.text(50, seed=1)
    filled = contest.fill(prompt)
    plain = contest.decode("plain", prompt, filled).tokens
    stop = plain[5]
    type(contest).stops, before = frozenset({stop}), type(contest).stops
    try:
        for label in contest.chosen:
            done = contest.decode(label, prompt, filled)
            assert done.tokens == plain[: plain.index(stop) + 1], label
            assert done.tokens[-1] == stop
    finally:
        type(contest).stops = before


def test_the_untrained_drafter_is_cut_from_the_target(asked, pair, monkeypatch):
    from types import SimpleNamespace

    from bdlib import recipes

    monkeypatch.setattr(recipes, "get", lambda name: {"tiny": SimpleNamespace(layers=(0, 2))}[name])
    contest = Contest(asked(("untrained", "rows"), standalone="rows"), pair)
    raw, trained = (contest.drafters[name].model for name in ("untrained", "rows"))
    assert torch.equal(raw.vocabulary, trained.vocabulary)
    assert raw.config.num_layers == 2
    whole = pair.target.layers[2].qkv.dense()
    assert torch.allclose(raw.layers[1].qkv.dense(), whole)


def test_a_log_serves_policies_that_look_at_less(asked, pair):
    """One prefill logs 32 queries for SnapKV; the middle model's policy reads its own 8 of them."""
    settings = asked(("triforce", "self-snapkv"))
    both, alone = Contest(settings, pair), Contest(asked(("triforce",)), pair)
    prompt = tiny.text(60, seed=2)
    held = []
    for contest in (both, alone):
        contest.decode("triforce", prompt, contest.fill(prompt))
        held.append(contest.drafters["triforce"].cache.positions(0))
    assert torch.equal(*held)


def test_turns_alternate(asked, pair, monkeypatch):
    order, seeds = [], []
    decode = Contest.decode

    def noting(self, label, prompt, filled, seed=0, new_tokens=None):
        if new_tokens is None:
            order.append(label)
            seeds.append(seed)
        return decode(self, label, prompt, filled, seed, new_tokens)

    monkeypatch.setattr(Contest, "decode", noting)
    (plain, _) = compare(asked(("ngram",), repeats=3, samples=1), pair=pair)
    assert order == ["plain", "ngram", "ngram", "plain", "plain", "ngram"]
    assert plain["speedup"] == 1.0
    assert seeds == [0] * 6  # greedy turns repeat one text
    seeds.clear()
    compare(asked(("ngram",), repeats=3, samples=2, regime="sampling"), pair=pair)
    assert seeds == [0, 0, 2, 2, 4, 4, 1, 1, 3, 3, 5, 5]  # no text twice


# ------------------------------------------------------------------------------- files


def test_a_stopped_run_goes_on(asked, place, tmp_path, monkeypatch):
    out = tmp_path / "found.csv"
    calls = []
    one = baselines._one_prompt

    def stopping(contest, labels, prompt, index, say):
        calls.append((index, tuple(labels)))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return one(contest, labels, prompt, index, say)

    monkeypatch.setattr(baselines, "_one_prompt", stopping)
    with pytest.raises(KeyboardInterrupt):
        baselines.run(asked(("ngram",)), out)
    rows, about = baselines.load(out)
    assert [(r["sample"], r["method"]) for r in rows] == [(0, "plain"), (0, "ngram")]
    found = baselines.run(asked(("ngram", "small")), out)
    # plain runs again, as the measure of what is new; what is there stays
    assert calls[2:] == [(0, ("plain", "small")), (1, ("plain", "ngram", "small"))]
    again, about = baselines.load(out)
    assert len(again) == len(found) == 6
    assert again[:2] == rows
    assert about["methods"] == ["plain", "ngram", "small"]
    assert about["seeds"] == [0]
    assert len(about["drafters"]["small"]) == 16
    assert about["runs"][0]["versions"]["transformers"]
    assert set(about["columns"]) == set(baselines.FIELDS)
    text = out.with_suffix(".json").read_text()
    assert str(tmp_path.parent) not in text  # no place of this machine
    count = len(calls)
    baselines.run(asked(("ngram", "small")), out)
    assert len(calls) == count  # nothing left
    with pytest.raises(ValueError, match=r"found\.csv holds results with gamma 3; give another"):
        baselines.run(asked(("ngram",), gamma=2), out)
    document = json.loads(text)
    for change, message in (
        ({"schema": 9}, "schema 9, this version reads 1"),
        ({"kind": "sweep"}, "is no comparison of methods"),
    ):
        out.with_suffix(".json").write_text(json.dumps(document | change))
        with pytest.raises(ValueError, match=message):
            baselines.load(out)
    out.with_suffix(".json").write_text(text)
    out.write_text(out.read_text().replace("document,", "name,"))
    with pytest.raises(ValueError, match="is damaged"):
        baselines.load(out)
    with pytest.raises(ValueError, match="cannot be read"):
        baselines.load(tmp_path / "none.csv")


def test_files_of_several_texts_are_numbered_on(records, tmp_path):
    for name in ("a", "b"):
        baselines._write(tmp_path / f"{name}.csv", records)
        measuring.write_json(
            tmp_path / f"{name}.json", {"kind": "baselines", "schema": 1, "of": name}
        )
    one, _ = baselines.load(tmp_path / "a.csv")
    both, about = baselines.load_all(sorted(tmp_path.glob("*.csv")))
    count = len({r["sample"] for r in one})
    assert [r["sample"] for r in both] == [
        *(r["sample"] for r in one),
        *(count + r["sample"] for r in one),
    ]
    assert about["of"] == "b"
    with pytest.raises(ValueError, match="there are no files of a comparison"):
        baselines.load_all([])


def test_numbers_survive_the_file(records, tmp_path):
    out = tmp_path / "x.csv"
    baselines._write(out, records)
    measuring.write_json(out.with_suffix(".json"), {"kind": "baselines", "schema": 1})
    read, _ = baselines.load(out)
    by = {(r["method"], r["sample"]): r for r in records}
    for row in read:
        before = by[row["method"], row["sample"]]
        for name, value in row.items():
            wanted = before[name]
            assert value == (
                pytest.approx(wanted, rel=1e-5) if isinstance(wanted, float) else wanted
            )


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("eagle",)}, "unknown method 'eagle'; allowed: plain, generate"),
        ({"methods": ("small:0",)}, "method 'small:0': a draft length is a whole number"),
        ({"methods": ("small:x",)}, "method 'small:x': a draft length"),
        ({"regime": "beam"}, "unknown regime 'beam'; allowed: greedy, sampling, chat"),
        ({"regime": "sampling", "temperature": 0.0}, "temperature 0.0 must be above 0"),
        ({"inner_gamma": 0}, "inner_gamma 0 must be a whole number"),
        ({"gamma": 0}, "gamma 0 must be a whole number"),
        ({"new_tokens": 72}, "new_tokens 72 must be fewer than the context"),
        ({"drafters": "nowhere"}, "drafters 'nowhere' is not a folder"),
    ],
    ids=str,
)
def test_settings_are_refused(asked, changes, message):
    with pytest.raises(ValueError, match=message):
        asked(**changes)


def test_refusals_come_before_any_decoding(asked, pair, place, monkeypatch):
    monkeypatch.setattr(Contest, "decode", None)
    for changes, message in (
        ({"context": 400}, "400 were asked for|388 tokens were asked for"),
        ({"context": 600}, "context 600 is beyond the target's 512 positions"),
        ({"standalone": "states"}, "'states' reads the target's states"),
        ({"standalone": "none"}, "no drafter 'none'; there: .*rows, small, states"),
        ({"policy": "heavy_hitter"}, "needs another log of queries than SnapKV"),
        ({"budget": 2}, "inner_gamma 2 must be in 1..1"),
    ):
        settings = asked(**{"policy": "sink_window"} | changes)
        with pytest.raises(ValueError, match=message):
            compare(settings, pair=pair)


def test_drafters_are_found_by_folder(place):
    names = baselines.available(place / "drafters")
    assert names[: len(baselines.METHODS)] == list(baselines.METHODS)
    assert {"small", "small@full", "states", "states@full"} <= set(names)
    shipped = set(baselines._folders())
    assert shipped <= set(names)
    assert not {"small", "states"} & set(baselines.available())


def test_the_command_passes_on_what_it_is_told(monkeypatch, tmp_path, records):
    seen = {}

    def run(settings, out, command, progress):
        seen.update(settings=settings, out=out, command=command)
        progress("a prompt")
        return records

    monkeypatch.setattr(baselines, "run", run)
    line = (
        "bench baselines --texts novels --context 300 --samples 3 --new-tokens 20 --regime greedy"
    )
    line += f" --methods ngram,assisted:2 --repeats 5 --out {tmp_path / 'a.csv'}"
    done = CliRunner().invoke(__main__.app, line.split())
    assert done.exit_code == 0, done.output
    settings = seen["settings"]
    assert settings.methods == ("ngram", "assisted:2")
    assert (settings.context, settings.samples, settings.new_tokens) == (300, 3, 20)
    assert (settings.regime, settings.repeats, settings.text) == ("greedy", 5, "novels")
    assert "--texts TEXTS" in seen["command"]
    assert str(tmp_path) not in seen["command"]
    assert "small@full" in done.output


def test_bytes_of_a_plain_drafter_leave_the_features_out(target, smalls):
    """A cache that keeps states for another drafter is not this one's doing."""
    prompt = tiny.text(20)
    cache = prefill(target, prompt, 40, taps=(0, 1))
    drafter = ModelDrafter(smalls[0], make_policy("sink_window"), 8)
    generate(target, prompt, drafter, cache=cache, max_new_tokens=8)
    assert drafter.kv_bytes == smalls[0].config.kv_bytes(8, torch.float64)
