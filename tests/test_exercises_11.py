"""The checks of lesson 11 accept right answers and name what is wrong with others."""

import pytest
import torch

from bdlib import exercises

SERVER = ("exported/drafter", 2, 0.7, 0.1, 1.2)
GOOD = {"method": "draft_model", "model": "exported/drafter", "num_speculative_tokens": 4}


def right(target, rows, vocabulary):
    head = target.clone()
    head[vocabulary] = rows
    return head


def zeros(target, rows, vocabulary):
    head = torch.zeros_like(target)
    head[vocabulary] = rows
    return head


def floor(target, rows, vocabulary):
    head = torch.full_like(target, -1e4)
    head[vocabulary] = rows
    return head


def in_place(target, rows, vocabulary):
    target[vocabulary] = rows
    return target


def first(target, rows, vocabulary):
    return torch.cat((rows, target[len(rows) :]))


def one_off(target, rows, vocabulary):
    head = right(target, rows, vocabulary)
    head[2] = 0
    return head


def test_a_full_head_is_accepted():
    assert exercises.check_full_head(None).passed is None
    assert exercises.check_full_head(lambda *_: None).passed is None
    assert exercises.check_full_head(right).passed is True


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (zeros, "a score of 0 beats every negative one"),
        (floor, "must be the target's"),
        (in_place, "the target's own head was written to"),
        (first, "belongs to token vocabulary[i]"),
        (lambda target, rows, vocabulary: rows, "a row for every token"),
        (lambda target, rows, vocabulary: target.clone(), "the trained rows are missing"),
        (lambda target, rows, vocabulary: right(target, rows.flip(0), vocabulary), "another order"),
        (one_off, "row 2, outside the draft vocabulary [1, 4, 6], is wrong"),
        (lambda target, rows, vocabulary: target[:5], "the shape is [5, 4]"),
        (lambda target, rows, vocabulary: 3, "return a tensor, not a int"),
        (lambda target, rows: target, "TypeError"),
    ],
)
def test_names_what_is_wrong_with_a_head(answer, message):
    verdict = exercises.check_full_head(answer)
    assert verdict.passed is False
    assert message in verdict.message


def best():
    """The draft length of the exercise, by trying all."""

    def speedup(gamma):
        return (1 - 0.7 ** (gamma + 1)) / (1 - 0.7) / (0.1 * gamma + 1.2)

    return max(range(1, 33), key=speedup)


def test_a_configuration_is_accepted():
    assert exercises.check_serving_config(None, *SERVER).passed is None
    good = GOOD | {"num_speculative_tokens": best()}
    for config in (good, {k: v for k, v in good.items() if k != "method"}):
        assert exercises.check_serving_config(config, *SERVER).passed is True
    split = good | {"draft_tensor_parallel_size": 2}
    assert exercises.check_serving_config(split, *SERVER).passed is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draft_tensor_parallel_size": 1}, "1 must be the target's 2"),
        ({"tensor_parallel_size": 2}, "say draft_tensor_parallel_size"),
        ({"budget": 256}, "no speculative_config field 'budget'"),
        ({"method": "eagle3"}, "valid, but not for this drafter"),
        ({"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}, "is the target"),
        ({"model": "other/drafter"}, "another folder"),
        ({"num_speculative_tokens": 1}, "a longer draft gives more"),
        ({"num_speculative_tokens": 20}, "a shorter draft gives more"),
        ({"max_model_len": 4096}, "nothing here asks for it"),
    ],
)
def test_names_what_is_wrong_with_a_configuration(change, message):
    config = GOOD | {"num_speculative_tokens": best()} | change
    verdict = exercises.check_serving_config(config, *SERVER)
    assert verdict.passed is False
    assert message in verdict.message


def test_a_configuration_must_be_a_dictionary():
    assert "not a str" in exercises.check_serving_config("draft_model", *SERVER).message
