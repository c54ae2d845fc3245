"""Exported drafters: transformers decodes with them losslessly, vLLM's configuration is checked."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch

from bdlib import models, serving
from bdlib.transformer import Decoder

CONFIG = replace(tiny.CONFIG, vocab_size=53, num_layers=3)
ROWS = torch.arange(1, 53, 2)
SPEC = {"method": "draft_model", "model": "drafter", "num_speculative_tokens": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target's folder with a tokenizer, and drafters of it: standalone, feature, whole model."""
    root = tmp_path_factory.mktemp("pair")
    target = Decoder.random(CONFIG, seed=3)
    tiny.save_folder(root / "target", target)
    cut = models.cut_from(target, (0, 2), ROWS)
    provenance = {"recipe": "mine", "steps": 3}
    models.save_drafter(cut, root / "standalone", "# card\n", provenance)
    models.save_drafter(models.conditioned_on(target, (0, 2)), root / "feature", "# card\n")
    tiny.save_folder(root / "plain", tiny.perturbed(target, 0.3))
    other = tiny.model(dtype=torch.float32, vocab_size=51)
    tiny.save_folder(root / "other", other)
    return root


def exported(folders, name, engine, out, **options):
    return serving.export(
        folders / name, out, engine, pair=str(folders / "target"), dtype="float32", **options
    )


# ------------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", ["standalone", "plain"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 15, "eos_token_id": 7},
        {"eos_token_id": [7, 9]},
    ],
    ids=str,
)
def test_assisted_output_is_plain_output(folders, name, settings, tmp_path):
    from transformers import AutoModelForCausalLM

    out = exported(folders, name, "transformers", tmp_path / "out", gamma=3)
    load = AutoModelForCausalLM.from_pretrained
    target, drafter = (load(p, dtype=torch.float64) for p in (folders / "target", out))
    assert drafter.generation_config.num_assistant_tokens == 3
    passes = []
    target.register_forward_hook(lambda *_: passes.append(1))
    drafted = 0
    for seed in range(2):
        prompt = torch.randint(1, 53, (1, 30), generator=torch.Generator().manual_seed(seed))
        run = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **settings}
        run["attention_mask"] = torch.ones_like(prompt)
        plain = target.generate(prompt, **run)
        before = len(passes)
        fast = target.generate(prompt, assistant_model=drafter, **run)
        drafted += fast.shape[1] - 30 - (len(passes) - before)
        assert torch.equal(plain, fast)
    assert drafted > 0  # tokens above one a pass: drafts were accepted


def test_every_file_that_transformers_reads_is_there(folders, tmp_path):
    from transformers import AutoTokenizer

    out = exported(folders, "standalone", "transformers", tmp_path / "out", gamma=6)
    assert AutoTokenizer.from_pretrained(out).get_vocab()["w7"] == 7
    written = json.loads((out / "generation_config.json").read_text())
    assert written["num_assistant_tokens"] == 6
    assert written["num_assistant_tokens_schedule"] == "constant"
    text = (out / "README.md").read_text()
    assert "| recipe | mine, 3 steps |" in text
    assert "26 tokens; the target's rows elsewhere" in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
    assert not (out / "speculative_config.json").exists()
    assert not list(out.glob("*.writing"))


def test_weights_are_those_of_the_drafter(folders, tmp_path):
    target = Decoder.load(folders / "target", pack=False)
    drafter = models.load_drafter(folders / "standalone", target, pack=False)
    again = Decoder.load(exported(folders, "standalone", "vllm", tmp_path / "out"), pack=False)
    tokens = torch.randint(0, 53, (1, 20), generator=torch.Generator().manual_seed(1))
    ours, theirs, whole = drafter(tokens), again(tokens), target.head.dense()
    assert torch.allclose(theirs[..., ROWS], ours, atol=1e-5)
    rest = torch.ones(53, dtype=torch.bool).index_fill_(0, ROWS, False)
    assert torch.equal(again.head.dense()[rest], whole[rest])


# --------------------------------------------------------------------------- vLLM


def test_vllm_gets_a_checked_configuration_and_a_command(folders, tmp_path):
    out = exported(folders, "standalone", "vllm", tmp_path / "with space", gamma=5)
    config = json.loads((out / "speculative_config.json").read_text())
    assert config == {
        "method": "draft_model",
        "model": str(out),
        "num_speculative_tokens": 5,
    }
    serving.check_vllm(config)
    sizes = [json.loads((p / "config.json").read_text()) for p in (out, folders / "target")]
    assert sizes[0]["vocab_size"] == sizes[1]["vocab_size"]
    line = next(x for x in (out / "README.md").read_text().splitlines() if x.startswith("vllm"))
    words = shlex.split(line)
    assert words[:3] == ["vllm", "serve", str(folders / "target")]
    option = line.split("--speculative-config ")[1]
    shown = subprocess.run(["sh", "-c", f"printf %s {option}"], capture_output=True, text=True)
    assert json.loads(shown.stdout) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 256}, "has no speculative_config field 'budget'; allowed: attention_backend"),
        ({"num_draft_tokens": 4}, "no speculative_config field 'num_draft_tokens'"),
        ({"tensor_parallel_size": 2}, "say draft_tensor_parallel_size"),
        ({"draft_model_config": {}}, "set by vLLM itself"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens 0 must be a whole number of at"),
        ({"num_speculative_tokens": "4"}, "num_speculative_tokens '4' must be"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens True must be"),
        ({"num_speculative_tokens": None}, "num_speculative_tokens None must be"),
        ({"method": "draft"}, "method 'draft' must be one of draft_model, ngram"),
        ({"draft_sample_method": "random"}, "must be one of greedy, probabilistic"),
        ({"enforce_eager": 1}, "enforce_eager 1 must be true or false"),
        ({"model": ""}, "model '' must be a text"),
        ({"draft_tensor_parallel_size": 2}, "2 must be the target's 1"),
        ({"model": "runs/Eagle3-mine"}, "'eagle3' in 'runs/Eagle3-mine' makes it eagle3"),
    ],
    ids=str,
)
def test_what_vllm_would_refuse_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        serving.check_vllm(SPEC | change)


def test_what_vllm_needs_is_asked_for():
    serving.check_vllm({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4})
    serving.check_vllm({"model": "x", "num_speculative_tokens": 3})  # a draft model by default
    serving.check_vllm(SPEC | {"draft_tensor_parallel_size": 2}, tensor_parallel=2)
    with pytest.raises(ValueError, match="num_speculative_tokens is missing"):
        serving.check_vllm({"method": "draft_model", "model": "x"})
    with pytest.raises(ValueError, match="draft_model needs a model"):
        serving.check_vllm({"method": "draft_model", "num_speculative_tokens": 3})
    with pytest.raises(ValueError, match="give a model"):
        serving.check_vllm({"num_speculative_tokens": 3})


def test_fields_are_those_of_an_installed_vllm():
    speculative = pytest.importorskip("vllm.config.speculative")
    from dataclasses import fields
    from importlib.metadata import version

    if version("vllm") != serving.VLLM_VERSION:
        pytest.skip(f"vLLM {version('vllm')} is not {serving.VLLM_VERSION}")
    known = {field.name for field in fields(speculative.SpeculativeConfig)}
    assert set(serving.FIELDS) | {*serving.ENGINE_FIELDS, "tensor_parallel_size"} == known


def test_the_checked_version_is_the_pinned_one(repository):
    import tomllib

    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    (pin,) = project["optional-dependencies"]["serving"]
    assert pin.startswith(f"vllm=={serving.VLLM_VERSION};")


# ----------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("vllm", "reads the target's states after layers 0, 2 .* EAGLE-3 .* no weights of theirs"),
        ("transformers", "reads the target's states after layers 0, 2 .* token ids only"),
    ],
)
def test_a_feature_drafter_is_refused_with_the_reason(folders, engine, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        exported(folders, "feature", engine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_told_before_anything_is_written(folders, tmp_path):
    out = tmp_path / "out"
    for name, engine, options, message in (
        ("standalone", "tgi", {}, "unknown engine 'tgi'; allowed: transformers, vllm"),
        ("standalone", "vllm", {"gamma": 0}, "gamma 0 must be a whole number"),
        ("other", "vllm", {}, "vocabularies differ"),
        ("nothing", "vllm", {}, "no model folder at"),
    ):
        with pytest.raises(ValueError, match=message):
            exported(folders, name, engine, out, **options)
    with pytest.raises(ValueError, match="makes it eagle3"):
        exported(folders, "standalone", "vllm", tmp_path / "eagle3")
    with pytest.raises(ValueError, match="the folder to read from"):
        exported(folders, "plain", "vllm", folders / "plain")
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        serving.export(folders / "standalone", out, "vllm", str(folders / "target"), dtype="int8")
    assert not out.exists()


def test_from_the_command_line(folders, tmp_path, monkeypatch, capsys):
    from bdlib.__main__ import main

    def run(name):
        options = ("--out", str(tmp_path / "out"), "--for", "vllm", "--gamma", "2")
        pair = ("--pair", str(folders / "target"))
        monkeypatch.setattr(sys, "argv", ["bdlib", "export", str(folders / name), *options, *pair])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr()

    code, refused = run("feature")
    assert code == 2
    assert refused.err.startswith("error: feature is feature-conditioned")
    assert refused.err.count("\n") == 1
    code, done = run("standalone")
    assert code == 0, done.err
    assert json.loads((tmp_path / "out" / serving.VLLM_FILE).read_text())["model"] in done.out
