"""Objectives: numbers worked out by hand, finite differences, and the identities of the method."""

import math

import pytest
import torch

from bdlib import objectives
from bdlib.objectives import (
    LOSSES,
    Branch,
    Objective,
    TeacherTarget,
    branch,
    branches,
    expected_tokens,
    hinge,
)

P = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
Q = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
IDS = torch.tensor([[0, 1, 2]])
ALPHA = 0.2 + 0.3 + 0.2  # min of each pair
KL = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.5) + 0.2 * math.log(0.2 / 0.3)
WEIGHT = math.exp(-3 * ALPHA)
BY_HAND = {
    "ce": -math.log(0.2),
    "kl": KL,
    "tv": 1 - ALPHA,
    "lk_alpha": -math.log(ALPHA),
    "lk_lambda": WEIGHT * KL + (1 - WEIGHT) * (1 - ALPHA),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_values_by_hand(loss):
    result = branch(Q.log(), TeacherTarget(IDS, P), loss)
    assert float(result.loss) == pytest.approx(BY_HAND[loss], abs=1e-12)
    assert result.alpha == pytest.approx(ALPHA)
    assert result.agreement == 0.0  # the drafter prefers token 1, the target token 0


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "lk_lambda"])
def test_gradients_match_finite_differences(loss):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 11, generator=generator, dtype=torch.float64)
    probs, ids = torch.softmax(teacher, -1).topk(6, -1)
    target = TeacherTarget(ids, probs)
    assert torch.autograd.gradcheck(lambda z: branch(z, target, loss).loss, logits)


@pytest.mark.parametrize("piece", [1, 30, 1 << 18])  # one row at a time, a few, all
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probabilities_in_pieces_are_those_of_log_softmax(dtype, piece, monkeypatch):
    monkeypatch.setattr(objectives, "PIECE", piece)
    generator = torch.Generator().manual_seed(4)
    logits = (4 * torch.randn(7, 13, generator=generator)).to(dtype).requires_grad_()
    index = torch.stack([torch.randperm(13, generator=generator)[:5] for _ in range(7)])
    weight = torch.randn(7, 5, generator=generator)
    found, favourite = objectives.ChosenLogProbs.apply(logits, index)
    (gradient,) = torch.autograd.grad((found * weight).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    expected = torch.log_softmax(exact, -1)
    (wanted,) = torch.autograd.grad((expected.gather(-1, index) * weight).sum(), exact)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert torch.allclose(found.double(), expected.gather(-1, index), atol=1e-5)
    assert torch.allclose(gradient.double(), wanted, atol=2 * torch.finfo(dtype).eps * 3)
    assert torch.equal(favourite, exact.argmax(-1))


@pytest.mark.parametrize("loss", LOSSES)
def test_views_at_once_are_views_one_by_one(loss):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(9, 11, generator=generator, dtype=torch.float64)
    teacher = TeacherTarget.from_logits(torch.randn(9, 20, generator=generator), 6)
    rows = torch.where(torch.arange(20) % 2 == 0, torch.arange(20) // 2, -1)  # ten of twenty tokens
    cuts = [slice(0, 4), slice(4, 5), slice(5, 9)]
    parts = [TeacherTarget(teacher.ids[cut], teacher.probs[cut]) for cut in cuts]
    together = branches(logits, parts, loss, rows)
    for found, part, cut in zip(together, parts, cuts, strict=True):
        alone = branch(logits[cut], part, loss, rows)
        assert torch.allclose(found.loss, alone.loss, atol=1e-12)
        assert torch.allclose(found.kl, alone.kl, atol=1e-12)
        assert (found.alpha, found.agreement) == pytest.approx((alone.alpha, alone.agreement))


def test_the_hybrids_weight_carries_no_gradient():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    target = TeacherTarget.from_logits(torch.randn(4, 9, generator=generator, dtype=torch.float64))
    target = TeacherTarget(target.ids, target.probs.double())
    rows = [branch(logits[i : i + 1], TeacherTarget(target.ids[i : i + 1], target.probs[i : i + 1]),
                   name) for i in range(4) for name in ("kl", "tv", "lk_lambda")]  # fmt: skip
    for kl, tv, hybrid in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        weight = math.exp(-3 * hybrid.alpha)
        expected = torch.autograd.grad(weight * kl.loss + (1 - weight) * tv.loss, logits,
                                       retain_graph=True)[0]  # fmt: skip
        found = torch.autograd.grad(hybrid.loss, logits, retain_graph=True)[0]
        assert torch.allclose(found, expected, atol=1e-12)


def test_lk_alpha_is_cross_entropy_at_a_point_mass():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 13, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 13, (7, 1), generator=generator)
    target = TeacherTarget(ids, torch.ones(7, 1, dtype=torch.float64))
    losses = [branch(logits, target, name).loss for name in ("lk_alpha", "ce")]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-12)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    assert torch.allclose(*gradients, atol=1e-12)


def test_a_perfect_drafter_is_always_accepted():
    target = TeacherTarget(IDS, P)
    for loss in ("kl", "tv", "lk_alpha", "lk_lambda"):
        result = branch(P.log(), target, loss)
        assert float(result.loss) == pytest.approx(0.0, abs=1e-12)
    assert (result.alpha, result.agreement) == (pytest.approx(1.0), 1.0)


def test_the_teachers_tail_bounds_alpha():
    generator = torch.Generator().manual_seed(4)
    teacher, drafter = torch.randn(2, 20, 50, generator=generator, dtype=torch.float64)
    exact = branch(drafter, TeacherTarget.from_logits(teacher), "tv").alpha
    cut = TeacherTarget.from_logits(teacher, 10)
    lower = branch(drafter, cut, "tv").alpha
    assert lower < exact <= lower + float((1 - cut.probs.sum(-1)).mean()) + 1e-6


def test_a_draft_vocabulary_has_no_mass_outside():
    # The drafter scores tokens 1 and 2 only: token 0, the target's favourite, is out of reach.
    rows = torch.tensor([-1, 0, 1])
    logits = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    result = branch(logits, TeacherTarget(IDS, P), "tv", rows)
    assert result.alpha == pytest.approx(0.3 + 0.2)
    assert result.agreement == 0.0
    cross_entropy = branch(logits, TeacherTarget(IDS, P), "ce", rows)
    assert float(cross_entropy.loss) == 0.0  # nothing to learn here, and no infinity either
    kl = branch(logits, TeacherTarget(IDS, P), "kl", rows)
    by_hand = 0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5)
    assert float(kl.loss) == pytest.approx(by_hand)


def test_the_objective_adds_up():
    def made(loss: float, kl: list[float]) -> Branch:
        return Branch(torch.tensor(loss), 0.0, 0.0, torch.tensor(kl))

    full, views = made(1.0, [3.0, 1.0]), [made(2.0, [1.0, 2.0]), made(4.0, [5.0, 5.0])]
    assert float(Objective().total(full, views)) == pytest.approx(1.0 + 0.5 * 3.0)
    assert float(Objective(weight=0.0).total(full, views)) == pytest.approx(1.0)
    assert float(hinge(full, views[0])) == pytest.approx(1.0)  # mean of relu(2) and relu(-1)
    assert float(Objective(beta=0.2).total(full, views)) == pytest.approx(2.5 + 0.2 * 0.5)


def test_expected_tokens_by_hand():
    assert expected_tokens(0.5, 2) == pytest.approx(1 + 0.5 + 0.25)
    assert (expected_tokens(0.0, 7), expected_tokens(1.0, 7)) == (1.0, 8.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(full="mse"), "mse"),
        (lambda: Objective(weight=-1.0), "weight -1.0"),
        (lambda: branch(Q.log(), TeacherTarget(IDS, P), "mse"), "mse"),
        (lambda: branch(torch.zeros(2, 3), TeacherTarget(IDS, P)), "2 positions"),
        (lambda: expected_tokens(1.2, 3), "1.2"),
        (lambda: expected_tokens(0.2, -1), "-1"),
    ],
)
def test_refusals_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
