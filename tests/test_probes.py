"Claims about a search: random genotypes, genotypes in a supernet, intervals, paired differences, measures with masks."

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.testing import assert_close

from msinet.config import SEARCH, TABLE1, TRAIN
from msinet.core import set_seed
from msinet.errors import InputError
from msinet.paper.evidence import background_drift, bootstrap_means, swap_background, mean_ci, object_gain
from msinet.paper.evidence import object_gains, paired
from msinet.paper.evidence import rank_correlation
from msinet.necks import BNNeck, FBLNeck, ReIDNet
from msinet.paper.probes import batches_per_epoch, discretisation_gap, held_out, own_stats
from msinet.paper.probes import random_search, evaluate_genotype, search_passes, twin_loss, random_genotypes
from msinet.training.oneshot import with_genotype
from msinet.training.search import split_twins
from msinet.space import Mixed, alphas, check_genotype, subnet_state_dict, derived, genotype, supernet
from msinet.rendering.world import mask, render, synth
from msinet.tcm import Memory

WIDTHS = (8, 16, 24, 32)


@pytest.fixture
def net():
    set_seed(0)
    n = ReIDNet(supernet(WIDTHS), BNNeck(WIDTHS[1:]))
    for m in n.modules():
        if isinstance(m, Mixed):
            nn.init.normal_(m.alpha)
            nn.init.constant_(m.ops['A'].gamma, 0.5)
    return n


# random genotypes


def test_random_genotypes_are_valid_and_differ():
    ws = random_genotypes(500, 1)
    assert len({*ws}) == 500 and all(check_genotype(w) == w for w in ws)
    assert random_genotypes(20, 1) == ws[:20] and random_genotypes(20, 2) != ws[:20]
    assert not {*random_genotypes(500, 1, exclude=ws[:10])} & {*ws[:10]}
    for n in (-1, 4**12 + 1):
        with pytest.raises(InputError, match='expected 0 to'):
            random_genotypes(n)
    with pytest.raises(InputError):
        random_genotypes(1, exclude=['GGX'])


# genotypes in a supernet


def test_alpha_comes_back_even_after_an_error(net):
    before = alphas(net)
    with pytest.raises(RuntimeError):
        with with_genotype(net, 'A' * 12):
            assert genotype(net) == 'A' * 12 and (alphas(net).softmax(1)[:, 3] == 1).all()
            raise RuntimeError
    assert torch.equal(alphas(net), before)


@pytest.mark.parametrize('letters', [TABLE1, 'N' * 12, *random_genotypes(3, 5)])
def test_a_genotype_in_the_supernet_is_the_derived_network(net, letters):
    net.eval()
    x = torch.randn(2, 3, 64, 32)
    alone = derived(letters, WIDTHS).eval()
    alone.load_state_dict(subnet_state_dict(net.backbone, letters))
    with torch.no_grad():
        assert torch.equal(evaluate_genotype(net, letters, lambda n: n.backbone(x)[-1]), alone(x)[-1])


@pytest.mark.parametrize('training', [True, False])
def test_own_statistics_are_means_over_batches_and_are_removed(net, training):
    net.train(training)
    batches, before = (
        [(torch.randn(8, 3, 32, 16), None) for _ in range(3)],
        {k: v.clone() for k, v in net.state_dict().items()},
    )
    with own_stats(net, batches):
        assert net.training == training
        bn, conv = net.backbone.stem.conv.bn, net.backbone.stem.conv.conv
        with torch.no_grad():
            assert_close(
                bn.running_mean,
                torch.stack([conv(x).mean((0, 2, 3)) for x, _ in batches]).mean(0),
                rtol=1e-4,
                atol=1e-5,
            )
    assert net.training == training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_loss_updates_nothing_and_the_gap_is_zero_for_a_hard_choice(net):
    batch = torch.randn(8, 3, 32, 16), torch.arange(4).repeat_interleave(2)
    memory = Memory(4, 32)
    memory.fill(torch.randn(8, 32), batch[1])
    before, c = {k: v.clone() for k, v in net.state_dict().items()}, memory.c.clone()
    loss = lambda n: twin_loss(n, memory, [batch])
    t = discretisation_gap(net, dict(loss=loss), batches=[batch])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and torch.equal(memory.c, c)
    assert t.gap['loss'] == t.hard['loss'] - t.soft['loss'] != 0
    assert t.hard['loss'] == evaluate_genotype(net, genotype(net), loss, [batch])
    with with_genotype(net, TABLE1):
        assert discretisation_gap(net, dict(loss=loss), TABLE1).gap['loss'] == 0


# budgets


def test_held_out_identities_are_new_to_training_and_to_the_test_set():
    data = synth(n_ids=12, n_test=4, cams=4)
    for seed in range(3):
        inner = held_out(data, 0.25, seed)
        tr, q, g, t = ({i.pid for i in items} for items in (inner.train, inner.query, inner.gallery, data.query))
        assert len(q) == 3 and q == g and not tr & q and not q & t and tr | q == {i.pid for i in data.train}
        assert sorted(inner.train + inner.query + inner.gallery) == sorted(data.train)
    for share in (0.0, 0.1, 0.95):
        with pytest.raises(InputError, match='holds out'):
            held_out(data, share)


def test_passes_count_batches():
    data, cfg = synth(n_ids=8, n_test=4, cams=4), SEARCH['smoke']
    n = batches_per_epoch(split_twins(data.train, cfg.overlap, cfg.seed, cfg.released_split)[0], cfg)
    assert (
        search_passes(cfg, data) == 2 * cfg.epochs * n
        and search_passes(replace(cfg, unrolled=True), data) == 5 * cfg.epochs * n
    )


def test_random_search_stays_within_its_budget(tmp_path):
    cfg = replace(TRAIN['smoke'], lambda_sa=0.0, epochs=3, out=str(tmp_path / 'r'))
    found = random_search(cfg, 2, seed=4)
    assert (
        found.epochs == 1
        and {*found.table.index} == {*random_genotypes(2, 4)}
        and found.genotype == found.table.mAP.idxmax()
    )
    assert {p.name for p in (tmp_path / 'r').iterdir()} == {*random_genotypes(2, 4)}
    again = random_search(replace(cfg, out=str(tmp_path / 'again')), 2, seed=4)
    assert again.table.equals(found.table)
    for k in (0, 4):
        with pytest.raises(InputError, match='expected at least one genotype'):
            random_search(cfg, k)


# intervals


def test_mean_interval_is_students():
    for v in ([1.0, 2.0], [3.0, 1.0, 4.0, 1.0, 5.0]):
        i = mean_ci(v, 0.9)
        low, high = stats.t.interval(0.9, len(v) - 1, np.mean(v), stats.sem(v))
        assert np.allclose(i[:3], (np.mean(v), low, high)) and i.n == len(v)
    for v in ([1.0], [], [1.0, float('nan')]):
        with pytest.raises(InputError):
            mean_ci(v)


def test_paired_is_the_mean_over_common_queries_and_draws_identities():
    r = np.random.default_rng(0)
    a, b, who = r.random(60), r.random(60), np.repeat(np.arange(15), 4)
    a[3] = b[7] = np.nan
    i, back = paired(a, b, who), paired(b, a, who)
    assert np.isclose(i.value, np.nanmean(a - b)) and i.n == 15 and i.low < i.value < i.high
    assert np.allclose(back[:3], (-i.value, -i.high, -i.low), atol=1e-2)
    assert paired(a, b, who) == i and paired(a, a, who)[:3] == (0, 0, 0)
    same = np.repeat(r.random(15), 4)  # four copies of each identity's one difference are no more evidence than one
    assert np.allclose(paired(same, np.zeros(60), who)[:3], paired(same[::4], np.zeros(15), np.arange(15))[:3])
    with pytest.raises(InputError, match='as many'):
        paired(a, b[:-1], who)
    with pytest.raises(InputError, match='none of'):
        paired(a * np.nan, b, who)


def test_draws_against_a_loop():
    v, who = np.array([0.1, 0.3, -0.2, 0.5]), np.array([9, 9, 4, 7])
    pick = np.random.default_rng(3).integers(3, size=(50, 3))
    groups = [v[who == g] for g in (4, 7, 9)]
    assert np.allclose(
        bootstrap_means(v, who, 50, 3), [np.concatenate([groups[k] for k in row]).mean() for row in pick]
    )


def test_rank_correlation_counts_pairs():
    r = np.random.default_rng(1)
    a = r.normal(size=15)
    b = a + r.normal(size=15)
    loop = np.mean([np.sign((a[i] - a[j]) * (b[i] - b[j])) for i, j in combinations(range(15), 2)])
    i = rank_correlation(a, b, n=200)
    assert np.isclose(i.value, loop) and i.low < i.value < i.high and rank_correlation(-a, b, n=50).value == -i.value
    assert np.isclose(
        rank_correlation(a, b, stats.spearmanr, n=50).value, np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1]
    )
    for x, y in (([1, 2, 3], [1, 2, 3]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2, 3, 4], [1, 2, 3])):
        with pytest.raises(InputError, match='expected'):
            rank_correlation(x, y)


# masks and backgrounds


@pytest.mark.parametrize('kind', ['person', 'vehicle'])
def test_elsewhere_keeps_the_object_and_changes_the_rest(kind):
    for item in synth(kind, n_ids=4, n_test=2, cams=4).train[::7]:
        m, own = mask(item), render(item.path).astype(int)
        for c in range(1, 5):
            if c == item.cam:
                continue
            p = swap_background(item, c)
            off = np.abs(p.astype(int) - own).mean(-1)
            assert (
                p.shape == own.shape
                and p.dtype == np.uint8
                and off[m == 1].mean() < 8
                and off[m == 0].mean() > off[m == 1].mean()
            )
            assert np.array_equal(p, swap_background(item, c))


def test_only_rendered_images_get_another_background(tmp_path):
    with pytest.raises(InputError, match='is not the name of a rendered image'):
        swap_background(str(tmp_path / '0001_c1.jpg'), 2)
    data = synth(n_ids=4, n_test=2)
    with pytest.raises(InputError, match='two or more'):
        background_drift(nn.Identity(), [i for i in data.train if i.cam == data.train[0].cam])


def test_gain_of_constant_and_of_perfect_maps():
    m = torch.zeros(2, 16, 8)
    m[0, 4:12, 2:6], m[1, :, :4] = 1, 1
    assert_close(object_gain(torch.ones(2, 4, 2), m), torch.ones(2))
    assert_close(object_gain(m, m), 1 / m.mean((1, 2)))
    assert_close(object_gain(3 * m, m), object_gain(m, m))


def test_both_measures_give_a_value_per_image():
    items = synth(n_ids=4, n_test=2, cams=4).train[::4]
    net = ReIDNet(derived(TABLE1, WIDTHS), FBLNeck(WIDTHS[1:])).eval()
    gains, drift = object_gains(net, items, (64, 32)), background_drift(net, items)
    assert gains.shape == drift.shape == (12,) and (gains > 0).all() and (drift > 0).all() and (drift < 2).all()
    assert np.allclose(drift, background_drift(net, items, bs=5), atol=1e-6)
    scaled = background_drift(net, items, scaled=True)
    with pytest.raises(InputError, match='one identity'):
        background_drift(net, [i for i in items if i.pid == items[0].pid], scaled=True)
    assert np.allclose(scaled / drift, (scaled / drift)[0]) and (scaled > drift).all()
