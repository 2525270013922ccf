"Widgets, without a browser: what holds for every panel, and the search in a thread."

import base64
import json
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from tidy import VIEW, tidy

from msinet.config import SEARCH
from msinet.errors import InputError
from msinet.space import Mixed, supernet
from msinet.training.search import AlphaHistory, search
from msinet.widgets.controls import Panel, slider
from msinet.widgets.lab import alpha_player, augment_lab, cost, interaction_lab, genotype_cost
from msinet.widgets.live import LiveSearch, live_search


def bar(n):
    ax = plt.figure(figsize=(1, 1)).add_subplot()
    ax.bar([0], [1 / n])
    return ax.figure


@pytest.fixture
def panel():
    return Panel(bar, dict(n=slider("n", 2, 0, 9)))


def test_a_control_changes_the_figure_and_none_stays_open(panel):
    first = panel.image.value
    panel.controls["n"].value = 4
    assert panel.image.value != first and not plt.get_fignums()


def test_an_error_is_shown_and_goes_away(panel):
    panel.controls["n"].value = 0
    assert "ZeroDivisionError" in panel.message.value and panel.image.layout.display == "none"
    panel.controls["n"].value = 2
    assert panel.message.value == "" and panel.error is None and panel.image.layout.display is None


def test_an_error_is_text_not_markup():
    def draw(n):
        raise ValueError("<img src=x onerror=alert(1)>")

    p = Panel(draw, dict(n=slider("n", 1, 0, 9)))
    assert "<img" not in p.message.value and "&lt;img" in p.message.value


def test_a_stored_page_keeps_only_the_image(panel):
    bundle = panel._repr_mimebundle_()
    assert (
        base64.b64decode(bundle["image/png"]) == panel.image.value and VIEW in bundle and bundle["text/plain"] == "n 2"
    )
    nb = dict(
        cells=[dict(outputs=[dict(data=json.loads(json.dumps(bundle)))]), dict(outputs=[dict(data={VIEW: {}})]), dict()]
    )
    assert tidy(nb) and list(nb["cells"][0]["outputs"][0]["data"]) == ["image/png", "text/plain"]
    assert nb["cells"][1]["outputs"] == [] and not tidy(nb), (
        "a view without an image is dropped, and nothing else changes"
    )


@pytest.mark.parametrize("shape", [(64, 32, 3), (32, 64, 3)])
def test_augment_lab(shape):
    p = augment_lab(torch.randint(256, shape, dtype=torch.uint8))
    for c in p.controls.values():
        before = p.image.value
        c.value = c.max
        assert p.error is None and p.image.value != before, c.description
    with pytest.raises(InputError, match="one image"):
        augment_lab(torch.rand(shape))


def test_a_click_sets_controls_and_draws_once():
    drawn = []
    p = Panel(
        lambda a, b: drawn.append((a, b)) or bar(a + b),
        dict(a=slider("a", 1, 0, 9), b=slider("b", 1, 0, 9)),
        spots=lambda a, b: [((0, 0, 0.5, 1), "left"), ((0.5, 0, 0.5, 1), "right")],
        click=lambda i, a, b: dict(a=i + 3, b=i + 5),
    )
    p.clickable.places.children[1].click()
    assert drawn == [(1, 1), (4, 6)] and p.values() == dict(a=4, b=6)
    p.click = lambda i, a, b: 1 / 0
    p.clickable.places.children[0].click()
    assert "ZeroDivisionError" in p.message.value


def test_an_error_closes_its_own_figure_alone():
    mine = plt.figure()

    def draw(n):
        plt.figure()
        raise ValueError("no")

    Panel(draw, dict(n=slider("n", 1, 0, 9)))
    assert plt.get_fignums() == [mine.number]
    plt.close(mine)


def test_alpha_player_takes_one_search_or_two():
    h = torch.randn(5, 12, 4, generator=torch.Generator().manual_seed(0))
    for hs in (h, {"a": h, "b": h[:3]}):
        p = alpha_player(hs)
        p.controls["epoch"].value = 1
        assert p.error is None, p.error


def test_a_click_changes_a_letter():
    p = interaction_lab([torch.randint(256, (64, 32, 3), dtype=torch.uint8).numpy()], genotype="N" * 12)
    for letter in "EGAN":
        p.clickable.places.children[11].click()
        assert p.error is None and p.values()["genotype"] == "N" * 11 + letter


TINY = replace(
    SEARCH["smoke"],
    data="synth:n_ids=8,n_test=2,cams=3,visits=2,frames=2",
    size=(32, 16),
    batch=4,
    evaluate=False,
    threads=1,
)


def searching():
    return [t for t in threading.enumerate() if t.name.startswith("search ")]


@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_a_stopped_search_is_resumed_without_loss(tmp_path, steps):
    straight = search(replace(TINY, out=str(tmp_path / "a")))
    s = LiveSearch(replace(TINY, out=str(tmp_path / "b")))
    s.start(steps)
    s.join()
    assert s.state == "paused" and len(s.control.h) == steps
    s.stop(wait=True)
    assert s.state == "stopped" and not searching()
    s.start()
    s.join()
    assert s.state == "finished" and (s.result.alphas == straight.alphas).all() and not searching()
    assert len(straight.steps) == len(straight.alphas) * 3 and (s.result.steps == straight.steps).all()
    assert all((np.load(tmp_path / r / "alpha_steps.npy") == straight.steps).all() for r in "ab")


def test_two_searches_in_one_folder_are_an_error(tmp_path):
    a, b = (LiveSearch(replace(TINY, out=str(tmp_path / "a"))) for _ in range(2))
    a.start(1)
    a.join()
    with pytest.raises(InputError, match="being searched already"):
        b.start()
    a.stop(wait=True)


def test_closing_the_panel_ends_its_thread_and_errors_are_shown(tmp_path):
    p = live_search(replace(TINY, out=str(tmp_path / "a")))
    p.search.start(2)
    p.search.join()
    p.close()
    for _ in range(200):
        if not searching():
            break
        time.sleep(0.02)
    assert not searching()
    bad = live_search(replace(TINY, out=str(tmp_path / "b"), K=3))
    bad.search.start()
    bad.search.join()
    bad.refresh()
    assert "does not divide" in bad.message.value and not searching()


def test_alpha_between_epochs_is_thinned_evenly_and_survives_a_stop(tmp_path):
    class Batches:
        done = 0

        def __len__(self):
            return 7

        def state_dict(self):
            return dict(done=self.done)

    net = supernet((8, 8, 8, 8))
    learn = SimpleNamespace(net=net, dl=Batches(), epochs=2, row={})

    def go(history, iterations):
        history.before_fit(learn)
        history.before_epoch(learn)
        for _ in range(iterations):
            learn.dl.done += 1
            for m in net.modules():
                if isinstance(m, Mixed):
                    m.alpha.data.fill_(learn.dl.done)
            history.after_batch(learn)
        if learn.dl.done == 7:
            history.after_epoch(learn)
            learn.dl.done = 0
        return history

    first = go(AlphaHistory(tmp_path / "alphas.npy", most=6), 4)
    second = AlphaHistory(tmp_path / "alphas.npy", most=6)
    second.load_state_dict(first.state_dict())
    go(go(second, 3), 7)
    steps = np.load(tmp_path / "alpha_steps.npy")
    assert (
        steps.dtype == np.float32 and steps[:, 0, 0].tolist() == [3, 5, 7] * 2 and (steps[2::3] == second.array()).all()
    )
    old = AlphaHistory()
    old.load_state_dict(dict(rows=first.state_dict()["steps"]))  # of a run without stored steps
    assert len(go(old, 7).step_array()) == len(old.array())


def test_a_genotype_costs_the_sum_of_its_letters():
    for seed in range(3):
        genotype = "".join(np.random.default_rng(seed).choice(list("NEGA"), 12))
        assert genotype_cost(genotype, (8, 32, 48, 64), (64, 32)) == cost(genotype, (8, 32, 48, 64), (64, 32))
