"The class: a fifth interaction is two lines, and every exercise knows its answer and its usual mistakes."
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from msinet import vis
from msinet.core import InputError, n_params
from msinet.health import sameness
from msinet.live import live_search
from msinet.ops import OPS
from msinet.panels import doubt, share_maps
from msinet.report import report
from msinet.search import SEARCH, search
from msinet.slots import moment
from msinet.space import TABLE1, alphas, derive, derived, genotype, settle, supernet
from msinet.train import TRAIN, train
from msinet.widgets import alpha_player, cost, interaction_lab, word_cost

WORD = "NEGADNEGADND"


class Difference(nn.Module):
    "Each branch gets what the other lacks: a fifth interaction, with parameters of its own."
    def __init__(self, c):
        super().__init__()
        self.share = nn.Parameter(torch.zeros(c, 1, 1))

    def forward(self, x1, x2):
        return x1 + self.share*(x1 - x2), x2 + self.share*(x2 - x1)


@pytest.fixture
def fifth():
    "Two lines, and everything as it was afterwards."
    OPS["D"] = Difference
    vis.OP_COLORS["D"] = "#0072b2"
    yield
    del OPS["D"], vis.OP_COLORS["D"]
    plt.close("all")


def test_four_as_before():
    assert list(OPS) == list(vis.OP_COLORS) == list("NEGA") and vis.op_letters() == "N E G A"
    assert n_params(derived(TABLE1)) == 1_949_539 and n_params(supernet()) == 1_959_236
    assert alphas(supernet((8, 32, 48, 64))).shape == (12, 4)


def test_a_search_among_five(fifth, tmp_path):
    found = search(replace(SEARCH["smoke"], out=str(tmp_path)))
    assert found.alphas.shape[1:] == found.steps.shape[1:] == (12, 5) and set(found.genotype) <= set("NEGAD")
    moved = [n for n, p in found.net.named_parameters() if n.endswith("D.share") and p.abs().sum() > 0]
    assert len(moved) == 12  # the fifth is trained like the others
    settle(found.net.backbone, WORD)
    assert genotype(found.net.backbone) == WORD
    x, small = torch.randn(2, 3, 64, 32), derived(WORD, (8, 32, 48, 64))
    small.load_state_dict(derive(found.net.backbone, WORD))
    for a, b in zip(small.eval()(x), found.net.backbone.eval()(x)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert genotype(small) == WORD
    run = train(replace(TRAIN["smoke"], out=str(tmp_path), resume=True, genotype=WORD)).run
    page = report(run).read_text(encoding="utf-8")
    assert page.count("<h2>") > 5 and "#0072b2" in page and "1/5 when the search starts" in page
    live_search(replace(SEARCH["smoke"], out=str(tmp_path / "live")))


def test_every_picture_takes_five(fifth):
    h = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0))
    even = torch.zeros(12, 5)
    fig = vis.plot_alphas(h)
    assert [t.get_text().split()[0] for t in fig.legends[0].get_texts()] == [*"NEGAD", "even"]
    for ax in fig.axes:
        assert any(np.allclose(line.get_ydata(), 1/5) for line in ax.lines)
    assert len([p for p in vis.draw_genotype(WORD, h[-1]).patches if p.get_facecolor()[:3] == matplotlib.colors.to_rgb("#0072b2")]) >= 12
    assert len(share_maps({"": h}).axes) == 6 and moment({"": h}, net="") and moment({"": even[None]})
    assert doubt(even).tolist() == pytest.approx([np.log2(5)]*12) and sameness(h[-1]) <= 1
    alpha_player(h.numpy())


def test_the_lab_turns_through_five(fifth):
    panel = interaction_lab([np.zeros((64, 32, 3), np.uint8)], word="AAAAAAAAAAAA")
    for first in "DN":  # a click gives the next letter, after the last one the first
        panel.clicked(0)
        assert panel.error is None and panel.values()["word"] == first + "A"*11
    assert word_cost(WORD) == cost(WORD)


def test_other_columns_are_named(fifth):
    old = torch.zeros(3, 12, 4)
    for draw in (lambda: vis.plot_alphas(old), lambda: share_maps({"": old}), lambda: moment({"": old}), lambda: vis.draw_genotype(TABLE1, old[0])):
        with pytest.raises(InputError, match=r"12, 4.*12, 5.*N E G A D"):
            draw()
    with pytest.raises(InputError, match="N E G A D"):
        vis.draw_genotype("X"*12)
    with pytest.raises(InputError, match="N E G A D"):
        derived("X"*12)
