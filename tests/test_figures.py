"Every figure of a run, and of a visual notebook, as a file: its size, its fonts, and that it is not empty."

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from msinet.cli import main
from msinet.config import SEARCH, TRAIN, TrainConfig
from msinet.data.sets import get_data
from msinet.engine.run import read_config, read_run, run_test_spec
from msinet.errors import InputError
from msinet.figures.run import initial_network, overview, run_figures
from msinet.retrieval.evaluate import evaluate
from msinet.training.search import search
from msinet.training.train import train
from msinet.vis import COL1, COL2, save_figure
from msinet.weights import open_net

NBS = Path(__file__).parent.parent / "nbs"
VISUAL = [
    "11a_cell_maps",
    "11b_counting",
    "14a_memory_in_motion",
    "15a_alignment",
    "bench/51a_where_time_goes",
    "data/02a_meet_the_identities",
    "data/04a_turn_the_dials",
    "rendering/03b_can_it_be_learnt",
    "retrieval/05a_top15",
    "training/22a_alpha_evolution",
    "training/23a_activation",
    *(f"paper/fig{i}" for i in (1, 2, 3, 4, 6)),
]


def check(pdf):
    "One column or one page wide, fonts embedded, no date, not empty."
    data = pdf.read_bytes()
    width, height = (float(v) / 72 for v in re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+)", data).groups())
    assert min(abs(width - COL1), abs(width - COL2)) < 0.002 and 0.5 < height < 9.2, (
        f"{pdf.name} is {width:.3f} by {height:.3f} inches"
    )
    assert b"/FontFile2" in data and b"/Type3" not in data, f"{pdf.name}: fonts must be embedded"
    assert b"CreationDate" not in data
    pixels = np.asarray(Image.open(pdf.with_suffix(".png")).convert("L"))
    assert (pixels < 250).mean() > 0.005, f"{pdf.name} is empty"
    assert abs(pixels.shape[1] - 300 * width) < 1.5
    return width


def cells(name, kind):
    nb = json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == kind]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("runs") / "run")
    genotype = search(replace(SEARCH["smoke"], out=out)).genotype
    return train(replace(TRAIN["smoke"], out=out, resume=True, genotype=genotype)).run


def test_the_untrained_network_is_the_one_that_was_measured(run):
    "The network that figures call untrained has the metrics that the run measured before its training."
    cfg, (net, about) = read_config(run, TrainConfig), open_net(run)
    name, first = initial_network(cfg, net)
    got = evaluate(first, get_data(run_test_spec(run), about["size"]), about["size"])
    want = read_run(run)["metrics"]["before"]
    assert name == "untrained" and abs(got.mean_ap() - want["mAP"]) < 1e-6 and abs(got.curve(1)[0] - want["R1"]) < 1e-6


def test_the_command_figures_writes_every_figure(run, tmp_path, capsys):
    main(["figures", str(run), "--out", str(tmp_path)])
    pdfs = sorted(tmp_path.glob("*.pdf"))
    assert {p.stem for p in pdfs} >= {
        "alphas",
        "alpha_maps",
        "genotype",
        "losses_search",
        "losses_training",
        "strips",
        "cmc",
        "embeddings",
        "activation",
        "answers",
        "cells",
    }
    assert len(capsys.readouterr().out.splitlines()) == len(pdfs)
    assert {round(check(p), 2) for p in pdfs} == {round(COL1, 2), round(COL2, 2)}


def test_a_search_alone_has_figures_too(tmp_path):
    search(replace(SEARCH["smoke"], out=str(tmp_path / "run"), epochs=1))
    assert [s.name for s in run_figures(tmp_path / "run")] == ["alphas", "alpha_maps", "genotype", "losses_search"]


@pytest.mark.parametrize("shape", [(64, 32), (96, 96), (32, 160)])
def test_strips_fill_the_page_whatever_the_shape(shape):
    rows = [
        (np.zeros((*shape, 3)), np.zeros((15, *shape, 3)), np.zeros(15), [True] * 15, t)
        for t in ("at the start", "trained")
    ]
    fig = overview("GGEGAGGNGAEA", np.zeros((12, 4)), rows)
    fig.draw_without_rendering()
    strips = [ax for ax in fig.axes if len(ax.images) == 16]
    assert len(strips) == 2 and all(ax.get_window_extent().width > 0.6 * fig.bbox.width for ax in strips)
    plt.close(fig)


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        run_figures(tmp_path)


@pytest.mark.parametrize("name", VISUAL)
def test_a_visual_notebook_ends_with_its_figures(name):
    assert re.search(r"\bsave_figure\(", "\n".join(cells(name, "code"))), "must save its figures"
    assert "**Caption.**" in "\n".join(cells(name, "markdown")), "must have a caption"


@pytest.mark.parametrize("name", ["14a_memory_in_motion", "paper/fig2"])
def test_a_notebook_writes_its_figures(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    namespace = {}
    for code in cells(name, "code"):
        exec(code, namespace)
    pdfs = sorted(tmp_path.rglob("*.pdf"))
    assert pdfs
    for pdf in pdfs:
        check(pdf)
    plt.close("all")


@pytest.mark.parametrize("width", [1.5, COL1, 4.0, COL2])
def test_every_file_is_a_column_or_a_page_wide(width, tmp_path):
    fig, ax = plt.subplots(figsize=(width, 1.5), layout="constrained")
    ax.plot([1, 2], label="a")
    ax.legend()
    assert round(check(save_figure(fig, "a", tmp_path)[0]), 2) == round(COL1 if width <= COL1 else COL2, 2)
    assert tuple(fig.get_size_inches()) == (width, 1.5), "the figure itself is not resized"
    plt.close(fig)


def test_a_figure_wider_than_the_page_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected at most 6.875"):
        save_figure(plt.figure(figsize=(9, 2)), "a", tmp_path)
    assert not list(tmp_path.iterdir())
    plt.close("all")


def test_an_unsupervised_run_has_a_page_and_figures(tmp_path, capsys):
    out = tmp_path / "run"
    main(["usl", "--preset", "smoke", "--out", str(out)])
    assert (
        str(out / "report.html") in capsys.readouterr().out
        and "Clusters over the epochs" in (out / "report.html").read_text()
    )
    main(["figures", str(out)])
    names = {Path(f).stem for f in capsys.readouterr().out.split()}
    assert {"clusters", "strips", "embeddings", "losses_clusters"} <= names
    for f in (out / "figures").glob("*.pdf"):
        check(f)
    plt.close("all")
    main(["evaluate", "--run", str(out)])  # embeds by the normalised features, as in training
    printed = float(re.search(r"(\d+\.\d)", capsys.readouterr().out.split("\n")[1]).group())
    assert abs(printed - 100 * json.loads((out / "metrics.json").read_text())["after"]["mAP"]) < 0.06
