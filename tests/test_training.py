"""The trainer: it learns, resumes bit for bit after SIGKILL, and two processes equal one."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bdlib import models, teacher
from bdlib.budgets import BudgetSampler, fixed
from bdlib.objectives import Objective
from bdlib.selection import make_policy
from bdlib.training import Trainer, TrainSettings, window_loss, window_of
from bdlib.transformer import Decoder, DecoderConfig
from bdlib.views import View

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=256,
    rope={"rope_type": "default", "rope_theta": 10_000.0},
)
SETTINGS = TrainSettings(
    budgets=BudgetSampler({24: 0.5, 40: 0.5}),
    policies=("sink_window", "chunk_topk_recent"),
    views=2,
    block=12,
    steps=12,
    warmup=2,
    windows=2,
    lr=3e-3,
    autocast=False,
)


def prepare(folder: Path) -> tuple[Decoder, teacher.TeacherStore]:
    target = Decoder.random(CONFIG, seed=1)
    generator = torch.Generator().manual_seed(2)
    windows = torch.randint(0, 64, (6, 80), generator=generator)
    store = teacher.compute(target, windows, folder / "teacher", teacher.TeacherSettings(top=8))
    vocabulary = models.draft_vocabulary(windows, 64, 48)
    return models.cut_from(target, (0, 2), vocabulary), store


def weights(model: Decoder) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("mode", ["all", "continuation"])
@pytest.mark.parametrize("loss", ["ce", "lk_lambda"])
def test_the_loss_falls(tmp_path, mode, loss):
    model, store = prepare(tmp_path)
    settings = replace(SETTINGS, mode=mode, steps=60, objective=Objective(loss, loss))
    lines = []
    Trainer(model, [store], settings, tmp_path / "run").run(lines.append)
    first, last = (sum(line["loss"] for line in part) for part in (lines[:6], lines[-6:]))
    assert last < 0.9 * first
    assert len(lines) == 60
    written = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert written == lines
    assert {view["budget"] for line in lines for view in line["views"]} == {24, 40}
    assert torch.equal(model.embedding, Decoder.random(CONFIG, seed=1).embedding)


@pytest.mark.parametrize("mode", ["all", "continuation"])
def test_the_hinge_compares_the_same_positions(tmp_path, mode):
    """L_B of a view as large as the window is 0 where a view is that of the full cache."""
    model, store = prepare(tmp_path)
    settings = replace(SETTINGS, mode=mode, share=0.5, objective=Objective(weight=0.0, beta=1.0))
    read = (store.tokens(0), store.target(0), settings)
    for budget, same in ((200, True), (16, False)):
        views = [View(budget, make_policy("sink_window"))]
        loss, full, sparse = window_loss(model, *read, views, "s")
        kl = full.kl[sparse[0].positions - full.positions[0]]
        assert torch.allclose(kl, sparse[0].kl, atol=1e-5) is same
        assert torch.allclose(loss - full.loss, (kl - sparse[0].kl).relu().mean(), atol=1e-6)
        assert loss.requires_grad


def test_the_prefix_is_trained_in_all_mode_only(tmp_path):
    model, store = prepare(tmp_path)
    for mode, expected in (("all", True), ("continuation", False)):
        settings = replace(SETTINGS, mode=mode, objective=Objective(weight=1.0))
        tokens, target = store.tokens(0), store.target(0)
        position = tokens[3].item()  # a token of the prefix; does its embedding matter to the loss?
        embedding = model.embedding.detach().clone().requires_grad_(True)
        other = Decoder(model.config)
        other.load_state_dict({k: v for k, v in model.state_dict().items() if k != "head.weight"},
                              strict=False)  # fmt: skip
        other.head, other.vocabulary = model.head, model.vocabulary
        other.embedding = torch.nn.Parameter(embedding.detach())
        tokens = tokens.clone()
        tokens[tokens == position] = 0
        tokens[3] = position
        loss, _, _ = window_loss(other, tokens, target, settings, settings.draw(0), "s")
        loss.backward()
        assert bool(other.embedding.grad[position].abs().sum() > 0) is expected


def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    model, store = prepare(tmp_path)
    whole = Trainer(model, [store], SETTINGS, tmp_path / "whole")
    whole.run()
    again, _ = prepare(tmp_path)

    def stop(line):
        if line["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(again, [store], SETTINGS, tmp_path / "parts").run(stop)
    fresh, _ = prepare(tmp_path)
    resumed = Trainer(fresh, [store], SETTINGS, tmp_path / "parts")
    assert resumed.step == 5
    resumed.run()
    assert equal(weights(fresh), weights(model))
    strip = [
        [
            {k: v for k, v in json.loads(x).items() if k != "seconds"}
            for x in f.read_text().splitlines()
        ]
        for f in (tmp_path / "whole" / "log.jsonl", tmp_path / "parts" / "log.jsonl")
    ]
    assert strip[0] == strip[1]


CHILD = """
import sys; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from pathlib import Path
from dataclasses import replace
import test_training as t
from bdlib.training import Trainer
folder = Path({folder!r})
model, store = t.prepare(folder)
Trainer(model, [store], replace(t.SETTINGS, steps=400), folder / 'run', minutes=0.0).run()
torch.save(t.weights(model), folder / 'weights.pt')
"""


def start(folder: Path) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_bit_for_bit(tmp_path):
    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=300) == 0
    kills, log = 0, tmp_path / "killed" / "run" / "log.jsonl"
    for steps in (30, 90, 200):
        child = start(tmp_path / "killed")
        while child.poll() is None and (
            not log.exists() or len(log.read_bytes().splitlines()) < steps
        ):
            time.sleep(0.01)
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.wait()
    assert kills == 3
    assert start(tmp_path / "killed").wait(timeout=300) == 0
    found, expected = (torch.load(tmp_path / d / "weights.pt") for d in ("killed", "whole"))
    assert equal(found, expected)
    assert len(log.read_text().splitlines()) == 400


def _process(rank: int, folder: str, port: int, results) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model, store = prepare(Path(folder) / f"rank{rank}")
    trainer = Trainer(model, [store], SETTINGS, Path(folder) / "run", accelerator=accelerator)
    trainer.train_step()
    torch.save(weights(model), Path(folder) / f"weights{rank}.pt")
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_make_the_update_of_one(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    children = [
        context.Process(target=_process, args=(rank, str(tmp_path), port, None)) for rank in (0, 1)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
        assert child.exitcode == 0
    model, store = prepare(tmp_path)
    Trainer(model, [store], SETTINGS, tmp_path / "one").train_step()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"weights{rank}.pt")
        for name, expected in weights(model).items():
            assert torch.allclose(found[name], expected, atol=1e-6), name


def test_every_window_is_seen_once_an_epoch():
    epochs = [[window_of(3, e * 10 + i, 10) for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_rate_rises_and_falls():
    settings = TrainSettings(steps=100, warmup=10, lr=1.0)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0) == rates[9]
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 0.001


def test_a_drafter_is_saved_and_loaded(tmp_path):
    model, _ = prepare(tmp_path)
    target = Decoder.random(CONFIG, seed=1)
    models.save_drafter(model, tmp_path / "d", "# card\n", {"steps": 3})
    again = models.load_drafter(tmp_path / "d", target)
    assert torch.equal(again.vocabulary, model.vocabulary)
    tokens = torch.arange(20)[None]
    assert torch.allclose(again(tokens), model(tokens), atol=0.1)
    assert not any("embedding" in name for name in models._own_weights(model))
    (tmp_path / "d" / "drafter.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="damaged"):
        models.load_drafter(tmp_path / "d", target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "some"}, "some"),
        ({"steps": 0}, "steps 0"),
        ({"lr": 0.0}, "lr 0.0"),
        ({"share": 1.5}, "share 1.5"),
        ({"policies": ("best",)}, "best"),
        ({"budgets": fixed(8)}, "budget 8 must be above the block"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_a_run_with_other_settings_is_refused(tmp_path):
    model, store = prepare(tmp_path)
    trainer = Trainer(model, [store], SETTINGS, tmp_path / "run")
    trainer.train_step()
    trainer.save()
    with pytest.raises(ValueError, match="other settings"):
        Trainer(model, [store], replace(SETTINGS, lr=1e-4), tmp_path / "run")
    (tmp_path / "run" / "training.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"training\.pt is damaged"):
        Trainer(model, [store], SETTINGS, tmp_path / "run")


def test_reading_ahead_changes_nothing(tmp_path):
    model, store = prepare(tmp_path)
    Trainer(model, [store], SETTINGS, tmp_path / "plain").run()
    again, _ = prepare(tmp_path)
    ahead = Trainer(again, [store], SETTINGS, tmp_path / "ahead")
    assert ahead.read_ahead is False  # beside a GPU alone
    ahead.read_ahead = True
    taken = []
    load = ahead._load
    ahead._load = lambda index: taken.append(index) or load(index)
    ahead.run()
    assert equal(weights(again), weights(model))
    assert taken == list(range(SETTINGS.steps * SETTINGS.windows + 1))
