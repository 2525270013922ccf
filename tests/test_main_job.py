"The main job as a user meets it: from the command line, with mistakes, killed and resumed."

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from msinet.cli import main
from msinet.errors import InputError
from msinet.engine.run import read_config, read_run
from msinet.engine.learner import Callback, Learner, lr_at
from msinet.figures.report import report
from msinet.config import SEARCH, SMOKE_SYNTH, SearchConfig
from msinet.training.search import search
from msinet.data.sets import get_data
from msinet.config import TRAIN, TrainConfig
from msinet.weights import open_net
from msinet.training.train import train

GOLDEN = Path(__file__).parent / "golden"
SMOKE = replace(SEARCH["smoke"], evaluate=False)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    "Rendered persons of these tests go to a folder of their own."
    before = os.environ.get("MSINET_CACHE")
    os.environ["MSINET_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    get_data(SMOKE_SYNTH, (64, 32))
    yield
    os.environ.pop("MSINET_CACHE") if before is None else os.environ.update(MSINET_CACHE=before)


@pytest.fixture(scope="module")
def images(make_identities, tmp_path_factory):
    "Six identities, four images each; another folder without any image."
    root = tmp_path_factory.mktemp("images")
    make_identities(root / "own")
    (root / "empty").mkdir()
    return root


MISTAKES = {
    "unknown data set": ("demo --preset smoke --data X={0}", "X", "M, MS, VR, VID, folder"),
    "missing folder": ("demo --preset smoke --data M={0}/nowhere", "nowhere", "expected"),
    "folder without images": ("demo --preset smoke --data folder={0}/empty", "empty", "expected"),
    "market folder without images": ("search --preset smoke --data M={0}/empty", "empty", "expected"),
    "genotype too short": ("train --preset smoke --genotype GGEGAGGNGAE", "11 letters", "expected 12"),
    "genotype with a wrong letter": ("train --preset smoke --genotype GGEGAGGNGAEX", "'X'", "N E G A"),
    "batch not divisible by K": ("demo --preset smoke --batch 9 --K 2", "9", "expected a multiple"),
    "fewer identities than P": ("search --preset smoke --batch 64 --K 2", "identities", "32"),
    "too few of one's own": ("demo --preset smoke --data folder={0}/own --batch 64 --K 4", "identities", "16"),
    "unknown preset": ("demo --preset huge", "huge", "smoke, laptop, full, paper, released"),
    "missing device": ("train --preset smoke --device tpu", "tpu", "cpu"),
    "leak without its order": ("search --preset smoke --leak", "leak", "alpha_first"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(name, images, one_line_mistake):
    words, found, expected = MISTAKES[name]
    one_line_mistake(words.format(images), found, expected)


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    p = subprocess.run(
        [Path(sys.executable).parent / "msinet", "demo", "--data", "X=1", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and p.stdout == ""


def test_a_run_is_not_written_over(tmp_path):
    search(replace(SMOKE, out=str(tmp_path / "run"), epochs=1))
    with pytest.raises(InputError, match="holds a run already"):
        search(replace(SMOKE, out=str(tmp_path / "run"), epochs=1))


def test_demo_from_own_pictures(images, tmp_path, capsys):
    "Folders of an identity each, no cameras: search, train, evaluate, report, from the shell's words."
    run = tmp_path / "run"
    own = f"folder={images}/own"
    main(f"demo --preset smoke --data {own} --batch 4 --K 2 --epochs-search 1 --epochs-train 1 --out {run}".split())
    said = capsys.readouterr().out
    r = read_run(run)
    assert r["genotype"]["genotype"] in said and "report.html" in said
    assert set(r["metrics"]) >= {"before", "after", "pixels"} and 0 <= r["metrics"]["after"]["mAP"] <= 1
    assert r["alphas"].shape == (1, 12, 4)
    assert (run / "report.html").read_text().count("<img") >= 7
    main(f"evaluate --run {run}".split())
    assert "mAP" in capsys.readouterr().out
    assert read_config(run, TrainConfig).data == own
    main(f"search --out {run} --resume".split())
    assert read_run(run)["metrics"] == r["metrics"], "a finished search that is resumed leaves the training's numbers"


class Stop(Callback):
    "A kill between two epochs, after the checkpoint."

    order = 200

    def __init__(self, at):
        self.at = at

    def after_epoch(self, learn):
        if learn.epoch == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["search", "train"])
def test_killed_and_resumed_is_the_same_run(kind, tmp_path, monkeypatch):
    cfg, go = (replace(SMOKE, epochs=4), search) if kind == "search" else (replace(TRAIN["smoke"], epochs=4), train)
    whole = go(replace(cfg, out=str(tmp_path / "whole")))
    plain = Learner.__init__
    with monkeypatch.context() as m:
        m.setattr(Learner, "__init__", lambda self, net, step, dl, cbs=(): plain(self, net, step, dl, [*cbs, Stop(2)]))
        with pytest.raises(KeyboardInterrupt):
            go(replace(cfg, out=str(tmp_path / "killed")))
    again = go(replace(cfg, out=str(tmp_path / "killed"), resume=True))
    losses = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    if kind == "search":
        assert np.array_equal(whole.alphas, again.alphas) and whole.genotype == again.genotype
        assert (tmp_path / "whole/genotype.json").read_bytes() == (tmp_path / "killed/genotype.json").read_bytes()
    else:
        assert whole.metrics == again.metrics
        assert all(torch.equal(a, b) for a, b in zip(whole.net.state_dict().values(), again.net.state_dict().values()))
    assert len((tmp_path / "killed/history.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("kept", ["on disk", "in memory"])
def test_the_cache_changes_nothing_but_time(kept, tmp_path):
    "Decoded once or whenever drawn: the same losses, weights and metrics, bit for bit."
    cfg = replace(TRAIN["smoke"], random_erasing=0.5, jitter=True)
    once = train(
        replace(cfg, out=str(tmp_path / "once"), cache_dir=str(tmp_path / "cache") if kept == "on disk" else "")
    )
    anew = train(replace(cfg, out=str(tmp_path / "anew"), cache=False))
    losses = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (once, anew)]
    assert losses[0] == losses[1] and once.metrics == anew.metrics
    assert all(torch.equal(a, b) for a, b in zip(once.net.state_dict().values(), anew.net.state_dict().values()))
    assert any((tmp_path / "cache").glob("*.npy")) == (kept == "on disk")


def test_resume_on_an_empty_folder_starts_anew(tmp_path):
    (tmp_path / "run").mkdir()
    found = search(replace(SMOKE, out=str(tmp_path / "run"), epochs=1, resume=True))
    assert found.alphas.shape == (1, 12, 4)


def test_reading_back(tmp_path):
    cfg = replace(TRAIN["smoke"], out=str(tmp_path / "run"), epochs=1)
    trained = train(cfg)
    assert read_config(tmp_path / "run", TrainConfig) == cfg
    assert read_config(tmp_path / "run", SearchConfig) is None
    net, about = open_net(tmp_path / "run")
    assert about["genotype"] == cfg.genotype
    x = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        assert torch.equal(net.embed(x), trained.net.embed(x))
    report(tmp_path / "run")
    # the same weights are a start for other identities: everything but the classifiers is taken in
    again = train(
        replace(cfg, out=str(tmp_path / "again"), weights=str(tmp_path / "run/model.safetensors"), lr=0.0, wd=0.0)
    )
    own, new = trained.net.state_dict(), again.net.state_dict()
    assert all(torch.equal(own[k], new[k]) for k in own if "running" not in k and "num_batches" not in k)
    with pytest.raises(InputError, match="does not fit"):
        train(
            replace(
                cfg, out=str(tmp_path / "other"), weights=str(tmp_path / "run/model.safetensors"), genotype="A" * 12
            )
        )


def test_rates_are_the_released_ones():
    h = json.loads((GOLDEN / "h_schedule_split.json").read_text())
    ours = [lr_at(e, 0.065) for e in range(350)]
    np.testing.assert_allclose(ours, h["weights_350"], rtol=1e-9)
    np.testing.assert_allclose([lr_at(e, 0.025) for e in range(350)], h["search_weights_350"], rtol=1e-9)
    np.testing.assert_allclose([lr_at(e, 0.065) for e in range(250)], h["cross_domain_250"], rtol=1e-9)
    released = SEARCH["released"]
    np.testing.assert_allclose(
        [lr_at(e, released.lr_alpha, 0, released.milestones_alpha) for e in range(350)], h["alpha_350"], rtol=1e-9
    )


@pytest.mark.parametrize("warmup,milestones", [(10, (150, 225, 300)), (3, (29, 40)), (0, (5,)), (4, ())])
def test_rates_are_those_of_the_schedulers_of_torch(warmup, milestones):
    "Ours is a function of the epoch: it needs no state to resume, and can be drawn."
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.065)
    climb = torch.optim.lr_scheduler.LinearLR(opt, 0.01 if warmup else 1.0, total_iters=max(1, warmup))
    fall = torch.optim.lr_scheduler.MultiStepLR(opt, milestones, 0.1)
    rates = []
    for _ in range(350):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        climb.step()
        fall.step()
    np.testing.assert_allclose([lr_at(e, 0.065, warmup, milestones) for e in range(350)], rates, rtol=1e-12)
