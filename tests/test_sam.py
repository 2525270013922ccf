"Spatial alignment: released numbers, any mix of labels, any grid, memory."

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from msinet.align import ALIGN, pairwise, unified
from msinet.backbones import build_baseline
from msinet.core import n_params
from msinet.errors import InputError
from msinet.sam import PAM, SAM, activation_vectors, alignment, correlation, center

G = {
    k: torch.from_numpy(v)
    for k, v in np.load(Path(__file__).parent / 'golden' / 'd_losses.npz').items()
    if k.startswith('sam.')
}
TERMS = dict(pos=(1.0, 0.0), neg=(0.0, 1.0), pos_neg=(1.0, 1.0))


def golden_sam(pos=1.0, neg=1.0, released=True):
    sam = SAM(32, pos, neg, released).double()
    sam.pam.load_state_dict(
        {f'{n}.{w}': G[f'sam.param.pos_pam.{n}_conv.{w}'] for n in ('query', 'key') for w in ('weight', 'bias')}
    )
    return sam


def loop(a_hat, a, y, pos=1.0, neg=1.0):
    S = lambda v, w: F.cosine_similarity(v, w, dim=0)
    total = 0.0
    for i in range(len(y)):
        P, N = [p for p in range(len(y)) if y[p] == y[i]], [n for n in range(len(y)) if y[n] != y[i]]
        total += pos * sum(1 - S(a_hat[i], a[i, p]) for p in P) / len(P)
        total += neg * sum(1 - S(a[i, n], a[i, m]) for n in N for m in N) / max(1, len(N)) ** 2
    return total / len(y)


# released numbers


def test_scores_golden():
    x, sam = G['sam.x'], golden_sam()
    assert_close(activation_vectors(x, released=True), G['sam.scores'][:8], rtol=1e-9, atol=1e-12)
    assert_close(correlation(sam.pam.query(x), sam.pam.key(x)), G['sam.pam_energy'], rtol=1e-9, atol=1e-12)
    assert_close(sam.pam(x), G['sam.scores'][8], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('mode', TERMS)
def test_loss_and_gradients_golden(mode):
    sam, x = golden_sam(*TERMS[mode]), G['sam.x'].clone().requires_grad_()
    loss = sam(x, G['sam.labels'])
    loss.backward()
    assert_close(loss.detach(), G[f'sam.{mode}.loss'], rtol=1e-7, atol=0)
    grads = {'grad_x': x.grad} | {
        f'grad_param.pos_pam.{n}_conv.{w}': getattr(getattr(sam.pam, n), w).grad
        for n in ('query', 'key')
        for w in ('weight', 'bias')
    }
    largest = max(G[f'sam.{mode}.{k}'].norm() for k in grads).item()
    for k, g in grads.items():
        assert_close(g, G[f'sam.{mode}.{k}'], rtol=0, atol=1e-6 * largest, msg=k)


@pytest.mark.parametrize('mode', TERMS)
def test_alignment_golden(mode):
    s = G['sam.scores'].clone().requires_grad_()
    loss = alignment(s[8], s[:8], G['sam.labels'], *TERMS[mode])
    loss.backward()
    assert_close(loss.detach(), G[f'sam.{mode}.loss'], rtol=1e-7, atol=0)
    want = G[f'sam.{mode}.grad_scores']
    assert_close(s.grad, want, rtol=0, atol=1e-6 * want.norm().item())


def test_the_default_direction_is_another_loss():
    x, y = G['sam.x'], G['sam.labels']
    assert_close(activation_vectors(x), G['sam.scores'][:8].transpose(0, 1), rtol=1e-9, atol=1e-12)
    assert abs(golden_sam(released=False)(x, y) - G['sam.pos_neg.loss']) > 1e-4


# activation vectors


def test_activation_vectors_are_the_definition():
    x = torch.randn(3, 4, 2, 5, dtype=torch.double)
    a = activation_vectors(x)
    assert a.shape == (3, 3, 10)
    want = torch.einsum('icr,jcq->ijrq', x.flatten(2), x.flatten(2)).amax(-1)
    assert_close(a, want)
    assert gradcheck(activation_vectors, torch.randn(3, 4, 2, 2, dtype=torch.double, requires_grad=True))


def test_positions_in_the_other_image_do_not_matter():
    x = torch.randn(3, 4, 6, dtype=torch.double)
    p = torch.randperm(6)
    moved = x.clone()
    moved[2] = x[2][:, p]
    a, b = (activation_vectors(z.view(3, 4, 2, 3)) for z in (x, moved))
    assert_close(b[0, 2], a[0, 2])
    assert_close(b[2, 0], a[2, 0, p])
    assert_close(b[2, 2], a[2, 2, p])


# alignment


@pytest.mark.parametrize(
    'y',
    [[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 2, 1, 0, 1, 3], [0, 0, 0, 0, 0, 0, 0, 1], [5, -1, 3, 9, 0, 2, 1, 7]],
    ids=str,
)
@pytest.mark.parametrize('w', [(1, 1), (1, 0), (0, 1), (0.5, 2)], ids=str)
def test_any_mix_of_labels(y, w):
    g = torch.Generator().manual_seed(0)
    a_hat, a = torch.rand(8, 6, generator=g, dtype=torch.double), torch.rand(8, 8, 6, generator=g, dtype=torch.double)
    assert_close(alignment(a_hat, a, torch.tensor(y), *w), loop(a_hat, a, y, *w))


def test_order_of_the_batch_does_not_matter():
    sam, x, y, p = SAM(8).double(), torch.rand(6, 8, 3, 2).double(), torch.tensor([0, 0, 1, 1, 1, 2]), torch.randperm(6)
    assert_close(sam(x[p], y[p]), sam(x, y))


def test_without_negatives_there_is_no_second_term():
    sam, x, y = SAM(8), torch.rand(4, 8, 3, 2), torch.zeros(4, dtype=torch.long)
    whole = sam(x, y)
    sam.neg = 0.0
    assert_close(whole, sam(x, y))
    assert whole.isfinite()
    assert sam(x[:1], y[:1]).isfinite()


def test_labels_of_another_batch_raise():
    with pytest.raises(InputError, match='found 3 labels for 4 samples'):
        SAM(8)(torch.rand(4, 8, 2, 2), torch.zeros(3))


def test_maps_of_zeros_stay_finite():
    sam, y = SAM(8), torch.tensor([0, 0, 1, 2])
    for dark in ([1], [0, 1, 2, 3]):
        x = torch.rand(4, 8, 3, 2)
        x[dark] = 0
        x.requires_grad_()
        loss = sam(x, y)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in sam.parameters())


# modules


def test_parameters():
    assert n_params(PAM(512)) == n_params(SAM(512)) == 65_664
    assert set(dict(SAM(64).named_children())) == {'pam'}
    assert PAM(4)(torch.rand(2, 4, 3, 3)).shape == (2, 9)  # narrower than r


@pytest.mark.parametrize('size', [(16, 8), (16, 16), (24, 8), (3, 5)], ids=str)
@pytest.mark.parametrize('released', [False, True])
def test_any_grid(size, released):
    sam, x, y = (
        SAM(16, released=released),
        torch.rand(6, 16, *size, requires_grad=True),
        torch.tensor([0, 1, 0, 2, 0, 1]),
    )
    loss = sam(x, y)
    loss.backward()
    assert loss.isfinite() and x.grad.abs().sum() > 0


def test_gradient():
    sam, y = SAM(8).double(), torch.tensor([0, 0, 1, 2])
    x = torch.rand(4, 8, 2, 2, dtype=torch.double, requires_grad=True)
    for sam.released in (False, True):
        assert gradcheck(lambda x, *_: sam(x, y), (x, *sam.parameters()))


def test_the_full_table_is_never_kept():
    "Nothing of the size B·B·N·N is kept for the backward pass: at batch 64 of 16×8 that would be 268 MB."
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t
        return t

    x = torch.rand(16, 4, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = SAM(4, r=1)(x, torch.arange(16) // 2)
    assert sum(t.untyped_storage().nbytes() for t in saved.values()) < 16 * 16 * 64 * 64 * 4 / 8
    loss.backward()


# the fast form


def plain(x):
    return torch.einsum('icr,jcq->ijrq', x.flatten(2), x.flatten(2)).max(-1).values


@pytest.mark.parametrize('B, block', [(1, 4), (6, 1), (6, 4), (7, 3), (5, 9)])
@pytest.mark.parametrize('neg', [0.0, 1.0])
def test_blocks_equal_the_plain_form(B, block, neg):
    g = torch.Generator().manual_seed(B)
    x, y = torch.rand(B, 6, 4, 3, generator=g, dtype=torch.double).requires_grad_(), torch.randint(3, (B,), generator=g)
    pam = PAM(6).double()

    def whole(a):
        loss = alignment(pam(x), a, y, 1.0, neg)
        return loss, *torch.autograd.grad(loss, (x, *pam.parameters()))

    for turn in (lambda a: a, lambda a: a.transpose(0, 1)):
        assert_close(whole(turn(activation_vectors(x, block=block))), whole(turn(plain(x))), rtol=0, atol=1e-10)
    assert_close(activation_vectors(x, True, block), plain(x).transpose(0, 1), rtol=0, atol=1e-12)


def test_autocast_is_computed_in_single_precision():
    torch.manual_seed(0)
    sam, x, y = SAM(16), torch.rand(6, 16, 4, 4), torch.arange(6) // 2

    def step(x, auto=False):
        x = x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=auto):
            loss = sam(x, y)
        loss.backward()
        return loss.detach(), x.grad

    want, got = step(x), step(x, auto=True)
    assert_close(got, want, rtol=0, atol=0)
    loss, grad = step(x.bfloat16())
    assert loss.dtype == torch.float and grad.dtype == torch.bfloat16 and abs(loss - want[0]) < 0.02


def test_no_grad_and_a_frozen_map():
    sam, x, y = SAM(8), torch.rand(4, 8, 3, 2), torch.tensor([0, 0, 1, 1])
    with torch.no_grad():
        still = sam(x, y)
    loss = sam(x, y)
    loss.backward()  # only the module learns
    assert_close(still, loss.detach())
    assert all(p.grad.isfinite().all() for p in sam.parameters())


# the rows of Table 5


def group_loop(a, y, pos, neg):
    S = lambda v, w: F.cosine_similarity(v, w, dim=0)
    total = 0.0
    for i in range(len(y)):
        for weight, group in (
            (pos, [j for j in range(len(y)) if y[j] == y[i]]),
            (neg, [j for j in range(len(y)) if y[j] != y[i]]),
        ):
            total += weight * sum(1 - S(a[i, j], a[i, k]) for j in group for k in group) / max(1, len(group)) ** 2
    return total / len(y)


@pytest.mark.parametrize('y', [[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 2, 1, 0, 1, 3], [4] * 8, list(range(8))], ids=str)
@pytest.mark.parametrize('w', [(1, 1), (1, 0), (0, 1), (0.5, 2)], ids=str)
def test_pairs_without_pam(y, w):
    a = torch.rand(8, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    assert_close(pairwise(a, torch.tensor(y), *w), group_loop(a, y, *w), rtol=0, atol=1e-12)
    assert_close(unified(a), group_loop(a, [0] * 8, 1, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize('name', ALIGN)
@pytest.mark.parametrize('centred', [False, True])
def test_every_row_has_gradients_and_only_pam_has_parameters(name, centred):
    y, x = torch.tensor([0, 0, 1, 2]), torch.rand(4, 8, 2, 3, dtype=torch.double, requires_grad=True)
    for released in (False, True):
        sam = ALIGN[name](8, released=released, centred=centred).double()
        assert (n_params(sam) > 0) == (name == 'pam')
        assert gradcheck(lambda x, *_: sam(x, y), (x, *sam.parameters()))
        assert sam(x[:1], y[:1]).isfinite()
        sam.load_state_dict(sam.state_dict())


def test_centred_vectors_ignore_a_constant():
    a = torch.rand(4, 4, 6, dtype=torch.double)
    assert_close(center(a + 7), center(a))
    assert_close(unified(center(a + 7)), unified(center(a)))
    assert unified(a + 7) < unified(a) / 10


def test_on_osnet():
    net, y = build_baseline('osnet', n_ids=2), torch.tensor([0, 0, 1, 1])
    for make in ALIGN.values():
        net.zero_grad()
        make(net.backbone.channels[-1])(net(torch.randn(4, 3, 64, 32)).maps[-1], y).backward()
        assert net.backbone.stem.conv.conv.weight.grad.abs().sum() > 0
