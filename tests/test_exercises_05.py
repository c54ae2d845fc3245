"""The check of lesson 05 accepts LK-alpha and names what is wrong with what is not."""

import pytest
import torch

from bdlib import exercises


def lk_alpha(logits, target_probs):
    draft_probs = logits.softmax(-1)
    return -torch.minimum(target_probs, draft_probs).sum(-1).log().mean()


def point_mass(target_probs):
    return target_probs.amax(-1) == 1


def overlap(z, p):
    return torch.minimum(p, z.softmax(-1)).sum(-1)


def test_accepts_the_loss_and_the_condition():
    verdict = exercises.check_lk_alpha(lk_alpha, point_mass)
    assert verdict.passed is True


def test_accepts_another_way_to_write_it():
    def loss(logits, target_probs):
        # alpha = sum p - relu(p - q); agreeing rows of the loss are averaged last
        short = (target_probs - logits.log_softmax(-1).exp()).relu().sum(-1)
        return (-torch.log(1 - short)).sum() / len(logits)

    assert exercises.check_lk_alpha(loss, lambda p: (p > 0).sum(-1) == 1).passed is True


def test_is_to_do_until_there_is_an_answer():
    assert exercises.check_lk_alpha(lambda z, p: None, lambda p: None) is exercises.TODO


def test_says_when_only_the_condition_is_missing():
    verdict = exercises.check_lk_alpha(lk_alpha, lambda p: None)
    assert verdict.passed is None
    assert "always_ce" in verdict.message


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z, p: (p * (p.log() - z.log_softmax(-1))).sum(-1).mean(), "this is KL(p || q)"),
        (lambda z, p: -(p * z.log_softmax(-1)).sum(-1).mean(), "-sum p log q"),
        (lambda z, p: 0.5 * (p - z.softmax(-1)).abs().sum(-1).mean(), "the TV loss"),
        (
            lambda z, p: torch.nn.functional.cross_entropy(z, p.argmax(-1)),
            "cross-entropy of the target's favourite",
        ),
        (lambda z, p: -overlap(z, p).mean(), "the log is missing"),
        (lambda z, p: overlap(z, p).mean(), "alpha itself"),
        (lambda z, p: overlap(z, p).log().mean(), "the sign is wrong"),
        (
            lambda z, p: -torch.maximum(p, z.softmax(-1)).sum(-1).log().mean(),
            "it sums max(p, q)",
        ),
        (
            lambda z, p: -torch.minimum(p, z.softmax(-1)).amax(-1).log().mean(),
            "it takes the largest min(p, q)",
        ),
        (
            lambda z, p: -torch.minimum(p, z.softmax(-1)).mean(-1).log().mean(),
            "averages min(p, q) over the vocabulary",
        ),
        (lambda z, p: -overlap(z, p).mean().log(), "after the mean over positions"),
        (lambda z, p: -overlap(z, p).log().sum(), "it sums over positions"),
        (lambda z, p: -overlap(z, p).log2().mean(), "base 2"),
        (
            lambda z, p: -torch.minimum(p, z.softmax(0)).sum(-1).log().mean(),
            "runs over positions",
        ),
        (
            lambda z, p: -torch.minimum(p, z.exp()).sum(-1).log().mean(),
            "not a distribution yet",
        ),
        (
            lambda z, p: -torch.minimum(p.softmax(-1), z.softmax(-1)).sum(-1).log().mean(),
            "they are probabilities already",
        ),
        (
            lambda z, p: (
                -torch.minimum(p.amax(-1), z.softmax(-1).gather(-1, p.argmax(-1, True))[:, 0])
                .log()
                .mean()
            ),
            "only the target's favourite is summed",
        ),
        (lambda z, p: -torch.minimum(p, z.softmax(-1)).log().sum(-1).mean(), "should be"),
        (lambda z, p: -overlap(z, p).log(), "return one number"),
        (lambda z, p: lk_alpha(z, p).item(), "return a tensor"),
        (lambda z, p: lk_alpha(z.detach(), p), "no gradient reaches the logits"),
        (
            lambda z, p: lk_alpha(z, p).detach() + 0 * z.sum(),
            "its gradient is not",
        ),
        (lambda z, p: z @ p, "RuntimeError"),
    ],
)
def test_says_what_is_wrong_with_the_loss(loss, message):
    verdict = exercises.check_lk_alpha(loss, point_mass)
    assert verdict.passed is False
    assert message in verdict.message


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (lambda p: p.amax(-1) > 0.9, "(0.99, 0.01, 0.0) it is not always"),
        (lambda p: p.amax(-1) >= 0.5, "not always"),
        (lambda p: torch.zeros(len(p), dtype=torch.bool), "(0.0, 1.0, 0.0) it is the cross"),
        (lambda p: p[:, 0] == 1, "(0.0, 1.0, 0.0) it is the cross"),
        (lambda p: p == 1, "a bool a row"),
        (lambda p: p.amax(-1), "a bool a row"),
        (lambda p: p.nothing, "always_ce: AttributeError"),
    ],
)
def test_says_what_is_wrong_with_the_condition(condition, message):
    verdict = exercises.check_lk_alpha(lk_alpha, condition)
    assert verdict.passed is False
    assert message in verdict.message


def test_complaints_are_told_apart():
    """No two named mistakes, and not the right answer either, share a value on a general p."""
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    p = (2 * torch.randn(5, 6, generator=generator, dtype=torch.float64)).softmax(-1)
    values = [float(rule(z, p)) for rule in exercises._lk_mistakes().values()]
    values.append(float(lk_alpha(z, p)))
    assert len({round(value, 9) for value in values}) == len(values)
