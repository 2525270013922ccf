"Sparse re-ranking against the dense form, and clustering with the sparse distances."

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from msinet.errors import InputError
from msinet.retrieval.neighbours import by_distance, expand_sets, neighbour_weights, reciprocal_sets, rerank_dense
from msinet.retrieval.refine import FlipAveraged, expand_queries, fit_whitening, whiten
from msinet.retrieval.rerank import expand, jaccard, jaccard_sparse, k_nearest, reciprocal, rerank, sparse_weights
from msinet.retrieval.places import sq_dist

QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@QUICK
@given(st.integers(3, 60), st.integers(1, 5), st.integers(1, 25), st.integers(1, 9), st.integers(0, 10**6))
def test_sparse_equals_dense(N, D, k1, k2, seed):
    f = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    d = ((f[:, None] - f) ** 2).sum(2)
    order, (near, far) = by_distance(d), k_nearest(f, k1)
    assert np.array_equal(near, order[:, : k1 + 1]) and np.allclose(far, d.amax(1))
    r, half = reciprocal_sets(order, k1), reciprocal_sets(order, round(k1 / 2))
    assert np.array_equal(reciprocal(near, k1).toarray(), r)
    assert np.array_equal(expand(reciprocal(near, k1), reciprocal(near, round(k1 / 2))).toarray(), expand_sets(r, half))
    assert_close(
        torch.from_numpy(sparse_weights(f, k1, k2, chunk=7)[0].toarray()),
        neighbour_weights(d / d.amax(1, keepdim=True), k1, k2),
    )
    Q, e = N // 3, d.sqrt()
    assert_close(
        rerank(f[:Q], f[Q:], k1, k2, 0.3), rerank_dense(e[:Q, Q:], e[:Q, :Q], e[Q:, Q:], k1, k2, 0.3), rtol=0, atol=1e-9
    )
    j, s = jaccard(f, k1, k2), jaccard_sparse(f, k1, k2, eps=0.7)
    assert s.nnz == (j <= 0.7).sum() and np.allclose(s.toarray(), np.where(j <= 0.7, j, 0))


def test_single_precision_is_close_to_dense():
    gen = torch.Generator().manual_seed(0)
    who = torch.randn(60, 64, generator=gen)
    f = torch.nn.functional.normalize(who[torch.arange(600) % 60] + 0.9 * torch.randn(600, 64, generator=gen))
    e = sq_dist(f, f).sqrt()
    assert_close(rerank(f[:100], f[100:]), rerank_dense(e[:100, 100:], e[:100, :100], e[100:, 100:]), rtol=0, atol=1e-6)


def test_sparse_distances_give_the_clusters_of_dense_ones():
    from sklearn.cluster import DBSCAN

    gen = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 10
    f = 5 * torch.randn(10, 16, generator=gen)[y] + torch.randn(200, 16, generator=gen)
    labels = [
        DBSCAN(eps=0.6, min_samples=4, metric="precomputed").fit_predict(d)
        for d in (jaccard(f, 15, 4).clamp(min=0).numpy(), jaccard_sparse(f, 15, 4, eps=0.6))
    ]
    assert np.array_equal(*labels) and len(set(zip(labels[0].tolist(), y.tolist()))) == 10 == len(
        set(labels[0].tolist())
    )


def test_refined_vectors_and_their_errors():
    f = torch.randn(50, 4)
    w = fit_whitening(f, d=2)
    assert whiten(f, w).shape == (50, 2)
    assert_close(whiten(f, w).norm(dim=1), torch.ones(50))
    d = f.double()
    t = d @ fit_whitening(d, share=0.0).turn  # a rotation keeps distances
    assert_close((t[:, None] - t).norm(dim=2), (d[:, None] - d).norm(dim=2))
    assert_close(expand_queries(f[:5], f, k=1, alpha=0).norm(dim=1), torch.ones(5))
    with pytest.raises(InputError, match="1 training vectors"):
        fit_whitening(f[:1])
    with pytest.raises(InputError, match="k is 0"):
        expand_queries(f, f, k=0)
    net = torch.nn.Module()
    net.embed = lambda x: x.flatten(1)
    x = torch.randn(2, 3, 4, 2)
    assert_close(FlipAveraged(net).embed(x), FlipAveraged(net).embed(x.flip(3)))
