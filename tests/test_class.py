"The class: a fifth interaction is two lines, and every exercise knows its answer and its usual mistakes."

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from slides import kind, slides
from tidy import is_check
from torch import nn

from msinet import vis
from msinet.config import SEARCH, TABLE1, TRAIN
from msinet.core import n_params
from msinet.errors import InputError
from msinet.engine.health import alpha_sameness
from msinet.docs.lesson import check, exercises
from msinet.widgets.live import live_search
from msinet.ops import OPS
from msinet.figures.panels import share_entropy, share_maps
from msinet.figures.report import report
from msinet.training.search import search
from msinet.figures.slots import search_frame
from msinet.space import alphas, subnet_state_dict, derived, genotype, set_genotype, supernet
from msinet.training.train import train
from msinet.widgets.lab import alpha_player, cost, interaction_lab, genotype_cost


CLASS = Path(__file__).parent.parent / "nbs" / "class"
GENOTYPE = "NEGADNEGADND"


class Difference(nn.Module):
    "Each branch gets what the other lacks: a fifth interaction, with parameters of its own."

    def __init__(self, c):
        super().__init__()
        self.share = nn.Parameter(torch.zeros(c, 1, 1))

    def forward(self, x1, x2):
        return x1 + self.share * (x1 - x2), x2 + self.share * (x2 - x1)


@pytest.fixture
def fifth():
    "A fifth interaction in two lines, removed afterwards."
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
    set_genotype(found.net.backbone, GENOTYPE)
    assert genotype(found.net.backbone) == GENOTYPE
    x, small = torch.randn(2, 3, 64, 32), derived(GENOTYPE, (8, 32, 48, 64))
    small.load_state_dict(subnet_state_dict(found.net.backbone, GENOTYPE))
    for a, b in zip(small.eval()(x), found.net.backbone.eval()(x)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert genotype(small) == GENOTYPE
    run = train(replace(TRAIN["smoke"], out=str(tmp_path), resume=True, genotype=GENOTYPE)).run
    page = report(run).read_text(encoding="utf-8")
    assert page.count("<h2>") > 5 and "#0072b2" in page and "1/5 when the search starts" in page
    live_search(replace(SEARCH["smoke"], out=str(tmp_path / "live")))


def test_every_figure_takes_five(fifth):
    h = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0))
    even = torch.zeros(12, 5)
    fig = vis.plot_alphas(h)
    assert [t.get_text().split()[0] for t in fig.legends[0].get_texts()] == [*"NEGAD", "even"]
    for ax in fig.axes:
        assert any(np.allclose(line.get_ydata(), 1 / 5) for line in ax.lines)
    assert (
        len(
            [
                p
                for p in vis.draw_genotype(GENOTYPE, h[-1]).patches
                if p.get_facecolor()[:3] == matplotlib.colors.to_rgb("#0072b2")
            ]
        )
        >= 12
    )
    assert len(share_maps({"": h}).axes) == 6 and search_frame({"": h}, net="") and search_frame({"": even[None]})
    assert share_entropy(even).tolist() == pytest.approx([np.log2(5)] * 12) and alpha_sameness(h[-1]) <= 1
    alpha_player(h.numpy())


def test_the_lab_turns_through_five(fifth):
    panel = interaction_lab([np.zeros((64, 32, 3), np.uint8)], genotype="AAAAAAAAAAAA")
    for first in "DN":  # a click gives the next letter, after the last one the first
        panel.clicked(0)
        assert panel.error is None and panel.values()["genotype"] == first + "A" * 11
    assert genotype_cost(GENOTYPE) == cost(GENOTYPE)


def test_other_columns_are_named(fifth):
    old = torch.zeros(3, 12, 4)
    for draw in (
        lambda: vis.plot_alphas(old),
        lambda: share_maps({"": old}),
        lambda: search_frame({"": old}),
        lambda: vis.draw_genotype(TABLE1, old[0]),
    ):
        with pytest.raises(InputError, match=r"12, 4.*12, 5.*N E G A D"):
            draw()
    with pytest.raises(InputError, match="N E G A D"):
        vis.draw_genotype("X" * 12)
    with pytest.raises(InputError, match="N E G A D"):
        derived("X" * 12)


PAGES = sorted(p for p in CLASS.glob("0*.ipynb"))


@pytest.fixture
def restored():
    "Letters that a page adds are removed afterwards."
    tables = [(t, dict(t)) for t in (OPS, vis.OP_COLORS, vis.OP_NAMES)]
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        yield
    for table, was in tables:
        table.clear()
        table.update(was)
    torch.set_num_threads(threads)
    plt.close("all")


def asked(ns, code):
    "The verdict of a check cell, and the arguments of its call."
    calls = []
    ns["check"] = lambda answer, right, why, wrong=(), on=(): calls.append((answer, right, why, wrong, on))
    exec(code, ns)
    (call,) = calls
    return check(*call), call


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_every_exercise_knows_its_answers(path, restored, monkeypatch):
    "One pass with hardly any training: at each exercise no answer, the solution, each listed mistake, and nonsense."
    monkeypatch.chdir(CLASS)
    todo = {e.place: e for e in exercises(path)}
    assert 3 <= len(todo) <= 5
    ns = {}
    for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or is_check(cell):
            continue
        exec(compile(re.sub(r"epochs=\d+", "epochs=1", code), f"{path.name}[{i}]", "exec"), ns)
        plt.close("all")
        if i not in todo:
            continue
        e = todo[i]
        assert asked(ns, e.check)[0].right is None, e.title
        exec(e.solution, ns)
        said, (_, right, why, wrong, on) = asked(ns, e.check)
        assert said.right and said.text == why, (e.title, said)
        assert len(wrong) >= 1
        for mistake, text in wrong:
            said = check(mistake, right, why, wrong, on)
            assert said.right is False and said.text == text, (e.title, said)
        for nonsense in (None, object(), "no", [1, 2, 3, 4, 5, 6, 7], lambda *args: 1 / 0):
            said = check(nonsense, right, why, wrong, on)
            assert said.right is False and "\n" not in said.text, (e.title, said)


def test_a_verdict_is_shown_in_colour_and_in_text():
    good, bad, none = (check(a, 4, "two and two", [(5, "one too many")]) for a in (4, 5, ...))
    assert [v.right for v in (good, bad, none)] == [True, False, None]
    assert "one too many" in repr(bad) and "#d73027" in bad._repr_html_() and "#1a9850" in good._repr_html_()
    assert "&lt;" in check("<b>", 4, "")._repr_html_() or "a text" in check("<b>", 4, "").text


def test_checks_are_folded():
    for path in PAGES:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if is_check(cell):
                assert (
                    cell["metadata"] == {"jupyter": {"source_hidden": True}}
                    and cell["source"][0] == "#| code-fold: true\n"
                ), f"{path.name}: run make export"


def test_slides_leave_answers_out():
    pytest.importorskip("nbconvert")
    page = slides(CLASS / "02_twins.ipynb")
    assert "No description" not in page and "fig-alt" not in page and page.count("<img") >= 3
    assert page.count("<section") > 9 and "wrong=[" not in page and "from msinet" not in page
    assert (
        kind(dict(cell_type="markdown", source=["## Next"])) == "slide"
        and kind(dict(cell_type="markdown", source=["### Exercise"])) == "subslide"
        and kind(dict(cell_type="markdown", source=["Look"])) == "-"
    )
    assert (
        kind(dict(cell_type="code", source=["import torch\n", "from msinet.vis import *"])) == "skip"
        and kind(dict(cell_type="code", source=["x = 1"])) == "-"
    )
    assert 'class="notes"' in page
