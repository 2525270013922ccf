"A genotype by hand: the panel measures each change and leaves the supernet alone; a contest keeps its rules."

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from msinet.config import TABLE1
from msinet.core import set_seed
from msinet.errors import InputError
from msinet.paper.genotypes import GenotypeScores
from msinet.rendering.world import synth
from msinet.training.oneshot import evaluate_genotype, random_genotypes, retrieval_of, supernet_with_neck
from msinet.widgets.contest import Contest, IdentityTest, open_contest, winners_lead
from msinet.paper.probes import open_oneshot
from msinet.widgets.lab import interaction_lab


@pytest.fixture(scope="module")
def small():
    return synth(n_ids=1, n_test=4, cams=3, visits=3, level="hard")


@pytest.fixture(scope="module")
def shipped():
    return open_oneshot("zoo:supernet-persons")


def told(panel, monkeypatch):
    "The lines of numbers that a panel writes when it draws again."
    lines, text = [], Figure.text
    with monkeypatch.context() as m:
        m.setattr(Figure, "text", lambda self, x, y, s, **k: lines.append(s) or text(self, x, y, s, **k))
        panel.redraw()
    assert panel.error is None, panel.error
    return lines


def test_a_click_changes_cost_maps_images_and_numbers_and_back(small, shipped, monkeypatch):
    net, batches = shipped
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    p = interaction_lab(small, net, "E" * 12, batches)
    assert p.values()["weights"] == "one-shot"
    first, picture = told(p, monkeypatch), p.image.value
    p.clickable.places.children[4].click()
    assert p.values()["genotype"] == "EEEEGEEEEEEE" and p.image.value != picture
    second = told(p, monkeypatch)
    assert all(first[k] != second[k] for k in (0, 2, 3)), "cost, mAP and R1, comparison"
    assert "against Table 1 " in second[3] and "against the one before " in second[3]
    for g in ("A" * 12, TABLE1, "E" * 12):
        p.controls["genotype"].value = g
    assert told(p, monkeypatch)[:3] == first[:3]
    ap = evaluate_genotype(net, "E" * 12, retrieval_of(small, (64, 32)), batches).mean_ap()
    assert f"mAP {100 * ap:.1f} [" in first[2]
    assert all(map(torch.equal, before.values(), net.state_dict().values()))
    assert modes == [m.training for m in net.modules()]


def test_the_order_of_visits_does_not_matter(small, shipped, monkeypatch):
    net, batches = shipped
    seen = []
    for order in (random_genotypes(3), random_genotypes(3)[::-1]):
        p = interaction_lab(small, net, batches=batches)
        lines = {}
        for g in order:
            p.controls["genotype"].value = g
            lines[g] = told(p, monkeypatch)[2]
        seen.append(lines)
    assert seen[0] == seen[1]


def test_the_panel_takes_a_name_a_network_or_nothing(small, shipped):
    net, batches = shipped
    named, given = interaction_lab(small, "zoo:supernet-persons"), interaction_lab(small, net, batches=batches)
    assert named.error is None and named.image.value == given.image.value
    assert interaction_lab(small).values()["weights"] == "untrained"
    images = [torch.zeros(64, 32, 3, dtype=torch.uint8).numpy()]
    p = interaction_lab(images, "zoo:supernet-persons")
    assert p.error is None and p.values()["weights"] == "one-shot"
    with pytest.raises(InputError, match="expected"):
        interaction_lab(images, "zoo:msinet-persons")


def test_a_change_of_letter_is_measured_again_whatever_the_weights(small, monkeypatch):
    set_seed(0)
    p = interaction_lab(small, supernet_with_neck((8, 16, 24, 32)).backbone, "N" * 12)
    assert p.values()["weights"] == "searched"
    one = told(p, monkeypatch)
    p.controls["weights"].value = "untrained"
    assert p.error is None and told(p, monkeypatch)[2] != one[2]


PID = np.arange(6)


def share(letter, asked=None):
    "A test whose mAP is the share of a letter; the genotypes that were asked for are noted."

    def ap(g):
        if asked is not None:
            asked.append(g)
        return np.full(6, g.count(letter) / 12)

    return IdentityTest(ap, PID)


def test_ten_tries_and_no_more():
    c = Contest(share("G"), share("A"))
    for k, g in enumerate(random_genotypes(10), 1):
        t = c.attempt("Ada", g)
        assert (t.number, t.tries) == (k, 10) and "\n" not in repr(t)
    assert c.attempt("Ada", random_genotypes(1)[0].lower()).number == 1  # the same again is not counted
    with pytest.raises(InputError) as e:
        c.attempt("Ada", "N" * 12)
    assert "\n" not in str(e.value) and "expected" in str(e.value)
    assert c.attempt("Bo", "N" * 12).number == 1
    with pytest.raises(InputError):
        c.attempt("Bo", "XYZ")
    assert c.played["Bo"] == ["N" * 12]


def test_nobody_sees_held_out_identities_before_the_end():
    asked = []
    c = Contest(share("G"), share("A", asked), tries=2)
    c.attempt("Ada", "G" * 12)
    c.attempt("Bo", "A" * 12)
    c.attempt("Bo", "N" * 12)
    assert asked == []
    end = c.finish()
    assert asked and c.finish() == end
    with pytest.raises(InputError, match="over"):
        c.attempt("Ada", "A" * 12)
    at = {r.player: r for r in end}
    assert at["Bo"].place == "1" and at["Ada"].place == "2" and at["Bo"].genotype == "A" * 12
    assert [r.held_out.value for r in end] == sorted((r.held_out.value for r in end), reverse=True)
    assert at["Table 1"].gain.value == 0 and at["Table 1"].place == ""
    assert {"all N", "all E", "all G", "all A", "best of 2 random"} <= set(at)
    assert at["best of 2 random"].genotype == max(random_genotypes(2), key=lambda g: g.count("G"))


def test_a_contest_repeats_and_shares_no_identity(small):
    ends, splits = [], []
    for _ in range(2):
        c = open_contest(small, visible=2, tries=1, n=1)
        c.attempt("Ada", "A" * 12)
        splits.append((set(c.visible.pid), set(c._held_out.pid)))
        ends.append(c.finish())
    assert ends[0] == ends[1] and splits[0] == splits[1] and not splits[0][0] & splits[0][1]
    assert splits[0][0] | splits[0][1] == {i.pid for i in small.query}
    for visible in (1, 3):
        with pytest.raises(InputError, match="identities"):
            open_contest(small, visible=visible)


def test_the_lead_of_equal_genotypes_is_luck():
    noise = np.random.default_rng(0).normal(0.5, 0.1, (60, 40))
    equal = GenotypeScores(random_genotypes(60), noise, np.arange(40))
    seen, rest = winners_lead(equal, visible=10).T
    assert (seen > 0).all() and abs(rest.mean()) < 0.15 * seen.mean()
    true = np.linspace(0.4, 0.6, 60)[:, None].repeat(40, 1)
    seen, rest = winners_lead(GenotypeScores(random_genotypes(60), true, np.arange(40)), visible=10).T
    np.testing.assert_allclose(seen, rest)
    for wrong in (dict(tries=61), dict(visible=40), dict(visible=0)):
        with pytest.raises(InputError):
            winners_lead(equal, **wrong)
