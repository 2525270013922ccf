"Twin splits and memories: released numbers, other orders, other labels, mistakes."

import copy
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from msinet.backbones import network
from msinet.config import SEARCH
from msinet.data.items import Item, relabel
from msinet.engine.loop import RunContext
from msinet.errors import InputError
from msinet.tcm import Memory, released_split, rounds, twin_split
from msinet.training.search import build_search, search
from msinet.engine.learner import trainable_params
from msinet.weights import open_net, save_weights

GOLD = Path(__file__).parent / 'golden'
G = {k: torch.from_numpy(v) for k, v in np.load(GOLD / 'e_memory.npz').items() if v.dtype.kind in 'fi'}


def ids(items):
    return {t.pid for t in items}


def make(n=30, least=2, most=9, seed=0):
    r = random.Random(seed)
    return [Item(f'{100 + 3 * i}_{k}', 100 + 3 * i, k % 4) for i in range(n) for k in range(r.randint(least, most))]


# the twins


@pytest.mark.parametrize('overlap', [0, 0.1, 0.25, 0.4, 0.5, 0.9, 1.0])
@pytest.mark.parametrize('seed', [0, 1, 7])
def test_every_image_is_in_one_twin_and_the_overlap_is_as_given(overlap, seed):
    items = make()
    train, val = twin_split(items, overlap, seed)
    assert all(isinstance(t, Item) for t in train + val)
    assert sorted(train + val) == sorted(items) and not set(train) & set(val)
    shared = ids(train) & ids(val)
    assert len(shared) == round(overlap * 30)
    assert abs(len(ids(train)) - len(ids(val))) <= 1
    for i in shared:
        assert abs(sum(t.pid == i for t in train) - sum(t.pid == i for t in val)) <= 1


def test_only_the_seed_decides_identities_and_halves():
    items, state = make(), random.getstate()
    assert twin_split(items) == twin_split(items, 0.4, 0)
    random.seed(99)
    assert twin_split(items) == twin_split(list(items))
    random.setstate(state)
    splits = [twin_split(items, 0.4, s) for s in range(4)]
    assert len({tuple(sorted(ids(t) & ids(v))) for t, v in splits}) > 1
    halves = [twin_split(items, 1, s)[0] for s in range(4)]
    assert len({tuple(h) for h in halves}) > 1


def test_halves_are_not_in_file_order():
    items = [
        Item(f'{i}_{k:02}', i, k // 10) for i in range(20) for k in range(20)
    ]  # ten images of camera 0, then ten of 1
    share = np.mean([t.cam == 0 for t in twin_split(items, 1)[0]])
    assert 0.35 < share < 0.65
    assert all(t.cam == 0 for t in released_split(items)[0] if 4 <= t.pid < 12)


def test_market_sized_numbers():
    items = [Item(f'{i}_{k}', i) for i in range(1041) for k in range(2)]
    train, val = twin_split(items)
    assert (len(ids(train)), len(ids(val)), len(ids(train) & ids(val))) == (729, 728, 416)
    train, val = released_split(items)
    assert (len(ids(train)), len(ids(val)), len(ids(train) & ids(val))) == (624, 833, 416)


def test_single_images_are_never_shared():
    items = make(10, 3, 5) + [Item(f's{i}', 1000 + i) for i in range(10)]
    for seed in range(5):
        train, val = twin_split(items, 0.5, seed)
        assert len(ids(train) & ids(val)) == 10 and max(ids(train) & ids(val)) < 1000
    with pytest.raises(InputError, match='found 10 identities with two or more images'):
        twin_split(items, 0.55)


@pytest.mark.parametrize('n, overlap', [(10, -0.1), (10, 1.01), (10, float('nan')), (0, 0.4), (1, 1), (2, 0), (3, 0)])
def test_an_impossible_split_raises(n, overlap):
    with pytest.raises(InputError) as e:
        twin_split(make(n), overlap)
    assert '\n' not in str(e.value) and 'expected' in str(e.value)


def test_smallest_split():
    assert [len(ids(t)) for t in twin_split(make(4), 0)] == [2, 2]
    assert [len(ids(t)) for t in twin_split(make(2), 1)] == [2, 2]


def test_released_split_golden():
    g = json.loads((GOLD / 'h_schedule_split.json').read_text())['split']
    data = [Item(*t) for t in g['data']]
    train, val = released_split(data)
    assert [tuple(t) for t in g['train']] == list(train)
    labels, _ = relabel(val)
    assert [tuple(t) for t in g['valid']] == [(t.path, y, t.cam) for t, y in zip(val, labels)]
    assert (len(ids(train)), len(ids(val))) == (g['num_train'], g['num_valid'])


def test_released_split_small():
    with pytest.raises(InputError):
        released_split(make(4))
    train, val = released_split([Item(str(i), i) for i in range(10)])  # one image each: the shared ones can't be halved
    assert ids(train) == {0, 1} and ids(val) == set(range(2, 10))


# the memory


def loop(c, f, y, beta):
    c = c.clone()
    for g, j in zip(F.normalize(f), y):
        c[j] = F.normalize(beta * c[j] + (1 - beta) * g, dim=0)
    return c


@pytest.mark.parametrize('case', ['zeros', 'filled'])
def test_memory_golden(case):
    m = Memory(7, 12, float(G['temperature']), float(G['momentum'])).double()
    m.c.copy_(G[f'{case}.memory0'])
    for s in ('step0', 'step1'):
        g = {k: G[f'{case}.{s}.{k}'] for k in ('x', 'labels', 'loss', 'grad_x', 'memory_after')}
        x = g['x'].clone().requires_grad_()
        loss = m.loss(x, g['labels'])
        loss.backward()
        assert_close(loss.detach(), g['loss'], rtol=1e-6, atol=0)
        assert_close(x.grad, g['grad_x'], rtol=0, atol=1e-6 * max(1, g['grad_x'].norm().item()))
        m.update(x, g['labels'])
        assert_close(m.c, g['memory_after'], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    'y',
    [
        [i for i in range(16) for _ in range(4)],
        [3] * 40,
        [random.Random(0).randrange(6) for _ in range(50)],
        list(range(20)),
        [],
    ],
    ids=['P×K', 'all the same', 'random', 'all different', 'empty'],
)
@pytest.mark.parametrize('beta', [0.0, 0.2, 1.0])
def test_update_equals_one_by_one(y, beta):
    g = torch.Generator().manual_seed(1)
    c, f, y = (
        F.normalize(torch.randn(20, 16, generator=g, dtype=torch.double)),
        torch.randn(len(y), 16, generator=g, dtype=torch.double),
        torch.tensor(y, dtype=torch.long),
    )
    m = Memory(20, 16, beta=beta).double()
    m.c.copy_(c)
    m.update(f, y)
    assert_close(m.c, loop(c, f, y, beta), rtol=0, atol=1e-15)


def test_rounds_cover_the_batch_in_order():
    y = torch.randint(5, (40,), generator=torch.Generator().manual_seed(2))
    found = rounds(y)
    assert sorted(torch.cat(found).tolist()) == list(range(40))
    for r in found:
        assert len(y[r].unique()) == len(r)
    for j in range(5):
        assert [int(p) for r in found for p in r if y[p] == j] == (y == j).nonzero()[:, 0].tolist()


def test_fill_takes_centroids():
    f, y = torch.randn(30, 8, dtype=torch.double), torch.arange(30) % 5
    m = Memory(6, 8).double()
    m.c.fill_(9)
    m.fill(f, y)
    want = torch.stack([F.normalize(F.normalize(f[y == j]).mean(0), dim=0) for j in range(5)])
    assert_close(m.c[:5], want)
    assert (m.c[5] == 0).all()
    before = m.c.clone()
    m.fill(7 * f, y)
    assert_close(m.c, before)


def test_loss_is_the_equation_and_its_gradient_is_right():
    m = Memory(5, 6).double()
    m.fill(torch.randn(20, 6), torch.arange(20) % 5)
    f, y = torch.randn(7, 6, dtype=torch.double, requires_grad=True), torch.randint(5, (7,))
    e = (F.normalize(f) @ m.c.T / 0.05).exp()
    assert_close(m.loss(f, y), -(e[range(7), y] / e.sum(1)).log().mean())
    assert_close(m.scores(f).argmax(1), e.argmax(1))
    assert gradcheck(m.loss, (f, y))


def test_an_update_does_not_change_the_gradient_of_an_earlier_loss():
    m = Memory(5, 6)
    m.fill(torch.randn(20, 6), torch.arange(20) % 5)
    f, y = torch.randn(7, 6, requires_grad=True), torch.randint(5, (7,))
    (want,) = torch.autograd.grad(m.loss(f, y), f)
    loss = m.loss(f, y)
    m.update(f, y)
    loss.backward()
    assert_close(f.grad, want)
    assert not m.c.requires_grad and not f.grad.isnan().any()


def test_zeros_give_no_nan():
    m = Memory(4, 3)
    f = torch.zeros(4, 3, requires_grad=True)
    loss = m.loss(f, torch.arange(4))
    loss.backward()
    assert_close(loss.item(), math.log(4), rtol=1e-6, atol=0)
    assert (f.grad == 0).all()
    m.update(f, torch.tensor([0, 0, 1, 2]))
    assert (m.c == 0).all()
    m.fill(torch.tensor([[1.0, 0, 0], [-1, 0, 0]]), torch.tensor([1, 1]))
    assert (m.c == 0).all()  # opposite images cancel
    m.update(torch.tensor([[0.0, 3, 4]]), torch.tensor([1]))
    assert_close(m.c[1], torch.tensor([0, 0.6, 0.8]))
    m.update(torch.zeros(1, 3), torch.tensor([1]))
    assert_close(m.c[1], torch.tensor([0, 0.6, 0.8]))


@pytest.mark.parametrize('bad', [[0, 7], [-1, 0]], ids=str)
def test_memory_labels_out_of_range(bad):
    m = Memory(7, 3)
    before = m.c.clone()
    for f in (m.fill, m.loss, m.update):
        with pytest.raises(InputError, match='expected 0 to 6'):
            f(torch.randn(2, 3), torch.tensor(bad))
    assert_close(m.c, before)


def test_memory_is_state():
    m = Memory(5, 6)
    m.fill(torch.randn(20, 6), torch.arange(20) % 5)
    other = Memory(5, 6)
    other.load_state_dict(copy.deepcopy(m.state_dict()))
    for k in (m, other):
        torch.manual_seed(3)
        k.update(torch.randn(9, 6), torch.randint(5, (9,)))
    assert_close(other.c, m.c, rtol=0, atol=0)
    assert m.c.shape == (5, 6) and not list(m.parameters()) and m.half().c.dtype == torch.half


def test_features_of_another_precision():
    m = Memory(5, 6)
    f, y = torch.randn(5, 6), torch.arange(5)
    m.fill(f.bfloat16(), y)
    m.update(f.double(), y)
    assert m.loss(f.bfloat16(), y).dtype == m.c.dtype == torch.float


@pytest.mark.parametrize('beta', [0.0, 0.2, 1.0])
def test_groups_equal_one_by_one(beta):
    g = torch.Generator().manual_seed(4)
    c, f, y = (
        F.normalize(torch.randn(20, 16, generator=g, dtype=torch.double)),
        torch.randn(64, 16, generator=g, dtype=torch.double),
        torch.randperm(20, generator=g)[:16].repeat_interleave(4),
    )
    m = Memory(20, 16, beta=beta).double()
    m.c.copy_(c)
    m.update(f, y, K=4)
    assert_close(m.c, loop(c, f, y, beta), rtol=0, atol=1e-15)


@pytest.mark.parametrize('y, K', [([0, 0, 1], 2), ([0, 0, 1, 0], 2), ([0, 0, 1, 1, 0, 0], 2)], ids=str)
def test_labels_not_in_groups_raise(y, K):
    m = Memory(3, 4)
    with pytest.raises(InputError, match='not groups of 2'):
        m.update(torch.randn(len(y), 4), torch.tensor(y), K)
    assert (m.c == 0).all()


def test_rounds_only_get_shorter():
    y = torch.randint(9, (50,), generator=torch.Generator().manual_seed(5))
    found = rounds(y)
    for a, b in zip(found, found[1:]):
        assert (y[b] == y[a][: len(b)]).all()


def test_an_update_writes_into_the_table():
    m = Memory(5, 6)
    m.fill(torch.randn(20, 6), torch.arange(20) % 5)
    c, before = m.c, m.c.clone()
    m.update(torch.randn(3, 6), torch.tensor([1, 4, 1]))
    assert m.c is c and (c[[0, 2, 3]] == before[[0, 2, 3]]).all() and (c[[1, 4]] != before[[1, 4]]).any(1).all()


# ablations of the search

SMOKE = replace(SEARCH['smoke'], epochs=2, evaluate=False)


@pytest.mark.parametrize('overlap', [1.0, 0.75, 0.5, 0.25, 0.0])
def test_every_overlap_searches(overlap, tmp_path):
    found = search(replace(SMOKE, epochs=1, overlap=overlap, out=str(tmp_path / 'run')))
    assert np.isfinite(found.history[0]['val']) and found.alphas.shape == (1, 12, 4)


def test_a_classifier_needs_the_same_identities(tmp_path):
    for overlap in (0.75, 0.0):
        with pytest.raises(InputError, match='objective ce found') as e:
            search(replace(SMOKE, objective='ce', overlap=overlap, out=str(tmp_path / 'run')))
        assert '\n' not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_one_classifier_is_trained_with_omega_alone(tmp_path):
    cfg = replace(SMOKE, objective='ce', overlap=1.0, device='cpu', out=str(tmp_path / 'run'))
    with RunContext(cfg, 'search') as run:
        run.load()
        step, loader = build_search(run)
    assert step.c_tr is step.c_val and any(p is step.c_tr.classifier.weight for p in trainable_params(step.opt_omega))
    w = step.c_tr.classifier.weight.detach().clone()
    step.alpha()
    assert torch.equal(step.c_tr.classifier.weight, w) and step.c_tr.classifier.weight.grad is None
    step.omega(next(iter(loader)))
    assert not torch.equal(step.c_tr.classifier.weight, w)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    return search(replace(SMOKE, out=str(tmp_path_factory.mktemp('plain') / 'run'))).alphas


@pytest.mark.parametrize(
    'ablation',
    [
        dict(objective='ce', overlap=1.0),
        dict(unrolled=True, cost=0.5),
        dict(unrolled=True, alpha_first=True, fuse='multiply'),
    ],
    ids=str,
)
def test_ablations_resume_bit_for_bit(ablation, plain, tmp_path):
    cfg = replace(SMOKE, **ablation)
    whole = search(replace(cfg, out=str(tmp_path / 'whole')))
    search(replace(cfg, out=str(tmp_path / 'part'), epochs=1, milestones=()))
    again = search(replace(cfg, out=str(tmp_path / 'part'), resume=True))
    assert np.array_equal(whole.alphas, again.alphas)
    assert all(torch.equal(a, b) for a, b in zip(whole.net.state_dict().values(), again.net.state_dict().values()))
    assert not np.array_equal(whole.alphas, plain)


def test_a_cost_lowers_the_share_of_attention(tmp_path):
    share = lambda cost: (
        np.exp(
            a := search(replace(SMOKE, cost=cost, epochs=4, lr_alpha=0.1, out=str(tmp_path / f'run{cost}'))).alphas[-1]
        )[:, 3].sum()
        / np.exp(a).sum()
    )
    assert share(100.0) < share(0.0)


@pytest.mark.parametrize(
    'wrong', [dict(unrolled=True, leak=True, alpha_first=True), dict(objective='softmax'), dict(fuse='concat')], ids=str
)
def test_ablations_that_exclude_each_other_raise(wrong, tmp_path):
    with pytest.raises(InputError, match='expected'):
        search(replace(SMOKE, out=str(tmp_path / 'run'), **wrong))
    assert list(tmp_path.iterdir()) == []


def test_old_weights_without_fuse_are_sums(tmp_path):
    net = network('msinet', 'N' * 12, (8, 16, 24, 32), 3, (64, 32), 4)
    save_weights(
        net,
        tmp_path / 'old.safetensors',
        dict(kind='derived', backbone='msinet', genotype='N' * 12, channels=(8, 16, 24, 32), rho=3, size=(64, 32)),
    )
    opened = open_net(tmp_path / 'old.safetensors')[0]
    assert all(c.fuse is torch.add for c in opened.backbone.cells)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), opened.state_dict().values()))
