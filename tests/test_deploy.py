"Galleries are made, stored, searched and changed; verification uses pairs of known identity."

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from msinet.config import TRAIN
from msinet.deploy.gallery import VerifyConfig, Gallery, QueryConfig, approximate, verify, index_folder, load_gallery
from msinet.deploy.gallery import pair_distances, rate_interval, recall, run_verify, run_query, save_gallery
from msinet.deploy.gallery import threshold, judge_distance, weights_hash
from msinet.errors import InputError
from msinet.retrieval.places import Embeddings

SIZE = (8, 4)


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def embed(self, x):
        return self.w * x.flatten(1)


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for k in range(9):
        Image.fromarray(rng.integers(0, 256, (8, 4, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{k}.png")
    return tmp_path / "images"


def test_a_gallery_is_stored_searched_and_changed(images, tmp_path):
    from PIL import Image

    net = Raw()
    save_gallery(index_folder(net, images, SIZE), tmp_path / "g")
    g = load_gallery(tmp_path / "g", net)
    for k in range(9):
        a = g.query(net, images / f"{k}.png", k=3)
        assert a.names[0] == str(images / f"{k}.png") and a.dist[0] == 0 and (np.diff(a.dist) >= 0).all()
        assert g.query(net, np.asarray(Image.open(images / f"{k}.png")), k=3).names == a.names
    want = (g.f - g.f[0]).norm(dim=1).argsort(stable=True).tolist()
    assert g.query(net, images / "0.png", k=99).names == [g.names[i] for i in want]
    less = g.remove([images / "0.png"])
    assert len(less) == 8 and less.query(net, images / "0.png", k=1).dist[0] > 0
    more = less.add(net, [images / "0.png"])
    assert more.query(net, images / "0.png", k=1).names == [str(images / "0.png")] and len(g) == 9
    with pytest.raises(InputError, match="already"):
        more.add(net, [images / "0.png"])
    with pytest.raises(InputError, match="not in the gallery"):
        more.remove(["x.png"])
    with pytest.raises(InputError, match="expected uint8"):
        g.query(net, np.zeros((8, 4, 3)))
    save_gallery(less, tmp_path / "g")  # over the old one
    assert load_gallery(tmp_path / "g").names == less.names


def test_another_network_is_refused(images, tmp_path):
    net, other = Raw(), Raw()
    save_gallery(index_folder(net, images, SIZE), tmp_path / "g")
    with torch.no_grad():
        other.w += 1e-6
    with pytest.raises(InputError, match="same weights"):
        load_gallery(tmp_path / "g", other)
    with pytest.raises(InputError, match="same weights"):
        load_gallery(tmp_path / "g").query(other, images / "0.png")
    with pytest.raises(InputError, match="same weights"):
        load_gallery(tmp_path / "g").add(other, [])
    with pytest.raises(InputError, match="holds no gallery"):
        load_gallery(tmp_path)
    names = json.loads((tmp_path / "g" / "gallery.json").read_text())
    (tmp_path / "g" / "gallery.json").write_text(json.dumps(dict(names, names=names["names"][1:])))
    with pytest.raises(InputError, match="9 vectors and 8 names"):
        load_gallery(tmp_path / "g")
    net.add_module("classifier", nn.Linear(2, 2))
    assert weights_hash(net) == weights_hash(Raw()), "classifiers don't embed"


def test_an_index_needs_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match="not installed"):
        approximate(Gallery(torch.eye(3), ("a", "b", "c"), "", SIZE))


def test_an_index_finds_and_is_stored(tmp_path):
    pytest.importorskip("faiss", reason="FAISS is optional")
    gen = torch.Generator().manual_seed(0)
    who = torch.randn(100, 32, generator=gen)
    f = F.normalize(who[torch.arange(4000) % 100] + 0.5 * torch.randn(4000, 32, generator=gen))
    g = approximate(Gallery(f, tuple(map(str, range(4000))), "x", SIZE), m=8)
    save_gallery(g, tmp_path / "g")
    assert recall(g, f[:40]) > 0.9 and recall(load_gallery(tmp_path / "g"), f[:40]) == recall(g, f[:40])
    assert g.remove(["0"]).index is None
    save_gallery(replace(g, index=None), tmp_path / "g")
    assert load_gallery(tmp_path / "g").index is None


def test_pairs_and_thresholds(images):
    gen = torch.Generator().manual_seed(0)
    pid, cam = torch.arange(60) % 6, torch.arange(60) // 6 % 3
    f = F.normalize(torch.randn(6, 8, generator=gen)[pid] + 0.4 * torch.randn(60, 8, generator=gen))
    e = Embeddings(f[:20], pid[:20], cam[:20]), Embeddings(f[20:], pid[20:], cam[20:])
    true, false = pair_distances(*e, n=5000)
    d = (f[:20, None] - f[20:]).norm(dim=2)
    match = (pid[:20, None] == pid[20:]) & (cam[:20, None] != cam[20:])
    assert (
        np.allclose(true, d[match].sort().values)
        and len(false) > 3000
        and false.min() >= d[pid[:20, None] != pid[20:]].min() - 1e-6
    )
    for fmr in (0.001, 0.01, 0.3):
        v = judge_distance(float(true[3]), true, false, fmr)
        assert v.fmr == (false < v.threshold).mean() <= fmr and v.tmr == (true < v.threshold).mean()
        assert v.fmr_interval[0] <= v.fmr <= v.fmr_interval[1] and v.nearer_true == 3 / len(true)
    for k, n in ((0, 10), (10, 10), (3, 50)):
        lo, hi = rate_interval(k, n)
        assert 0 <= lo <= k / n <= hi <= 1
    with pytest.raises(InputError, match="cannot be seen"):
        threshold(false[:10], 0.01)
    with pytest.raises(InputError, match="no true pairs"):
        pair_distances(e[0], e[1]._replace(pid=pid[20:] + 9))
    v = verify(Raw(), images / "0.png", images / "0.png", SIZE, true, false)
    assert v.same and v.distance == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from msinet.training.train import train

    return train(replace(TRAIN["smoke"], out=str(tmp_path_factory.mktemp("run") / "r"), epochs=1, threads=1)).run


def test_commands(run, images, tmp_path):
    out = run_query(
        QueryConfig(gallery=str(tmp_path / "g"), image=str(images / "3.png"), index=str(images), run=str(run), k=4)
    )
    assert (
        str(images / "3.png") not in out["names"]
        and len({*out["names"]}) == 4
        and out["distances"] == sorted(out["distances"])
    )
    shutil.copy(images / "3.png", tmp_path / "asked.png")
    same = run_query(QueryConfig(gallery=str(tmp_path / "g"), image=str(tmp_path / "asked.png"), k=5))
    assert same["names"] == [str(images / "3.png"), *out["names"]] and same["distances"][0] < 1e-3
    less = run_query(QueryConfig(gallery=str(tmp_path / "g"), image=str(images / "3.png"), k=99, exclude="[0-2].png"))
    assert {Path(n).name for n in less["names"]} == {p.name for p in images.iterdir()} - {
        "0.png",
        "1.png",
        "2.png",
        "3.png",
    }
    with pytest.raises(InputError, match="is no regular expression"):
        run_query(QueryConfig(gallery=str(tmp_path / "g"), image="x", exclude="("))
    with pytest.raises(InputError, match="of 0 images"):
        run_query(QueryConfig(gallery=str(tmp_path / "g"), image=str(images / "3.png"), exclude="."))
    again = run_query(
        QueryConfig(gallery=str(tmp_path / "g"), image=str(images / "3.png"), k=4, out=str(tmp_path / "o" / "x"))
    )
    assert (
        again["names"] == out["names"]
        and json.loads((tmp_path / "o" / "x.json").read_text())["names"] == out["names"]
        and (tmp_path / "o" / "x.png").stat().st_size > 1000
    )
    v = run_verify(
        VerifyConfig(
            a=str(images / "1.png"),
            b=str(images / "1.png"),
            run=str(run),
            data="synth:n_ids=1,n_test=8",
            fmr=0.05,
            out=str(tmp_path / "pair"),
        )
    )
    assert v["same"] and v["distance"] == 0 and (tmp_path / "pair.png").exists() and (tmp_path / "pair.json").exists()
    own = run_verify(VerifyConfig(a=str(images / "1.png"), b=str(images / "1.png"), run=str(run), fmr=0.05))
    assert own["same"] and own["data"] == TRAIN["smoke"].data  # a network's threshold comes from its own set
    shutil.copy(Path(run) / "model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(InputError, match="no config.json"):
        run_verify(VerifyConfig(a="a", b="b", run=str(tmp_path / "alone.safetensors")))
    with pytest.raises(InputError, match="holds no gallery"):
        run_query(QueryConfig(gallery=str(tmp_path / "none"), image="x"))
