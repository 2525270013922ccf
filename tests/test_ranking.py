"Exact ranking of arrays and tensors against a stable sort; bounds for ties; uncertainty; protocols against loops."

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from msinet.errors import InputError
from msinet.data.items import ReIDData
from msinet.retrieval.places import Pairs, chunk_places, filtered_scores, repeated_rows, check_vectors
from msinet.retrieval.ranking import Ranking, camera_table, metrics_table, query_table
from msinet.retrieval.places import Embeddings
from msinet.retrieval.protocols import full_gallery, image_to_track, one_image_galleries, single_shot
from msinet.retrieval.evaluate import evaluate, evaluate_all, nearest
from msinet.retrieval.ranking import rank

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def by_sort(c, ok, tie):
    "Places of each query's matches by sorting; `tie(j, match)` breaks ties."
    q_f, q_pid, q_cam, g_f, g_pid, g_cam = c
    out = []
    for f, p, k in zip(q_f.double(), q_pid, q_cam):
        d = ((f - g_f.double()) ** 2).sum(1).tolist()
        kept = [j for j in range(len(d)) if ok or not (g_pid[j] == p and g_cam[j] == k)]
        kept.sort(key=lambda j: (d[j], tie(j, bool(g_pid[j] == p))))
        out.append([n for n, j in enumerate(kept) if g_pid[j] == p])
    return out


@st.composite
def cases(draw):
    "Small integers as features: distances are exact in every type, and most of them are ties."
    n = lambda lo, hi: draw(st.integers(lo, hi))
    Q, G, D, ids, cams, values = n(1, 6), n(1, 40), n(1, 4), n(1, 5), n(1, 3), n(1, 3)
    gen, dtype = (
        torch.Generator().manual_seed(n(0, 10**6)),
        draw(st.sampled_from([torch.float16, torch.float32, torch.float64])),
    )
    ints = lambda hi, *s: torch.randint(hi, s, generator=gen)
    one = lambda k: ((1 + ints(values, k, D)).to(dtype), ints(ids, k), ints(cams, k))
    q, g = one(Q), one(G)
    if draw(st.booleans()):
        g = (g[0], g[1] + 2, g[2])  # distractors, and queries without a match
    return (*q, *g), draw(st.booleans()), n(1, 7)


def listed(r):
    return [r.of(k).tolist() for k in range(len(r.n))]


@QUICK
@given(cases())
def test_places_are_those_of_a_stable_sort(case):
    c, ok, chunk = case
    r = rank(*c, ok, chunk=chunk)
    want = by_sort(c, ok, lambda j, match: j)
    assert listed(r) == want
    assert listed(r.best_ties) == by_sort(c, ok, lambda j, match: (not match, j))
    assert listed(r.worst_ties) == by_sort(c, ok, lambda j, match: (match, j))
    some = [w for w in want if w]
    assert r.skipped == len(want) - len(some)
    if not some:
        return
    ap = [sum((k + 1) / (p + 1) for k, p in enumerate(w)) / len(w) for w in some]
    old = [sum(((k / p if p else 1) + (k + 1) / (p + 1)) / 2 for k, p in enumerate(w)) / len(w) for w in some]
    assert abs(r.mean_ap() - sum(ap) / len(ap)) < 1e-12 and abs(r.mean(r.ap_trapezoid) - sum(old) / len(old)) < 1e-12
    assert abs(r.minp() - sum(len(w) / (w[-1] + 1) for w in some) / len(some)) < 1e-12
    for k in (1, 2, 50):
        assert r.cmc(k) == sum(w[0] < k for w in some) / len(some)
    assert all(c[4][j] == c[1][q] for q, j in zip(r.row, r.cols))


@QUICK
@given(cases())
def test_tensors_give_the_same_places_as_arrays(case):
    c, ok, chunk = case
    for _, s, match in filtered_scores(Embeddings(*c[:3]), Embeddings(*c[3:]), ok, chunk):
        for a, b in zip(chunk_places(s, match), chunk_places(torch.from_numpy(s.copy()), match)):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("G", [600, 3000])
@pytest.mark.parametrize("noise", [0.3, 30.0])
def test_few_and_many_candidates_give_the_same_places(G, noise):
    gen = torch.Generator().manual_seed(G)
    who, pid, cam = (
        torch.randn(20, 8, generator=gen, dtype=torch.float64),
        torch.arange(G + 25) % 20,
        torch.arange(G + 25) // 20 % 4,
    )
    f = who[pid] + noise * torch.randn(G + 25, 8, generator=gen, dtype=torch.float64)
    f[100:130] = f[130:160]  # repeated rows
    c = f[:25], pid[:25], cam[:25], f[25:], pid[25:], cam[25:]
    assert listed(rank(*c)) == by_sort(c, False, lambda j, match: j)


def test_repeated_rows_are_found():
    f = np.random.default_rng(0).standard_normal((50, 100)).astype(np.float32)
    f[40], f[10, :64], f[7], f[8] = f[3], f[20, :64], 0.0, -0.0
    again, first = repeated_rows(f)
    assert (again.tolist(), first.tolist()) == ([8, 40], [7, 3])
    assert not len(repeated_rows(f[:0])[0])


def test_empty_and_extreme_features():
    f, t = torch.ones(2, 3), torch.arange(2)
    assert rank(f[:0], t[:0], t[:0], f, t, t).offsets.tolist() == [0]
    assert rank(f, t, t, f[:0], t[:0], t[:0]).skipped == 2
    with pytest.raises(InputError, match="too large to square in row 1"):
        check_vectors(torch.tensor([[1.0], [3e30]]), "query")
    assert len(check_vectors(torch.tensor([[1.0], [1e-30]]), "query")) == 2
    with pytest.raises(InputError, match=r"NaN in row 1 of the query features \(b\.jpg\)"):
        check_vectors(torch.tensor([[1.0], [np.nan]]), "query", ["a.jpg", "b.jpg"])


def test_tables_agree_with_the_ranking():
    gen = torch.Generator().manual_seed(0)
    c = [
        torch.randn(40, 4, generator=gen),
        torch.arange(40) % 8,
        torch.arange(40) % 3,
        torch.randn(90, 4, generator=gen),
        torch.arange(90) % 7,
        torch.arange(90) % 4,
    ]
    r = rank(*c)
    t, q = metrics_table(r), query_table(r)
    assert r.tied == 0 and (t.low == t["mean"]).all() and (t.high == t["mean"]).all()
    ap = q.AP.dropna()
    assert_close((t.at["mAP", "mean"], t.at["mAP", "se"]), (ap.mean(), ap.std() / len(ap) ** 0.5))
    assert q.AP.isna().sum() == r.skipped == 5
    for _, p in camera_table(r, c[2], c[5]).iterrows():  # only matches by that camera are left in the gallery
        rows = (c[2] == p.query).nonzero().flatten()
        aps = []
        for k in rows.tolist():
            keep = (c[4] != c[1][k]) | ((c[5] == p.gallery) & (c[5] != c[2][k]))
            one = rank(c[0][k : k + 1], c[1][k : k + 1], c[2][k : k + 1], c[3][keep], c[4][keep], c[5][keep])
            if not one.skipped:
                aps.append((one.mean_ap(), one.cmc(1)))
        assert p.n == len(aps)
        assert_close((p.AP, p.R1), tuple(map(float, np.mean(aps, 0))))
    with pytest.raises(InputError, match="none of the 2 queries"):
        metrics_table(Ranking(np.zeros(0, np.int64), np.zeros(3, np.int64)))


def people(n=30, each=6, cams=3, noise=0.8, seed=0):
    gen = torch.Generator().manual_seed(seed)
    who, pid = torch.randn(n, 8, generator=gen), torch.arange(n * each) % n
    return (
        who[pid] + noise * torch.randn(n * each, 8, generator=gen),
        pid,
        torch.randint(cams, (n * each,), generator=gen),
    )


def test_vehicleid_protocol_is_the_loop():
    f, pid, _ = people()
    r = one_image_galleries(Embeddings(f[:100], pid[:100], None), Embeddings(f[100:], pid[100:], None), n=4)
    assert len(r.n) == 4 * 150 and (r.n == 1).all() and [*np.bincount(r.draw)] == [150] * 4
    for k in range(4):
        there = np.random.default_rng([0, k]).permutation(180)
        there = sorted({int(pid[j]): j for j in there[::-1]}.values())  # the first of each identity
        queries = [j for j in range(180) if j not in there]
        d = ((f[queries, None].double() - f[there].double()) ** 2).sum(2)
        want = [(d[n] < d[n][pid[there] == pid[j]]).sum().item() for n, j in enumerate(queries)]
        assert r.ranks[r.offsets[150 * k] : r.offsets[150 * (k + 1)]].tolist() == want
        assert set(r.cols[r.row // 150 == k]) <= set(there)
    assert np.array_equal(
        r.ranks,
        one_image_galleries(Embeddings(f[:100], pid[:100], None), Embeddings(f[100:], pid[100:], None), n=4).ranks,
    )
    t = metrics_table(r)
    sd = np.std([(r.first[150 * k : 150 * k + 150] < 1).mean() for k in range(4)], ddof=1)
    assert_close(t.at["R1", "sd"], sd)


def test_track_protocol_is_the_loop():
    f, pid, cam = people(seed=1)
    q, g = Embeddings(f[:40], pid[:40], cam[:40]), Embeddings(f[40:], pid[40:], cam[40:])
    tracks = sorted({(int(p), int(c)) for p, c in zip(g.pid, g.cam)})
    d = ((q.f[:, None].double() - g.f.double()) ** 2).sum(2)
    near = torch.stack([d[:, (g.pid == p) & (g.cam == c)].amin(1) for p, c in tracks], 1)
    r = image_to_track(q, g)
    for k in range(40):
        kept = [(near[k, t], pc) for t, pc in enumerate(tracks) if pc != (int(q.pid[k]), int(q.cam[k]))]
        assert r.of(k).tolist() == [n for n, (_, pc) in enumerate(sorted(kept)) if pc[0] == q.pid[k]]
    with pytest.raises(InputError, match="no cameras"):
        image_to_track(q, g._replace(cam=None))


def test_single_shot_has_one_match_per_query():
    f, pid, cam = people(seed=2)
    q, g = Embeddings(f[:40], pid[:40], cam[:40]), Embeddings(f[40:], pid[40:], cam[40:])
    r, whole = single_shot(q, g, n=6), full_gallery(q, g)
    assert (r.n <= 1).all() and np.array_equal(r.n, np.tile(whole.n > 0, 6))
    wrong = [(len(set(g.pid.tolist())) - 1)] * 40
    assert all(r.of(k)[0] <= wrong[k % 40] for k in range(240) if r.n[k]) and r.cmc(1) <= whole.cmc(1) + 0.05
    one = Embeddings(f[:30], pid[:30], cam[:30] + 9)  # one image of each identity: nothing to draw
    assert listed(single_shot(q, one, n=1)) == listed(full_gallery(q, one))


class Net(nn.Module):
    def embed(self, x):
        return x.mean((2, 3)) + 4


def test_a_set_is_measured_by_its_own_protocol(items):
    sets = {n: ReIDData([], items[::2], items[1::2], n, n == "VID") for n in ("M", "VID")}
    assert evaluate(Net(), sets["M"], (8, 4)).draw is None
    assert np.bincount(evaluate(Net(), sets["VID"], (8, 4)).draw).tolist() == [9] * 10
    assert evaluate(Net(), sets["VID"], (8, 4), protocol=full_gallery).draw is None
    t = evaluate_all(Net(), sets, (8, 4))
    assert_close(t.loc[("M", "mAP"), "mean"], evaluate(Net(), sets["M"], (8, 4)).mean_ap())
    assert t.loc[("M", "mAP")].isna()["sd"] and t.loc[("VID", "mAP")].notna()["sd"]


def test_a_broken_vector_is_reported_with_the_images_name(items):
    class Broken(Net):
        def embed(self, x):
            return super().embed(x) * torch.where(torch.arange(len(x)) == 3, torch.nan, 1.0)[:, None]

    with pytest.raises(InputError, match=r"NaN in row 3 of the query features \(.*6\.png\)"):
        evaluate(Broken(), ReIDData([], items[::2], items[1::2], "x"), (8, 4))


def test_nearest_is_a_stable_sort():
    gen = torch.Generator().manual_seed(0)
    f = 1.0 + torch.randint(3, (60, 2), generator=gen)
    e = Embeddings(f[:10], torch.arange(10), None), Embeddings(f[10:], torch.arange(50), None)
    for k in (1, 7, 50, 80):
        near = nearest(*e, k=k, same_cam_ok=True)
        assert torch.equal(near.idx, ((e[0].f[:, None] - e[1].f) ** 2).sum(2).argsort(dim=1, stable=True)[:, :k])
    with pytest.raises(InputError, match="k is 0"):
        nearest(*e, k=0, same_cam_ok=True)
    assert Pairs._fields == ("row", "col")
