"Ranking and re-ranking against a slow form of the definition, against released numbers, and their errors."

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from msinet.data.loaders import test_loader as in_order
from msinet.errors import InputError
from msinet.data.items import ReIDData
from msinet.retrieval.rerank import jaccard, rerank
from msinet.retrieval.neighbours import rerank_dense
from msinet.retrieval.places import Embeddings
from msinet.retrieval.ranking import Ranking, rank
from msinet.retrieval.evaluate import embed, evaluate, nearest

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    z = np.load(GOLDEN / name)
    return {k: torch.from_numpy(np.asarray(z[k])) for k in z}


def slow(q_f, q_pid, q_cam, g_f, g_pid, g_cam, same_cam_ok=False):
    "Places of the matches of each query, by sorting a list."
    out = []
    for f, p, c in zip(q_f, q_pid, q_cam):
        d = ((f - g_f) ** 2).sum(1).tolist()
        kept = [k for k in range(len(g_f)) if same_cam_ok or not (g_pid[k] == p and g_cam[k] == c)]
        kept.sort(key=lambda k: d[k])  # stable
        out.append([n for n, k in enumerate(kept) if g_pid[k] == p])
    return out


def case(seed, Q=20, G=150, ids=7, cams=3, values=4, D=3):
    gen = torch.Generator().manual_seed(seed)
    ints = lambda hi, *s: torch.randint(hi, s, generator=gen)
    one = lambda n, first: (1.0 + ints(values, n, D), first + ints(ids, n), ints(cams, n))
    return *one(Q, 1), *one(G, 0)  # id 0 is a distractor, id 7 is a query without a match


@pytest.mark.parametrize("same_cam_ok", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_ranking_is_the_sorted_list(seed, same_cam_ok):
    c = case(seed)
    r, want = rank(*c, same_cam_ok), slow(*c, same_cam_ok)
    assert [r.of(k).tolist() for k in range(20)] == want
    some = [np.array(w) for w in want if w]
    assert r.skipped == 20 - len(some) > 0
    assert_close(r.mean_ap(), float(np.mean([np.mean([(j + 1) / (p + 1) for j, p in enumerate(w)]) for w in some])))
    assert_close(r.minp(), float(np.mean([len(w) / (w[-1] + 1) for w in some])))
    for k in (1, 5, 10, 1000):
        assert_close(r.cmc(k), float(np.mean([w[0] < k for w in some])))
    assert_close(r.curve(7), np.array([r.cmc(k) for k in range(1, 8)]))
    assert np.isnan(r.ap).sum() == r.skipped and all(type(v) is float for v in (r.cmc(1), r.mean_ap(), r.minp()))


def test_chunks_do_not_matter():
    c = case(9, Q=700, G=60)
    assert [r.tolist() for r in np.split(rank(*c).ranks, rank(*c).offsets[1:-1])] == slow(*c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [1, 3, 33, 257, 768])
def test_equal_rows_are_ties(D, dtype):
    gen = torch.Generator().manual_seed(D)
    rows = torch.randn(5, D, generator=gen, dtype=dtype)
    which, pid = torch.randint(5, (2, 333), generator=gen)
    q, cam = torch.randn(9, D, generator=gen, dtype=dtype), torch.zeros(333, dtype=torch.long)
    c = q, torch.arange(9) % 5, cam[:9] + 1, rows[which], pid, cam
    r = rank(*c)
    order = ((q[:, None] - rows) ** 2).sum(2)[:, which].argsort(dim=1, stable=True)
    assert [r.of(k).tolist() for k in range(9)] == [
        np.flatnonzero(pid[o] == k % 5).tolist() for k, o in enumerate(order)
    ]
    collapsed = rank(q, c[1], c[2], rows[:1].expand(333, -1), pid, cam)
    assert all(collapsed.of(k).tolist() == np.flatnonzero(pid == k % 5).tolist() for k in range(9))


@pytest.mark.parametrize("name,ok", [("remove_cam", False), ("keep_cam", True)])
def test_ranking_gives_the_released_numbers(name, ok):
    z = golden("f_eval.npz")
    r = rank(z["query_feats"], z["q_pids"], z["q_camids"], z["gallery_feats"], z["g_pids"], z["g_camids"], ok)
    assert_close(r.mean_ap(), z[f"{name}.mAP"].item(), rtol=1e-9, atol=0)
    assert_close(torch.from_numpy(r.ap), z[f"{name}.ap_per_query"], rtol=1e-9, atol=0, equal_nan=True)
    assert_close(torch.from_numpy(r.curve(50)).float(), z[f"{name}.cmc"])
    assert_close(
        rank(
            z["query_feats"].float(),
            z["q_pids"],
            z["q_camids"],
            z["gallery_feats"].float(),
            z["g_pids"],
            z["g_camids"],
            ok,
        ).mean_ap(),
        r.mean_ap(),
        rtol=1e-5,
        atol=0,
    )


def test_example_by_hand():
    f = lambda *v: torch.tensor(v)[:, None]
    t = torch.tensor
    c = f(1.0), t([1]), t([1]), f(1.1, 1.2, 1.3, 1.4, 1.5), t([1, 2, 1, 1, 3]), t([1, 2, 2, 3, 1])
    assert rank(*c).of(0).tolist() == [1, 2] and rank(*c, same_cam_ok=True).of(0).tolist() == [0, 2, 3]
    assert_close((rank(*c).cmc(1), rank(*c).cmc(2), rank(*c).mean_ap(), rank(*c).minp()), (0.0, 1.0, 7 / 12, 2 / 3))
    no_cam = c[0], c[1], None, c[3], c[4], None
    assert rank(*no_cam, same_cam_ok=True).ranks.tolist() == [0, 2, 3]


def test_errors_say_what_is_wrong():
    q_f, q_pid, q_cam, g_f, g_pid, g_cam = case(0)
    bad = lambda f, k, v: f.clone().index_fill_(0, torch.tensor([k]), v)
    good = (q_f, q_pid, q_cam, g_f, g_pid, g_cam)

    def put(k, v):
        return *good[:k], v, *good[k + 1 :]

    for message, args in {
        "NaN in row 3 of the query": put(0, bad(q_f, 3, float("nan"))),
        "NaN in row 7 of the gallery": put(3, bad(g_f, 7, float("nan"))),
        "infinity in row 2": put(3, bad(g_f, 2, float("inf"))),
        "only zeros in row 5 of the gallery": put(3, bad(g_f, 5, 0.0)),
        "only zeros in row 0 of the query": put(0, bad(q_f, 0, 0.0)),
        r"expected \(N, D\)": put(0, q_f[0]),
        "20 features but identities": put(1, q_pid[:-1]),
        "150 features but cameras": put(5, g_cam[:-1]),
        "queries have 2 features": put(0, q_f[:, :2]),
        "gallery has no cameras": put(5, None),
    }.items():
        with pytest.raises(InputError, match=message) as e:
            rank(*args)
        assert "\n" not in str(e.value)
    r = rank(*put(1, q_pid + 100))
    assert r.skipped == 20 and np.isnan(r.ap).all()
    with pytest.raises(InputError, match="none of the 20 queries has a match"):
        r.mean_ap()


def test_nearest_agrees_with_rank():
    c = case(3, Q=30, G=40)
    q, g = Embeddings(*c[:3]), Embeddings(*c[3:])
    for ok in (False, True):
        r, near = rank(*c, ok), nearest(q, g, k=40, same_cam_ok=ok)
        assert [near.right[k].nonzero().flatten().tolist() for k in range(30)] == [r.of(k).tolist() for k in range(30)]
        for k in range(30):
            idx = near.idx[k][near.idx[k] >= 0]
            assert_close(near.dist[k][: len(idx)], (q.f[k] - g.f[idx]).norm(dim=1))
            assert near.dist[k][len(idx) :].isinf().all() and len(idx.unique()) == len(idx)
            assert ok or not ((g.pid[idx] == q.pid[k]) & (g.cam[idx] == q.cam[k])).any()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.b.eval()

    def embed(self, x):
        assert not self.training and not self.a.training and not torch.is_grad_enabled()
        return self.b(self.a(x)).mean((2, 3)).half()


def test_embed_keeps_order_and_modes(items):
    net = Net()
    e = embed(net, in_order(items, (8, 4), bs=5))
    assert e.f.shape == (12, 3) and e.f.dtype == torch.float32 and not e.f.is_inference()
    assert e.pid.tolist() == [i.pid for i in items] and e.cam.tolist() == [i.cam for i in items]
    assert net.training and net.a.training and not net.b.training and net.a.num_batches_tracked == 0
    assert embed(net, in_order([i._replace(cam=None) for i in items], (8, 4))).cam is None
    with pytest.raises(InputError, match="no images"):
        embed(net, in_order([], (8, 4)))


def test_evaluate_normalises_and_ranks(items):
    net, data = Net(), ReIDData([], items[::2], items[1::2], "x")
    q, g = (embed(net, in_order(l, (8, 4))) for l in (data.query, data.gallery))
    want = rank(F.normalize(q.f), q.pid, q.cam, F.normalize(g.f), g.pid, g.cam)
    got = evaluate(net, data, (8, 4))
    assert (
        isinstance(got, Ranking) and np.array_equal(got.ranks, want.ranks) and np.array_equal(got.offsets, want.offsets)
    )
    bare = ReIDData([], *([i._replace(cam=None) for i in l] for l in (data.query, data.gallery)), "x")
    assert evaluate(net, bare, (8, 4)).ranks.tolist() == rank(*want_args(q, g), same_cam_ok=True).ranks.tolist()


def want_args(q, g):
    return F.normalize(q.f), q.pid, q.cam, F.normalize(g.f), g.pid, g.cam


# re-ranking


@pytest.mark.parametrize("k1,k2,lam", [(20, 6, 0.3), (30, 10, 0.2), (5, 1, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rerank_gives_the_released_numbers(k1, k2, lam, dtype):
    z = golden("f_rerank.npz")
    got = rerank_dense(z["q_g"].to(dtype), z["q_q"].to(dtype), z["g_g"].to(dtype), k1, k2, lam)
    assert_close(got.float(), z[f"final.k1_{k1}.k2_{k2}.lambda_{lam}"], rtol=0, atol=1e-5)


def by_sets(d, k1, k2, lam, Q):
    "The definition, with Python's sets."
    N = len(d)
    d = (d**2) / (d**2).max(1, keepdims=True)
    near = [sorted(range(N), key=lambda j: (j != i, d[i, j])) for i in range(N)]

    def mutual(i, k):
        return {j for j in near[i][: k + 1] if i in near[j][: k + 1]}

    v = np.zeros((N, N))
    for i in range(N):
        own = mutual(i, k1)
        members = set(own)
        for j in own:
            half = mutual(j, round(k1 / 2))
            if 3 * len(half & own) > 2 * len(half):
                members |= half
        for j in members:
            v[i, j] = np.exp(-d[i, j])
    v /= v.sum(1, keepdims=True)
    v = np.stack([v[near[i][:k2]].mean(0) for i in range(N)])
    jac = 1 - np.minimum(v[:Q, None], v[None, Q:]).sum(2) / np.maximum(v[:Q, None], v[None, Q:]).sum(2)
    return (1 - lam) * jac + lam * d[:Q, Q:]


@pytest.mark.parametrize("k1,k2,lam", [(7, 3, 0.3), (4, 1, 0.0), (40, 6, 1.0)])
def test_rerank_is_the_definition(k1, k2, lam):
    f = torch.randn(36, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k1))
    d = (f[:, None] - f).norm(dim=2)
    want = torch.from_numpy(by_sets(d.numpy(), k1, k2, lam, 6))
    assert_close(rerank_dense(d[:6, 6:], d[:6, :6], d[6:, 6:], k1, k2, lam), want)
    assert_close(rerank(f[:6], f[6:], k1, k2, lam), want)
    assert_close(jaccard(f, k1, k2)[:6, 6:], torch.from_numpy(by_sets(d.numpy(), k1, k2, 0.0, 6)))


def test_rerank_of_equal_few_and_broken_vectors():
    same = torch.ones(3, 4), torch.ones(20, 4)
    assert rerank(*same).isfinite().all()
    assert rerank(torch.randn(2, 4), torch.randn(3, 4)).shape == (2, 3), "fewer images than k1"
    with pytest.raises(InputError, match="k1 is 0"):
        rerank(*same, k1=0)
    with pytest.raises(InputError, match="NaN in row 1 of the gallery"):
        rerank(torch.ones(3, 4), torch.tensor([[1.0] * 4, [float("nan")] * 4]))
