"""Loading a pair by name or from folders, and every way in which that is refused."""

import json

import pytest
import tiny
import torch

from bdlib import assets, pairs
from bdlib.pairs import check_vocabularies, load_pair
from bdlib.transformer import Decoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target and a drafter of one vocabulary, small and random."""
    place = tmp_path_factory.mktemp("pair")
    decoder = tiny.model(dtype=torch.float32, max_positions=64, eos_token_ids=(5,))
    tiny.save_folder(place / "target", decoder)
    other = tiny.model(seed=1, dtype=torch.float32, max_positions=32, num_layers=1)
    tiny.save_folder(place / "drafter", other)
    return place / "target", place / "drafter"


def copy_of(folder, place):
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


# ------------------------------------------------------------------ the embedded pair


def test_the_embedded_pair():
    pair = load_pair()
    assert pair.name == "smollm2"
    assert pair.drafter is None
    assert pair.scaling == "none"
    assert pair.device == pair.target.device
    half = pairs.cpu_has_bfloat16() if pair.device.type == "cpu" else torch.cuda.is_bf16_supported()
    assert pair.dtype == pair.target.dtype == (torch.bfloat16 if half else torch.float32)
    assert pair.stop_tokens == {pair.tokenizer.eos_token_id, 2}
    assert pair.tokenizer.convert_tokens_to_ids("<|im_end|>") in pair.stop_tokens
    config = pair.target.config
    assert (config.num_layers, config.hidden_size, config.num_kv_heads) == (30, 576, 3)
    assert (config.vocab_size, config.max_positions) == (49_152, 8192)
    text = pair.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        token = int(pair.target(text.to(pair.device))[0, -1].argmax())
    assert pair.tokenizer.decode([token]) == " Paris"


def test_the_embedded_pair_is_stretched_for_a_long_context():
    pair = load_pair(context=16_384, dtype="float32", device="cpu", pack=False)
    assert pair.scaling == "YaRN x2"
    assert pair.target.config.max_positions == 16_384
    assert pair.target.config.rope["rope_type"] == "yarn"
    assert pair.target.config.rope["factor"] == 2.0
    with pytest.raises(ValueError, match=r"context 16385 is beyond .*: 8192, or 16384 with YaRN"):
        load_pair(context=16_385, dtype="float32", device="cpu")


# ------------------------------------------------------------------ folders


def test_two_folders(folders):
    target, drafter = folders
    pair = load_pair(target=target, drafter=str(drafter), dtype="float64", device="cpu")
    assert pair.name == f"{target} + {drafter}"
    assert pair.dtype == pair.drafter.dtype == torch.float64
    assert (pair.target.config.num_layers, pair.drafter.config.num_layers) == (2, 1)
    assert pair.stop_tokens == {0, 5}  # the tokenizer's and the model's
    assert pair.tokenizer(tiny.words([3, 1, 4]))["input_ids"] == [3, 1, 4]
    expected = Decoder.load(drafter, dtype=torch.float64)
    with torch.inference_mode():
        text = tiny.text(20)[None]
        assert torch.allclose(pair.drafter(text), expected(text))
        # A drafter works at the target's positions, beyond those it was made for if need be.
        assert pair.drafter(tiny.text(64)[None]).shape == (1, 64, 23)


def test_a_target_alone(folders):
    pair = load_pair(target=folders[0], device="cpu")
    assert pair.drafter is None
    assert pair.name == str(folders[0])
    assert load_pair(target=folders[0], context=64, device="cpu").scaling == "none"


def test_a_target_is_stretched_by_the_factor_it_needs(folders):
    pair = load_pair(target=folders[0], drafter=folders[1], context=65, device="cpu")
    assert pair.scaling == "YaRN x2"
    assert pair.target.config.max_positions == pair.drafter.config.max_positions == 128
    with pytest.raises(ValueError, match="context 129 is beyond the model's positions: 64, or 128"):
        load_pair(target=folders[0], context=129, device="cpu")


def test_a_model_that_is_stretched_already_is_not_stretched_again(folders, tmp_path):
    folder = tmp_path / "stretched"
    model = tiny.model(dtype=torch.float32, max_positions=64)
    model.config = model.config.with_yarn(2)
    tiny.save_folder(folder, model)
    assert load_pair(target=folder, context=128, device="cpu").scaling == "none"
    with pytest.raises(ValueError, match="context 129 is beyond .* not stretched already"):
        load_pair(target=folder, context=129, device="cpu")


def test_unpacked_weights_are_for_training(folders):
    pair = load_pair(target=folders[0], drafter=folders[1], pack=False, device="cpu")
    for model in (pair.target, pair.drafter):
        assert all(layer.qkv.packed is None for layer in model.layers)


# ------------------------------------------------------------------ vocabularies


def test_different_vocabularies_name_sizes_and_first_difference(folders, tmp_path):
    words = [f"w{i}" for i in range(23)]
    words[4], words[9] = words[9], words[4]
    other = tiny.model(seed=1, dtype=torch.float32)
    tiny.save_folder(tmp_path / "swapped", other, words)
    with pytest.raises(ValueError, match="target has 23 tokens, the drafter 23; .*") as caught:
        load_pair(target=folders[0], drafter=tmp_path / "swapped", device="cpu")
    assert "the first difference is token 4: 'w4' against 'w9'" in str(caught.value)

    larger = tiny.model(seed=1, dtype=torch.float32, vocab_size=25)
    tiny.save_folder(tmp_path / "larger", larger)
    with pytest.raises(ValueError, match="target has 23 tokens, the drafter 25; .*") as caught:
        load_pair(target=folders[0], drafter=tmp_path / "larger", device="cpu")
    assert "token 23: None against 'w23'" in str(caught.value)


def test_without_a_tokenizer_the_heads_must_have_one_size(folders, tmp_path):
    tiny.model(seed=1, dtype=torch.float32, vocab_size=30).save(tmp_path / "bare")
    message = "target's head has 23 rows, the drafter's 30; the first row without .* is 23"
    with pytest.raises(ValueError, match=message):
        load_pair(target=folders[0], drafter=tmp_path / "bare", device="cpu")
    tiny.model(seed=1, dtype=torch.float32).save(tmp_path / "fitting")
    assert load_pair(target=folders[0], drafter=tmp_path / "fitting", device="cpu").drafter


def test_vocabularies_by_themselves():
    check_vocabularies({"a": 0, "b": 1}, {"b": 1, "a": 0})
    with pytest.raises(ValueError, match="2 tokens, the drafter 1; .* token 1: 'b' against None"):
        check_vocabularies({"a": 0, "b": 1}, {"a": 0})
    with pytest.raises(ValueError, match="2 tokens, the drafter 2; .* token 1: 'b' against None"):
        check_vocabularies({"a": 0, "b": 1}, {"a": 0, "b": 7})


# ------------------------------------------------------------------ refusals


def test_names_that_are_not_known(folders):
    with pytest.raises(
        ValueError, match="unknown pair 'gpt5'; allowed: smollm2, paper, or target="
    ):
        load_pair("gpt5")
    for dtype, message in (
        ("int8", "unknown dtype 'int8'; allowed: auto, bfloat16, float32, float64, float16"),
        ("float16", "dtype 'float16' is for GPUs; on CPU use bfloat16 or float32"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pair(target=folders[0], dtype=dtype, device="cpu")
    for device in ("tpu-thing", "mps:x"):
        with pytest.raises(ValueError, match=f"unknown device '{device}'; allowed: auto, cpu"):
            load_pair(target=folders[0], device=device)


def test_a_gpu_that_is_not_there(folders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' asked for, but no GPU is usable here"):
        load_pair(target=folders[0], device="cuda")


def test_folders_that_are_not_there(folders, tmp_path):
    for source in (tmp_path / "none", "./none", "none", "a/b/c"):
        with pytest.raises(ValueError, match=f"no model folder at '{source}'"):
            load_pair(target=source)
    with pytest.raises(ValueError, match="no model folder at 'none'"):
        load_pair(target=folders[0], drafter="none")
    with pytest.raises(ValueError, match="model 'owner/name' is not in the hub cache and the hub"):
        load_pair(target="owner/name")


def test_assets_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("BDLIB_DATA", str(tmp_path))
    with pytest.raises(assets.AssetError, match="is missing; run: python -m bdlib fetch"):
        load_pair("smollm2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{}", "config.json is damaged or not a decoder's"),
        ("config.json", b'{"model_type": "llama"', "config.json is damaged or not a decoder's"),
        ("config.json", b"\xff\xfe", "config.json is damaged or not a decoder's"),
        ("config.json", None, "is not a model folder: it has no config.json"),
        ("model.safetensors", b"version https://git-lfs", "model.safetensors is damaged"),
        ("model.safetensors", None, "has no model.safetensors"),
        ("tokenizer.json", b"{", "the tokenizer of .* cannot be read"),
        ("tokenizer.json", b'{"model": {}}', "the tokenizer of .* cannot be read"),
        ("tokenizer_config.json", b"{", "the tokenizer of .* cannot be read"),
    ],
)
@pytest.mark.parametrize("side", ["target", "drafter"])
def test_a_damaged_folder_is_one_clear_error(folders, tmp_path, side, name, content, message):
    place = copy_of(folders[0], tmp_path / "damaged")
    if content is None:
        (place / name).unlink()
    else:
        (place / name).write_bytes(content)
    sides = {"target": folders[0], "drafter": folders[1], side: place}
    with pytest.raises(ValueError, match=message):
        load_pair(**sides, device="cpu")


def test_a_target_needs_a_tokenizer(folders, tmp_path):
    place = copy_of(folders[0], tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / name).unlink()
    with pytest.raises(ValueError, match="the tokenizer of .*bare.* cannot be read"):
        load_pair(target=place, device="cpu")


def test_config_and_weights_that_do_not_fit(folders, tmp_path):
    place = copy_of(folders[0], tmp_path / "mixed")
    config = json.loads((place / "config.json").read_text()) | {"num_key_value_heads": 1}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weight layers\.0\.qkv\.weight has shape \(64, 32\)"):
        load_pair(target=place, device="cpu")
