"Unsupervised and domain-adaptive runs: resumed bit for bit, through every fault, from the command line."

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score

import msinet.unsup.train as unsup
from msinet.data.loaders import PKSampler
from msinet.unsup.clusters import Clusters, dbscan, find_clusters, fits, outliers_as_classes, pseudo_labels, purity
from msinet.unsup.clusters import rand_index, reliable
from msinet.unsup.memories import ClusterMemory, InstanceMemory
from msinet.config import SMOKE_SYNTH, UNSUP
from msinet.data.sets import get_data
from msinet.errors import InputError
from msinet.unsup.domains import DomainBN
from msinet.unsup.samplers import ClusterSampler, camera_draw, group_draw, pk_draw
from msinet.engine.learner import Callback
from msinet.losses import unit
from msinet.retrieval.rerank import jaccard, jaccard_sparse
from msinet.weights import open_net
from msinet.unsup.train import METHODS, Recluster, resolve_defaults, uda, usl

SMOKE = replace(UNSUP["smoke"], iters=2, watch=20)
METHOD_KINDS = [("cc", "usl"), ("gs", "usl"), ("hdcrl", "usl"), ("spcl", "uda"), ("idm", "uda")]
assert {m for m, _ in METHOD_KINDS} == set(METHODS)


@pytest.fixture(scope="module")
def sets():
    return [get_data(SMOKE_SYNTH.replace("synth:", f"synth:domain={d},"), (64, 32)) for d in "AB"]


def go(kind, cfg, sets, cbs=()):
    a, b = sets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return usl(cfg, b, cbs=cbs) if kind == "usl" else uda(cfg, b, a, cbs=cbs)


class Stop(Callback):
    "Ends a run after so many epochs, as a power cut would."

    order = 200

    def __init__(self, n):
        self.n = n

    def after_epoch(self, learn):
        if learn.epoch == self.n:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method,kind", METHOD_KINDS)
def test_resume_is_bit_exact(method, kind, sets, tmp_path):
    "Network, memories, teacher, bridge, labels: all as if nothing had happened."
    cfg = replace(SMOKE, method=method, epochs=3)
    whole = go(kind, replace(cfg, out=str(tmp_path / "whole")), sets)
    cut = replace(cfg, out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        go(kind, cut, sets, [Stop(1)])
    again = go(kind, replace(cut, resume=True), sets)
    for k, v in whole.net.state_dict().items():
        assert torch.equal(v, again.net.state_dict()[k]), k
    drop = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert drop(whole.history) == drop(again.history)
    for name in ("pseudo.npy", "watched.npy"):
        np.testing.assert_array_equal(np.load(whole.run / name), np.load(again.run / name))
    for run in (whole.run, again.run):
        state = torch.load(run / f"{kind}.pt", weights_only=True)["parts"]
        assert {"net", "memory", "opt"} <= set(state["step"]) and len(state["Recluster"]["rows"]) == 3
    one, two = (torch.load(r / f"{kind}.pt", weights_only=True)["parts"]["step"] for r in (whole.run, again.run))
    assert torch.equal(one["memory"]["c"], two["memory"]["c"]) and torch.equal(one["memory"]["y"], two["memory"]["y"])
    assert set(one.get("extra", {})) == set(two.get("extra", {}))
    for k in one.get("extra", {}):
        assert torch.equal(one["extra"][k], two["extra"][k]), k


def test_a_run_folder_is_complete(sets, tmp_path):
    done = go("uda", replace(SMOKE, method="idm", out=str(tmp_path / "run"), eval_every=1), sets)
    files = {p.name for p in done.run.iterdir()}
    assert {
        "config.json",
        "environment.json",
        "history.jsonl",
        "metrics.json",
        "model.safetensors",
        "pseudo.npy",
        "watched.npy",
        "uda.pt",
    } <= files
    m = json.loads((done.run / "metrics.json").read_text())
    assert {"before", "after", "best", "pixels"} <= set(m) and all(0 <= m[k][n] <= 1 for k in m for n in ("mAP", "R1"))
    assert m["best"]["mAP"] >= max(r["mAP"] for r in done.history) - 1e-9
    rows = [json.loads(line) for line in (done.run / "history.jsonl").read_text().splitlines()]
    assert all({"clusters", "outliers", "ari", "purity", "eps", "pred", "feat", "div"} <= set(r) for r in rows)
    net, about = open_net(done.run)
    assert about["after_bn"] and net.after_bn and not any(isinstance(k, DomainBN) for k in net.modules())
    assert net.embed(torch.randn(2, 3, 64, 32)).shape == (2, 64 + 32)


FAULTS = {
    "no cluster": lambda f: torch.full((len(f),), -1),
    "one giant cluster": lambda f: torch.zeros(len(f), dtype=torch.long),
    "clusters smaller than K": lambda f: torch.arange(len(f)) // 3,
}


@pytest.mark.parametrize("method,kind", [("cc", "usl"), ("gs", "usl"), ("idm", "uda")])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_the_clustering_ends_a_run(fault, method, kind, sets, tmp_path, monkeypatch):
    monkeypatch.setattr("msinet.unsup.clusters.dbscan", None)
    monkeypatch.setattr("msinet.unsup.clusters.pseudo_labels", lambda f, *a, **k: FAULTS[fault](f))
    done = go(kind, replace(SMOKE, method=method, K=4, batch=8, out=str(tmp_path / "run")), sets)
    assert len(done.history) == 2 and all(
        np.isfinite(v) for r in done.history for v in r.values() if isinstance(v, float)
    )
    notes = [r.get("note", "") for r in done.history]
    if fault == "no cluster":
        assert notes == ["few clusters: each alone", "few clusters: kept"]
    if fault == "one giant cluster":
        assert notes == ["giant cluster: each alone", "giant cluster: kept"]
    if fault == "clusters smaller than K":
        assert notes == ["", ""]


class Poison(Callback):
    "From an epoch on, the network gives NaN for a while."

    order = -60

    def __init__(self, at, whole=True):
        self.at, self.whole = at, whole

    def before_epoch(self, learn):
        if learn.epoch != self.at:
            return
        net = learn.step.net
        bn = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)][-1]
        bn.running_mean.fill_(torch.nan)


@pytest.mark.parametrize("method,kind", [("gs", "usl"), ("cc", "usl"), ("idm", "uda")])
def test_a_network_that_gives_nan_goes_back(method, kind, sets, tmp_path):
    "Statistics are NaN before epoch 2: weights of the last good clustering return, labels stay, the run ends well."
    poison = Poison(1)
    if kind == "uda":
        poison.before_epoch = lambda learn: (
            learn.epoch == 1
            and [
                m.running_mean.fill_(torch.nan) for m in learn.step.net.modules() if isinstance(m, torch.nn.BatchNorm1d)
            ]
        )
    done = go(kind, replace(SMOKE, method=method, epochs=3, out=str(tmp_path / "run")), sets, [poison])
    assert [r.get("note", "") for r in done.history] == ["", "not finite: kept", ""]
    assert all(v.isfinite().all() for v in done.net.state_dict().values())
    y = np.load(done.run / "pseudo.npy")
    np.testing.assert_array_equal(y[0], y[1])


def test_steps_that_are_not_finite_are_skipped_and_told(sets, tmp_path, monkeypatch):
    first, calls = unsup.embedding, [0]

    def sometimes(net, x):
        calls[0] += 1
        return first(net, x) * (torch.nan if 3 <= calls[0] <= 4 else 1.0)

    monkeypatch.setattr(unsup, "embedding", sometimes)
    done = go("usl", replace(SMOKE, method="gs", epochs=3, out=str(tmp_path / "run")), sets)
    assert [r["skipped"] for r in done.history] == [0, 1, 0] and "100% of the steps skipped" in done.history[1]["note"]
    assert all(v.isfinite().all() for v in done.net.state_dict().values())


def test_nan_from_the_start_is_a_mistake(sets, tmp_path):
    with pytest.raises(InputError, match="no finite features"):
        go("usl", replace(SMOKE, out=str(tmp_path / "run")), sets, [Poison(0)])


def test_labels_are_those_of_dense_distances():
    g = torch.Generator().manual_seed(0)
    f = unit(torch.randn(12, 16, generator=g).repeat_interleave(8, 0) + 0.25 * torch.randn(96, 16, generator=g))
    for eps in (0.3, 0.5, 0.7):
        want = DBSCAN(eps=eps, min_samples=4, metric="precomputed").fit_predict(
            jaccard(f, 10, 4).double().numpy().clip(0)
        )
        got = pseudo_labels(f, eps, 10, 4)
        assert adjusted_rand_score(want, got) == 1 and ((want < 0) == (got < 0).numpy()).all()
        assert torch.equal(dbscan(jaccard_sparse(f, 10, 4, 0.8), eps), got)  # a wider graph changes nothing


def test_measures_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(50):
        y, t = rng.integers(-1, 4, 25), rng.integers(0, 5, 25)
        own = outliers_as_classes(torch.from_numpy(y))
        assert rand_index(torch.from_numpy(y), torch.from_numpy(t)) == pytest.approx(adjusted_rand_score(t, own))
        majority = sum(np.bincount(t[y == k]).max() for k in set(y) - {-1})
        assert purity(torch.from_numpy(y), torch.from_numpy(t)) == pytest.approx(majority / (y >= 0).sum())
    assert (
        fits(torch.tensor([-1, -1])) == 1
        and fits(torch.tensor([0, 0, 0, 1])) == -1
        and fits(torch.tensor([0, 0, 1, 1])) == 0
    )


def test_reliable_keeps_its_limit():
    y = torch.arange(40) // 4
    loose = y.clone()
    loose[:8] = 0  # clusters 0 and 1 merge
    first, limit = reliable(y, loose, y)
    assert limit == 0.5 and (first >= 0).all()  # nine of ten clusters must pass, so the two that merge set the limit
    assert (reliable(y, loose, y, 0.6)[0][:8] == -1).all()
    found = find_clusters(
        unit(torch.randn(6, 8).repeat_interleave(6, 0) + 0.1 * torch.randn(36, 8)), 0.4, 5, 2, margin=0.02
    )
    assert isinstance(found, Clusters) and found.limit is not None


@pytest.mark.parametrize("draw", [pk_draw, camera_draw, group_draw])
def test_batches_hold_clustered_images_only(draw):
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(60) < 0.3, -1, rng.integers(0, 9, 60))
    s = ClusterSampler(60, draw, 4, 4, iters=9, cams=list(rng.integers(0, 3, 60)))
    s.labels = labels
    batches = list(s)
    assert len(batches) == 9 and all(len(b) == 16 and (labels[b] >= 0).all() for b in batches)
    assert batches == list(s) and {i for b in batches for i in b} <= set(range(60))
    if draw is pk_draw:
        assert all(len(set(labels[b])) == 4 for b in batches)
        s.labels = np.repeat(np.arange(6), 10)
        assert len(next(iter(s))) == len(next(iter(PKSampler(s.labels, 4, 4))))


def test_memories_ignore_outliers():
    f = torch.randn(6, 4)
    m, small = InstanceMemory(), InstanceMemory()
    m.rebuild(f, torch.tensor([0, -1, 1, -1, 0, 1]))
    small.rebuild(f[[0, 2, 4, 5]], torch.tensor([0, 1, 0, 1]))
    q = torch.randn(2, 4)
    torch.testing.assert_close(m.loss(q, torch.tensor([0, 5])), small.loss(q, torch.tensor([0, 3])))
    c = ClusterMemory()
    c.rebuild(f, torch.tensor([0, -1, 1, -1, 0, 1]))
    assert c.rows.c.shape == (2, 4)


MISTAKES = {
    "a method of the other regime": ("usl --preset smoke --method idm", "'idm'", "cc, spcl, gs, hdcrl"),
    "adaptation without a source": ("uda --preset smoke --method idm --data M=here", "source", "identities"),
    "eps that is no distance": ("usl --preset smoke --eps 1.5", "1.5", "between 0 and 1"),
    "batch and K": ("usl --preset smoke --batch 9 --K 2", "9", "multiple"),
    "unknown data": ("usl --preset smoke --data X=here", "X", "M, MS, VR, VID, folder"),
    "missing weights": ("usl --preset smoke --weights nowhere.safetensors", "nowhere", "expected"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(name, one_line_mistake):
    one_line_mistake(*MISTAKES[name])


@pytest.mark.parametrize("words", ["usl --method hdcrl", "uda --method idm"])
def test_command_line(words, tmp_path, capsys):
    from msinet.cli import main

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main([*words.split(), "--preset", "smoke", "--epochs", "1", "--iters", "1", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "mAP" in said and "after" in said and (tmp_path / "run" / "model.safetensors").is_file()


def test_published_values_are_taken_where_nothing_is_said():
    from msinet.cli import parse_args

    cfg = resolve_defaults(parse_args("usl --preset full --method cc --data M=x".split()), "usl")
    assert (cfg.batch, cfg.K, cfg.epochs, cfg.iters, cfg.beta, cfg.eps, cfg.lr, cfg.k1, cfg.k2) == (
        256,
        16,
        50,
        200,
        0.1,
        0.6,
        3.5e-4,
        30,
        6,
    )
    cfg = resolve_defaults(
        parse_args("uda --preset full --method idm --data MS=x --source M=y --eps 0.5".split()), "uda"
    )
    assert (cfg.batch, cfg.epochs, cfg.iters, cfg.eps, cfg.milestones) == (64, 50, 400, 0.5, (20, 40))
    assert resolve_defaults(parse_args("usl --preset released --method hdcrl --data M=x".split()), "usl").distil == 0


def test_recluster_is_public():
    assert issubclass(Recluster, Callback)
