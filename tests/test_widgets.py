"Panels: what holds for all of them, without a browser."
import base64
import json

import matplotlib.pyplot as plt
import pytest
import torch
from tidy import VIEW, tidy

from msinet.core import InputError
from msinet.widgets import Panel, augment_lab, slider


def bar(n):
    ax = plt.figure(figsize=(1, 1)).add_subplot()
    ax.bar([0], [1 / n])
    return ax.figure


@pytest.fixture
def panel():
    return Panel(bar, dict(n=slider("n", 2, 0, 9)))


def test_a_control_changes_the_picture_and_no_figure_is_left(panel):
    first = panel.picture.value
    panel.controls["n"].value = 4
    assert panel.picture.value != first and not plt.get_fignums()


def test_an_error_is_shown_and_goes_away(panel):
    panel.controls["n"].value = 0
    assert "ZeroDivisionError" in panel.said.value and panel.picture.layout.display == "none"
    panel.controls["n"].value = 2
    assert panel.said.value == "" and panel.error is None and panel.picture.layout.display is None


def test_an_error_is_text_not_markup():
    def draw(n): raise ValueError("<img src=x onerror=alert(1)>")
    p = Panel(draw, dict(n=slider("n", 1, 0, 9)))
    assert "<img" not in p.said.value and "&lt;img" in p.said.value


def test_a_stored_page_keeps_the_picture_alone(panel):
    bundle = panel._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == panel.picture.value and VIEW in bundle and bundle["text/plain"] == "n 2"
    nb = dict(cells=[dict(outputs=[dict(data=json.loads(json.dumps(bundle)))]), dict(outputs=[dict(data={VIEW: {}})]), dict()])
    assert tidy(nb) and list(nb["cells"][0]["outputs"][0]["data"]) == ["image/png", "text/plain"]
    assert not tidy(nb), "a widget without a picture stays, for the project's test to find"


@pytest.mark.parametrize("shape", [(64, 32, 3), (32, 64, 3)])
def test_augment_lab(shape):
    p = augment_lab(torch.randint(256, shape, dtype=torch.uint8))
    for c in p.controls.values():
        before = p.picture.value
        c.value = c.max
        assert p.error is None and p.picture.value != before, c.description
    with pytest.raises(InputError, match="one picture"):
        augment_lab(torch.rand(shape))
