"Identity and triplet loss: released numbers, any mix of labels, mistakes."

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from msinet.errors import InputError
from msinet.losses import check_labels, distances, hardest, id_loss, triplet, unit

G = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / 'golden' / 'd_losses.npz').items()}


def with_grad(loss, x, *a, **kw):
    x = x.clone().requires_grad_()
    l = loss(x, *a, **kw)
    return l.detach(), torch.autograd.grad(l, x)[0]


@pytest.mark.parametrize('name, normalise', [('triplet_normalised', True), ('triplet_raw', False)])
def test_triplet_golden(name, normalise):
    f, y = G['triplet.feats'], G['triplet.labels']
    loss, grad = with_grad(triplet, f, y, float(G['triplet.margin']), normalise)
    assert_close(loss, G[f'{name}.loss'], rtol=1e-7, atol=0)
    assert_close(grad, G[f'{name}.grad'], rtol=0, atol=1e-6 * G[f'{name}.grad'].norm().item())
    d_p, d_n = hardest(distances(unit(f) if normalise else f), y)
    assert_close((d_n > d_p).float().mean(), G[f'{name}.precision'])


def test_id_golden():
    loss, grad = with_grad(id_loss, G['ce.logits'], G['ce.labels'], float(G['ce.epsilon']))
    assert_close(loss, G['ce.loss'], rtol=1e-7, atol=0)
    assert_close(grad, G['ce.grad'], rtol=0, atol=1e-6 * G['ce.grad'].norm().item())


def test_float32_follows_float64():
    f, y = G['triplet.feats'], G['triplet.labels']
    assert_close(triplet(f.float(), y), triplet(f, y).float(), rtol=1e-5, atol=0)
    assert_close(id_loss(G['ce.logits'].float(), G['ce.labels']), G['ce.loss'].float(), rtol=1e-5, atol=0)


def test_without_smoothing_it_is_the_plain_identity_loss():
    z, y = G['ce.logits'], G['ce.labels']
    assert_close(id_loss(z, y, eps=0), -z.softmax(1).gather(1, y[:, None]).log().mean())
    assert id_loss(z, y) != id_loss(z, y, eps=0)
    assert_close(id_loss(z, y, eps=1), -z.log_softmax(1).mean())


@pytest.mark.parametrize('y', [[0, 0, 0, 1], [0, 1, 2, 3], [7, 7, -3, 7, 100, -3]], ids=str)
@pytest.mark.parametrize('m', [0.0, 0.3, 3.0])
def test_triplet_any_mix_of_labels(y, m):
    f, y = torch.randn(len(y), 5, dtype=torch.double, generator=torch.Generator().manual_seed(len(y))), torch.tensor(y)
    total = 0
    for a in range(len(y)):
        d = (F.normalize(f[a], dim=0) - F.normalize(f)).norm(dim=1)
        total += (d[y == y[a]].max() - d[y != y[a]].min() + m).clamp(min=0)
    assert_close(triplet(f, y, m), total / len(y), atol=1e-6, rtol=0)  # an anchor alone is at 1e-6 from itself
    if len(y.unique()) < len(y):
        assert gradcheck(lambda f: triplet(f, y, m), f.requires_grad_())


def test_copies_and_zeros_have_a_finite_gradient():
    f = torch.randn(6, 4)
    f[1], f[3], f[4] = f[0], 0, f[5]  # a copy, a dead feature, a copy with another label
    for normalise in (True, False):
        loss, grad = with_grad(triplet, f, torch.tensor([0, 0, 1, 1, 2, 3]), normalise=normalise)
        assert loss.isfinite() and grad.isfinite().all() and grad.abs().max() < 10


def test_one_identity_has_no_negative():
    for y in ([4, 4, 4], [0]):
        with pytest.raises(InputError, match='one identity') as e:
            triplet(torch.randn(len(y), 3), torch.tensor(y))
        assert '\n' not in str(e.value)
    d_p, d_n = hardest(distances(torch.randn(3, 2, requires_grad=True)), torch.zeros(3))  # what a GPU does instead
    assert (d_p - d_n + 0.3).relu().mean() == 0


@pytest.mark.parametrize('bad', [[0, 5], [-1, 2], [1501, 0]], ids=str)
def test_labels_out_of_range(bad):
    with pytest.raises(InputError, match='expected 0 to 4'):
        id_loss(torch.randn(2, 5), torch.tensor(bad))


def test_check_labels_accepts_labels_in_range():
    check_labels(torch.tensor([0, 4]), 5)
    check_labels(torch.tensor([], dtype=torch.long), 5)


def test_unit_vectors_have_length_one_and_zeros_stay_zero():
    f = torch.randn(3, 4, 5, dtype=torch.double)
    assert_close(unit(f), F.normalize(f, dim=-1))
    f[1, 2] = 0
    out, grad = with_grad(lambda f: unit(f).sum(), f)
    assert (grad[1, 2] == 0).all() and grad.isfinite().all()
    assert gradcheck(unit, torch.randn(3, 4, dtype=torch.double, requires_grad=True))
