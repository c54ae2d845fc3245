"""Loading pairs: the embedded one, folders, vocabularies that differ, positions, devices."""

import pytest
import tiny
import torch

from bdlib import pairs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    target = tiny.model(seed=3, dtype=torch.float32, max_positions=64)
    tiny.save_folder(folder / "target", target)
    tiny.save_folder(folder / "short", tiny.model(seed=4, dtype=torch.float32, max_positions=16))
    tiny.save_folder(folder / "large", tiny.model(seed=5, dtype=torch.float32, vocab_size=30))
    return folder


def test_the_embedded_pair():
    pair = pairs.load_pair("smollm2")
    config = pair.target.config
    assert (config.num_layers, config.hidden_size, config.num_kv_heads) == (30, 576, 3)
    assert (config.vocab_size, config.max_positions) == (49_152, 8192)
    assert pair.drafter is None
    assert pair.scaling == "none"
    assert pair.dtype == (torch.bfloat16 if pairs.cpu_has_bfloat16() else torch.float32)
    assert pair.tokenizer.eos_token_id in pair.stop_tokens
    assert pair.tokenizer.convert_tokens_to_ids("<|im_end|>") in pair.stop_tokens


def test_sixteen_thousand_positions_are_stretched_and_say_so():
    pair = pairs.load_pair("smollm2", context=16_384)
    assert pair.scaling == "YaRN x2"
    assert pair.target.config.max_positions == 16_384
    assert pair.target.config.rope["original_max_position_embeddings"] == 8192
    with pytest.raises(ValueError, match="context 16385 is beyond the model's positions: 8192, or"):
        pairs.load_pair("smollm2", context=16_385)


def test_two_folders_are_a_pair(place):
    pair = pairs.load_pair(target=place / "target", drafter=place / "short", dtype="float64")
    assert pair.target.dtype == pair.drafter.dtype == torch.float64
    # The paper's drafter too was made for fewer positions than its target decodes at.
    assert pair.drafter.config.max_positions == 64
    assert pair.stop_tokens == {0}


def test_vocabularies_that_differ_are_refused(place):
    message = r"the target has 23 tokens, the drafter 30; the first difference is token 23: None"
    with pytest.raises(ValueError, match=message):
        pairs.load_pair(target=place / "target", drafter=place / "large")
    (place / "large" / "tokenizer_config.json").rename(place / "large" / "kept.json")
    try:
        with pytest.raises(ValueError, match="head has 23 rows, the drafter's 30"):
            pairs.load_pair(target=place / "target", drafter=place / "large")
    finally:
        (place / "large" / "kept.json").rename(place / "large" / "tokenizer_config.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "llama"}, "unknown pair 'llama'; allowed: smollm2, paper, or target="),
        ({"target": "./nowhere"}, "no model folder at './nowhere'"),
        ({"target": "owner/model"}, "'owner/model' (is not in the hub cache|could not be fetched)"),
        ({"dtype": "float8"}, "unknown dtype 'float8'; allowed: auto, bfloat16"),
        ({"dtype": "float16", "device": "cpu"}, "'float16' is for GPUs"),
        ({"device": "fridge"}, "unknown device 'fridge'; allowed: auto, cpu, cuda"),
        ({"context": 129}, "context 129 is beyond the model's positions: 64, or 128"),
    ],
)
def test_bad_arguments_are_one_clear_error(place, arguments, message):
    usual = {} if "name" in arguments else {"target": place / "target"}
    with pytest.raises(ValueError, match=message):
        pairs.load_pair(**{**usual, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(place):
    with pytest.raises(ValueError, match="device 'cuda' asked for, but no GPU is usable"):
        pairs.load_pair(target=place / "target", device="cuda")
