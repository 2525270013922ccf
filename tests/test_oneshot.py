"A one-shot supernet: one random genotype a step, to the same last bit after a break, and measured as it was chosen."

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from msinet.config import SEARCH, TABLE1
from msinet.core import set_seed
from msinet.data.sets import get_data
from msinet.engine.learner import Callback, adamw, trainable_params
from msinet.engine.lock import Stopped
from msinet.engine.loop import RunContext
from msinet.errors import InputError
from msinet.ops import OPS
from msinet.paper.probes import batches_per_epoch, evaluate_genotype, held_out, open_supernet, search_passes
from msinet.retrieval.evaluate import retrieval_metrics
from msinet.space import check_genotype, genotype, set_path, subnet_state_dict, supernet
from msinet.training.oneshot import PathSampler, PathStep, random_genotypes, retrieval_of, stats_batches
from msinet.training.oneshot import supernet_with_neck, with_genotype
from msinet.training.search import build_oneshot, search

WIDTHS = (8, 16, 24, 32)
SMOKE = replace(SEARCH["smoke"], sampling="uniform", evaluate=False)


def make_step(seed=0):
    set_seed(0)
    net = supernet_with_neck(WIDTHS, n_ids=4).train()
    weights = [p for n, p in net.named_parameters() if not n.endswith("alpha") and p.requires_grad]
    return PathStep(net, adamw(weights, 1e-2, 5e-2), PathSampler(seed))


def batch():
    return torch.randn(8, 3, 32, 16), torch.arange(4).repeat_interleave(2)


# paths


def test_a_path_computes_its_interactions_alone():
    set_seed(0)
    net = supernet(WIDTHS).eval()
    x, ran = torch.randn(2, 3, 32, 16), []
    for name, m in net.named_modules():
        if type(m) in OPS.values():
            m.register_forward_hook(lambda m, *_, name=name: ran.append(name[-1]))
    with torch.no_grad():
        set_path(net, TABLE1)
        alone = net(x)[-1]
        assert "".join(ran) == TABLE1
        with with_genotype(net, TABLE1):
            set_path(net)  # all are computed, the others' share is 0
            assert torch.allclose(net(x)[-1], alone, atol=1e-5)
            assert genotype(net) == TABLE1
        assert torch.equal(net(x)[-1], alone)  # the path is back
    with pytest.raises(InputError, match="expected 12"):
        set_path(net, "GGE")


def test_paths_have_uniform_letters_and_go_on_where_they_were():
    a, b = PathSampler(3), PathSampler(3)
    drawn = [next(a) for _ in range(2000)]
    assert all(check_genotype(g) == g for g in drawn) and len({*drawn}) == 2000
    for slot in range(12):
        n = Counter(g[slot] for g in drawn)
        assert all(abs(n[k] - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for k in OPS)
    b.load_state_dict(dict(drawn=1500))
    assert b.path == drawn[1499] and list(islice(iter(b.__next__, None), 500)) == drawn[1500:]
    assert PathSampler(3).path == "" and next(PathSampler(4)) != drawn[0]


def test_a_step_moves_the_weights_of_its_path_alone():
    step = make_step()
    before = {k: v.clone() for k, v in step.net.state_dict().items()}
    out = step(batch())
    path, after = step.paths.path, step.net.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    on = {f"{k}" for k in step.net.state_dict() if ".ops." not in k}
    slots = [f"stages.{i}.cell{j}.im{k}" for i in range(3) for j in (1, 2) for k in (1, 2)]
    on |= {k for k in before for s, o in zip(slots, path) if f"{s}.ops.{o}." in k}
    assert moved <= on and not any(k.endswith("alpha") for k in moved)
    assert any(f".ops.{path[0]}" in k for k in moved) or path[0] in "NE"
    assert set(out) == {"loss", "id", "triplet", "acc"} and out["loss"] == pytest.approx(out["id"] + out["triplet"])


def test_a_step_is_that_of_the_derived_network():
    "Same loss and same gradients as a network that has the path's interactions and nothing else."
    from msinet.engine.learner import sgd
    from msinet.necks import FBLNeck, ReIDNet
    from msinet.space import derived
    from msinet.training.train import TrainStep

    step, x = make_step(), batch()
    path = next(PathSampler(0))
    small = ReIDNet(derived(path, WIDTHS), FBLNeck(WIDTHS[1:], 4)).train()
    small.backbone.load_state_dict(subnet_state_dict(step.net.backbone, path))
    small.neck.load_state_dict(step.net.neck.state_dict())
    alone = TrainStep(small, sgd([p for p in small.parameters() if p.requires_grad], 0.1, 0.0))
    a, b = step(x), alone(x)
    assert all(torch.equal(a[k], b[k]) for k in a)
    norm = lambda s: sum(p.grad.double().square().sum() for p in trainable_params(s.opt) if p.grad is not None)
    assert norm(step) == pytest.approx(norm(alone).item(), rel=1e-6)


# runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return search(replace(SMOKE, epochs=3, out=str(tmp_path_factory.mktemp("whole") / "run")))


def same(a, b):
    ws = zip(a.net.state_dict().items(), b.net.state_dict().items(), strict=True)
    assert all(k == l and torch.equal(v, w) for (k, v), (l, w) in ws)
    assert a.candidates == b.candidates and a.genotype == b.genotype
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in a.history] == [
        {k: v for k, v in r.items() if k != "seconds"} for r in b.history
    ]


def test_a_longer_run_goes_on_bit_for_bit(whole, tmp_path):
    cfg = replace(SMOKE, out=str(tmp_path / "run"))
    search(replace(cfg, epochs=1))
    same(whole, search(replace(cfg, epochs=3, resume=True)))


@pytest.mark.parametrize("at", [1, 3, 4, 5, 9])
def test_ctrl_c_at_any_step_and_the_same_last_bit(at, whole, tmp_path):
    class Interrupt(Callback):
        n = 0

        def after_batch(self, learn):
            self.n += 1
            if self.n == at:
                os.kill(os.getpid(), signal.SIGINT)

    cfg = replace(SMOKE, epochs=3, out=str(tmp_path / "run"))
    with pytest.raises(Stopped):
        search(cfg, cbs=[Interrupt()])
    same(whole, search(replace(cfg, resume=True)))


def test_what_a_run_leaves(whole):
    names = {p.name for p in whole.run.iterdir()}
    assert {"config.json", "history.jsonl", "genotype.json", "metrics.json", "search.safetensors"} <= names
    assert "alphas.npy" not in names and whole.alphas.shape == whole.steps.shape == (0, 12, 4)
    assert json.loads((whole.run / "config.json").read_text())["search"]["sampling"] == "uniform"
    written = json.loads((whole.run / "genotype.json").read_text())
    assert written["genotype"] == whole.genotype == whole.candidates[0]["genotype"]
    assert [r["genotype"] for r in whole.candidates] != random_genotypes(4, SMOKE.seed) or len({*written}) == 2
    assert {r["genotype"] for r in whole.candidates} == {*random_genotypes(4, SMOKE.seed)}
    assert all({"alpha_same", "spread"} <= set(r) and r["alpha_same"] == 0 for r in whole.history)


def test_what_is_said_of_a_run(whole):
    from msinet.figures.report import report
    from msinet.quickstart import found_line

    line, n = found_line(whole), len(whole.candidates)
    assert whole.genotype in line and f"the last of {n} candidates {100 * whole.candidates[-1]['mAP']:.1f}" in line
    page = report(whole.run).read_text(encoding="utf-8")
    assert all(t in page for t in ("Genotypes in the supernet", "Losses of the search", "The best candidate."))


def test_the_weights_in_the_folder_measure_as_they_did(whole):
    net = open_supernet(whole.run)
    assert genotype(net) == whole.genotype and net.neck.classifier.out_features == 6
    data = get_data(SMOKE.data, SMOKE.size)
    inner = held_out(data, SMOKE.val_share, SMOKE.seed)
    assert not {i.pid for i in inner.train} & {i.pid for i in inner.query}
    batches = stats_batches(inner.train, SMOKE.batches, seed=SMOKE.seed)
    ranking = retrieval_of(inner, SMOKE.size)
    for r in whole.candidates[:2]:
        m = evaluate_genotype(net, r["genotype"], lambda n: retrieval_metrics(ranking(n)), batches)
        assert m["mAP"] == pytest.approx(r["mAP"], abs=1e-9)
    assert search_passes(replace(SMOKE, epochs=3), data) == 3 * batches_per_epoch(inner.train, SMOKE)


def test_batches_for_statistics_are_those_of_a_training():
    items = get_data("synth:n_ids=12,n_test=4", SMOKE.size).train
    batches = replace(SMOKE, batch=16, K=4).batches
    for n, of in ((2, items), (10, items), (10, items[:60])):
        got = stats_batches(of, batches, n, seed=3)
        again = stats_batches(of, batches, n, seed=3)
        assert 1 <= len(got) <= n and all(x.shape == (16, 3, 64, 32) and len({*y.tolist()}) == 4 for x, y in got)
        assert all(torch.equal(x, z) for (x, _), (z, _) in zip(got, again, strict=True))
    assert len(stats_batches(items, batches, 2)) == 2
    with pytest.raises(InputError, match="expected at least as many"):
        stats_batches([i for i in items if i.pid in sorted({i.pid for i in items})[:3]], batches)


def test_alpha_is_not_trained(tmp_path):
    with RunContext(replace(SMOKE, device="cpu", out=str(tmp_path / "run")), "search") as run:
        run.load()
        step, loader, inner = build_oneshot(run)
    assert not any(n.endswith("alpha") for n, p in step.net.named_parameters() if p.requires_grad)
    assert loader.n_ids == 6 and len({i.pid for i in inner.query}) == 2


@pytest.mark.parametrize(
    "wrong",
    [dict(cost=1.0), dict(unrolled=True), dict(leak=True, alpha_first=True), dict(objective="ce"), dict(candidates=0)]
    + [dict(val_share=0.0), dict(val_share=1.0), dict(compile=True), dict(fuse="concat"), dict(batch=64)],
    ids=str,
)
def test_settings_that_do_not_fit_write_nothing(wrong, tmp_path):
    with pytest.raises(InputError, match="expected") as e:
        search(replace(SMOKE, out=str(tmp_path / "run"), **wrong))
    assert "\n" not in str(e.value) and list(tmp_path.iterdir()) == []


def test_a_run_is_not_resumed_with_another_sampling(whole, tmp_path):
    with pytest.raises(InputError, match="sampling is mixture"):
        search(replace(SMOKE, sampling="mixture", epochs=3, out=str(whole.run), resume=True))
