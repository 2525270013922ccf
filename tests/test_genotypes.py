"Genotypes measured in one supernet: rows that survive a break, effects of known size, intervals that hold, agreement."

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from msinet.config import SEARCH, SMOKE_SYNTH, TABLE1
from msinet.core import set_seed
from msinet.data.sets import get_data
from msinet.errors import InputError
from msinet.figures.panels import distribution_figure
from msinet.ops import OPS
from msinet.paper.additive import additive_model, cell_code, count_code, Effects, effects_figure, letter_effects
from msinet.paper.additive import slot_code, unseen_r2
from msinet.paper.genotypes import agreement, agreement_by_chance, evaluate_genotypes, GenotypeScores
from msinet.paper.genotypes import percentile_rank, read_genotype_scores, reliability
from msinet.retrieval.evaluate import evaluate
from msinet.space import Mixed
from msinet.training.oneshot import evaluate_genotype, random_genotypes, stats_batches, supernet_with_neck

SIZE = (64, 32)


# rows


@pytest.fixture(scope="module")
def net():
    set_seed(0)
    net = supernet_with_neck((8, 16, 24, 32), n_ids=8)
    for m in net.modules():
        if isinstance(m, Mixed):
            nn.init.constant_(m.ops["A"].gamma, 0.5)
    return net.eval()


@pytest.fixture(scope="module")
def data():
    return get_data(SMOKE_SYNTH, SIZE)


@pytest.fixture(scope="module")
def batches(data):
    return stats_batches(data.train, SEARCH["smoke"].batches, n=2)


def test_a_row_is_what_evaluate_says(net, data, batches, tmp_path):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    gs = [TABLE1, "E" * 12]
    got = evaluate_genotypes(net, gs, data, SIZE, tmp_path / "j.jsonl", batches)
    for g, ap in zip(gs, got.ap):
        want = evaluate_genotype(net, g, lambda n: evaluate(n, data, SIZE).ap, batches)
        np.testing.assert_allclose(ap, want, atol=5.1e-5)
    assert got.pid.tolist() == [i.pid for i in data.query] and got.genotypes == gs
    assert got.mean_ap == pytest.approx(got.ap.mean(1))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_break_costs_the_genotype_that_was_measured(net, data, batches, tmp_path):
    file, gs = tmp_path / "j.jsonl", random_genotypes(4)
    whole = evaluate_genotypes(net, gs, data, SIZE, tmp_path / "whole.jsonl", batches)

    def stop(done, n):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_genotypes(net, gs, data, SIZE, file, batches, say=stop)
    text = file.read_text()
    file.write_text(text + text.splitlines()[-1][:40])  # killed within a line
    went = []
    again = evaluate_genotypes(net, gs, data, SIZE, file, batches, say=lambda *k: went.append(k))
    assert went == [(3, 4), (4, 4)]
    assert np.array_equal(whole.ap, again.ap) and np.array_equal(read_genotype_scores(file).of(gs).ap, whole.ap)
    before = file.read_bytes()
    evaluate_genotypes(net, gs[:2] * 2, data, SIZE, file, batches)
    assert file.read_bytes() == before


@pytest.mark.parametrize("other", ["net", "batches", "set", "size"])
def test_rows_of_something_else_are_not_continued(other, net, data, batches, tmp_path):
    args = dict(net=net, data=data, size=SIZE, batches=batches)
    evaluate_genotypes(net, [TABLE1], data, SIZE, file := tmp_path / "j.jsonl", batches)
    set_seed(1)
    change = dict(
        net=lambda: dict(net=supernet_with_neck((8, 16, 24, 32), n_ids=8)),
        batches=lambda: dict(batches=batches[:1]),
        set=lambda: dict(data=get_data(SMOKE_SYNTH + ",seed=1", SIZE)),
        size=lambda: dict(size=(32, 16)),
    )[other]()
    with pytest.raises(InputError, match="measured with another .*expected the same") as e:
        evaluate_genotypes(genotypes=["E" * 12], file=file, **args | change)
    assert "\n" not in str(e.value) and len(file.read_text().splitlines()) == 2


def test_files_and_genotypes_that_are_not_there(net, data, batches, tmp_path):
    with pytest.raises(InputError, match="holds no measured genotypes"):
        read_genotype_scores(tmp_path / "none.jsonl")
    (tmp_path / "head.jsonl").write_text(json.dumps(dict(net="x", pid=[1, 2])) + "\n")
    with pytest.raises(InputError, match="holds no measured genotypes"):
        read_genotype_scores(tmp_path / "head.jsonl")
    with pytest.raises(InputError, match="expected 12"):
        evaluate_genotypes(net, ["GGE"], data, SIZE, tmp_path / "j.jsonl", batches)
    assert not (tmp_path / "j.jsonl").exists()
    with pytest.raises(InputError, match="1 genotypes were not measured, such as N"):
        GenotypeScores([TABLE1], np.zeros((1, 2)), np.arange(2)).of([TABLE1, "N" * 12])


# the additive model


def made_up(n=200, ids=30, noise=4.0, seed=0):
    "Genotypes, their APs in points, identities, and the true effects (12, 4)."
    r = np.random.default_rng(seed)
    truth = r.normal(0, 1, (12, 4))
    truth -= truth.mean(1, keepdims=True)
    gs, pid = random_genotypes(n, seed), np.repeat(np.arange(ids), 4)
    ap = 50 + slot_code(gs) @ truth.ravel()
    return gs, ap[:, None] + r.normal(0, 20, ids)[pid] + r.normal(0, noise, (n, 4 * ids)), pid, truth


def test_codes():
    x = slot_code([TABLE1, "N" * 12])
    assert x.shape == (2, 48) and abs(x.reshape(2, 12, 4).sum(2)).max() == 0
    assert count_code([TABLE1]).tolist() == [[TABLE1.count(k) - 3 for k in OPS]]
    p = cell_code(random_genotypes(3))[:, 48:].reshape(3, 6, 4, 4)
    assert p.shape == (3, 6, 4, 4) and abs(p.sum(2)).max() < 1e-12 and abs(p.sum(3)).max() < 1e-12
    one = dict(zip(OPS, range(4)))
    for c in range(6):  # G in slot 1, E in slot 2 of Table 1's genotype, and so on
        a, b = one[TABLE1[2 * c]], one[TABLE1[2 * c + 1]]
        got = cell_code([TABLE1])[0, 48:].reshape(6, 4, 4)[c]
        assert got[a, b] == 0.75 * 0.75 and (got > 0.5).sum() == 1


@pytest.mark.parametrize("seed", range(3))
def test_exact_effects_are_found_exactly(seed):
    gs, _, _, truth = made_up(120, seed=seed)
    y = 3.0 + slot_code(gs) @ truth.ravel()
    m = additive_model(gs, y)
    assert m.mean == pytest.approx(3.0) and np.allclose(m.effects, truth)
    assert np.allclose(m.predict(gs), y) and unseen_r2(gs, y).value == pytest.approx(1)
    assert m.best == "".join(list(OPS)[k] for k in truth.argmax(1))
    assert m.predict([m.best]) == pytest.approx(3 + truth.max(1).sum())


def test_least_squares_is_that_of_a_textbook():
    "Against dummies with N as the baseline, and the ridge against its definition."
    gs, ap, _, _ = made_up(100)
    y = ap.mean(1)
    dummies = np.c_[np.ones(100), (slot_code(gs).reshape(100, 12, 4)[:, :, 1:] + 0.25).reshape(100, -1)]
    b = np.linalg.lstsq(dummies, y, rcond=None)[0]
    e = np.concatenate([np.zeros((12, 1)), b[1:].reshape(12, 3)], 1)
    m = additive_model(gs, y)
    assert np.allclose(m.effects, e - e.mean(1, keepdims=True)) and np.allclose(m.predict(gs), dummies @ b)
    m = additive_model(gs, y, ridge=2.0)
    loss = lambda mean, eff: ((y - mean - slot_code(gs) @ eff.ravel()) ** 2).sum() + 2.0 * (eff**2).sum()
    least = loss(m.mean, m.effects)
    r = np.random.default_rng(0)
    assert all(loss(m.mean + r.normal(0, 0.1), m.effects + r.normal(0, 0.1, (12, 4))) > least for _ in range(20))
    assert abs(m.effects.sum(1)).max() < 1e-9


def test_too_few_genotypes_need_a_ridge():
    gs, ap, _, _ = made_up(30)
    with pytest.raises(InputError, match=r"determine \d+ of 37 numbers"):
        additive_model(gs, ap.mean(1))
    assert additive_model(gs, ap.mean(1), ridge=1.0).effects.shape == (12, 4)
    for y in (ap.mean(1)[:-1], np.full(30, np.nan)):
        with pytest.raises(InputError, match="a finite one of each"):
            additive_model(gs, y, ridge=1.0)


def test_r2_on_noise_is_not_above_0():
    gs, r = random_genotypes(200), np.random.default_rng(0)
    found = [unseen_r2(gs, r.normal(size=200), n=500) for _ in range(20)]
    assert np.mean([i.value for i in found]) < 0 and sum(i.low > 0 for i in found) <= 1
    found = [unseen_r2(gs, r.normal(size=200), count_code, n=500) for _ in range(20)]
    assert np.mean([i.value for i in found]) < 0.02 and sum(i.low > 0 for i in found) <= 2


def test_r2_is_the_share_that_is_additive():
    "Half of the variance is of letters, half of the genotype as a whole: R² of ½, less what 37 numbers cost."
    gs, r = random_genotypes(600), np.random.default_rng(1)
    truth = r.normal(size=(12, 4))
    y = slot_code(gs) @ (truth - truth.mean(1, keepdims=True)).ravel()
    i = unseen_r2(gs, y + r.normal(0, y.std(), 600))
    assert i.low < 0.5 - 0.5 * 36 / 540 < i.high and i.high - i.low < 0.15


def test_pairs_in_a_cell_are_found_where_they_are():
    gs, r = random_genotypes(800), np.random.default_rng(2)
    y = np.array([sum(g[2 * c] == g[2 * c + 1] == "E" for c in range(6)) for g in gs]) + r.normal(0, 0.1, 800)
    assert unseen_r2(gs, y, cell_code).low > 0.95 > 0.9 > unseen_r2(gs, y).high


@pytest.mark.parametrize("wrong", [dict(folds=1), dict(folds=11), dict(y=np.ones(10)), dict(y=np.arange(9))], ids=str)
def test_r2_refuses(wrong):
    with pytest.raises(InputError, match="measure more genotypes"):
        unseen_r2(random_genotypes(10), wrong.pop("y", np.arange(10)), **wrong)


def test_intervals_of_effects_hold():
    "At least about 95 % of true effects lie in their interval, and where nothing is true, next to nothing is resolved."
    inside, jointly = [], []
    for seed in range(4):
        gs, ap, pid, truth = made_up(120, seed=seed)
        e = letter_effects(gs, ap, pid, n=300)
        inside.append((e.low <= truth) & (truth <= e.high))
        void = letter_effects(gs, ap - (slot_code(gs) @ truth.ravel())[:, None], pid, n=300)
        jointly.append(void.jointly.any())
        assert abs(e.value.sum(1)).max() < 1e-9 and np.allclose(e.value, additive_model(gs, ap.mean(1)).effects)
        assert not (e.jointly & ~e.resolved).any() and e.jointly.sum() > 10
        assert e.mean()["G"].value == pytest.approx(e.value[:, 2].mean()) and e.mean([0, 3])["N"].n == 2
    assert np.mean(inside) > 0.93 and sum(jointly) <= 1


def test_what_is_drawn_widens_the_interval():
    gs, ap, pid, _ = made_up(120, noise=1.0)
    tastes = np.random.default_rng(0).normal(0, 2, (30, 48)) @ slot_code(gs).T  # identities differ in their letters
    width = lambda **kw: (lambda e: (e.high - e.low).mean())(letter_effects(gs, ap + tastes[pid].T, pid, n=200, **kw))
    g, i = width(over=("genotypes",)), width(over=("identities",))
    assert g < i / 3 and i < width() and width(over=()) == 0


def test_queries_without_a_match_are_left_out():
    gs, ap, pid, _ = made_up(100)
    some = ap.copy()
    some[:, 5] = np.nan
    a, b = letter_effects(gs, some, pid, n=20), letter_effects(gs, np.delete(ap, 5, 1), np.delete(pid, 5), n=20)
    assert np.array_equal(a.value, b.value) and np.array_equal(a.draws, b.draws)
    with pytest.raises(InputError, match="a row for each genotype"):
        letter_effects(gs, ap.T, pid)


def test_the_heat_map_shows_values_and_marks():
    value = np.zeros((12, 4))
    value[0] = [-1, 2, -1, 0]
    draws = value + np.random.default_rng(0).normal(0, 0.3, (500, 12, 4))
    draws[:, 5, 1] += 0.75 - draws[:, 5, 1].mean()
    value[5, 1] = 0.75
    e = Effects(value, draws)
    fig = effects_figure(e)
    texts = [t.get_text() for t in fig.axes[0].texts]
    rings = [line for line in fig.axes[0].lines if line.get_marker() == "o"]
    assert len(texts) == 48 and texts[12] == "+2.0" and len(rings) == (e.resolved | e.jointly).sum()
    assert e.jointly[0, :3].all() and e.resolved[5, 1] and not e.jointly[5, 1]
    plt.close(fig)


# how reliable, where, and whether they agree


def scores(n=60, ids=24, spread=2.0, noise=8.0, seed=0):
    r = np.random.default_rng(seed)
    ap = 50 + spread * r.normal(size=(n, 1)) + r.normal(0, 20, 4 * ids) + r.normal(0, noise, (n, 4 * ids))
    return GenotypeScores(random_genotypes(n, seed), ap, np.repeat(np.arange(ids), 4))


def test_reliability_is_the_share_of_true_variance():
    got = [reliability(scores(seed=s), n=200).value for s in range(10)]
    assert np.mean(got) == pytest.approx(4 / (4 + 64 / 96), abs=0.03)
    none = [reliability(scores(spread=0.0, seed=s), n=200) for s in range(10)]
    assert abs(np.mean([i.value for i in none])) < 0.2 and sum(i.low > 0 for i in none) <= 2
    with pytest.raises(InputError, match="three and four or more"):
        reliability(scores(n=2))


def test_standing_is_a_share_with_an_interval():
    j = scores()
    y = j.mean_ap
    for k in range(0, 60, 7):
        want = ((y < y[k]).sum() + 0.5) / 60
        i = percentile_rank(j, j.ap[k], n=200)
        assert i.value == pytest.approx(want) and i.low <= i.value <= i.high
    assert percentile_rank(j, j.ap.max(0) + 1).value == 1 and percentile_rank(j, j.ap.min(0) - 1).high == 0
    with pytest.raises(InputError, match="one for each query"):
        percentile_rank(j, j.ap[0][:-1])


def test_agreement_by_hand():
    assert agreement(["NNNNNNEEEEEE", "NNNNNNGGGGGG", "AAAAAAGGGGGG"]) == pytest.approx((6 + 6 + 0) / 3)
    with pytest.raises(InputError, match="two or more"):
        agreement([TABLE1])


def test_permuted_letters_are_the_null():
    "Its mean is the sum of products of counts over 12, and searches that only like a letter are no surprise."
    r = np.random.default_rng(0)
    a, b = ("".join(r.choice(list(OPS), 12, p=(0.1, 0.6, 0.2, 0.1))) for _ in range(2))
    got = agreement_by_chance([a, b], n=4000)
    assert got.null.value == pytest.approx(sum(a.count(k) * b.count(k) for k in OPS) / 12, abs=0.1)
    ps = [
        agreement_by_chance(["".join(r.choice(list(OPS), 12, p=(0.1, 0.6, 0.2, 0.1))) for _ in range(4)], n=200).p
        for _ in range(40)
    ]
    assert 0.3 < np.mean(ps) < 0.75 and sum(p < 0.05 for p in ps) <= 6
    same = agreement_by_chance([TABLE1, TABLE1, TABLE1[:-1] + "N"])
    assert same.p < 0.01 and same.value > same.null.high and "permuted letters" in str(same)


def test_the_distribution_is_drawn():
    fig = distribution_figure(scores().mean_ap, {"Table 1": 51.0, "searched": [49.0, 50.0, 52.0]})
    rows = [line for line in fig.axes[1].lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in rows] == [1, 3] and len(fig.axes[1].get_yticklabels()) == 2
    plt.close(fig)
