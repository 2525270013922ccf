"Every figure of a run as a file: its size, its letters, and that something is on it."
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from msinet.cli import main
from msinet.core import InputError
from msinet.figures import run_figures
from msinet.search import SEARCH, search
from msinet.train import TRAIN, train
from msinet.vis import COL1, COL2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("runs") / "run")
    word = search(replace(SEARCH["smoke"], out=out)).genotype
    return train(replace(TRAIN["smoke"], out=out, resume=True, genotype=word)).run


def test_figures_from_the_shell(run, tmp_path, capsys):
    main(["figures", str(run), "--out", str(tmp_path)])
    pdfs = sorted(tmp_path.glob("*.pdf"))
    assert {p.stem for p in pdfs} >= {"alphas", "alpha_maps", "genotype", "losses_search", "losses_training", "strips", "cmc", "activation", "answers", "cells"}
    assert len(capsys.readouterr().out.splitlines()) == len(pdfs)
    for pdf in pdfs:
        data = pdf.read_bytes()
        width, height = (float(v) / 72 for v in re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+)", data).groups())
        assert width <= COL2 + 0.01 and 0.5 < height < 9.2, pdf.name
        assert b"/FontFile2" in data and b"/Type3" not in data, f"{pdf.name}: letters must travel in the file"
        assert b"CreationDate" not in data
        pixels = np.asarray(Image.open(pdf.with_suffix(".png")).convert("L"))
        assert (pixels < 250).mean() > 0.005, f"{pdf.name} is empty"
    assert any(abs(float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", p.read_bytes())[1]) / 72 - COL1) < 0.01 for p in pdfs)


def test_a_search_alone_has_figures_too(tmp_path):
    search(replace(SEARCH["smoke"], out=str(tmp_path / "run"), epochs=1))
    assert [s.name for s in run_figures(tmp_path / "run")] == ["alphas", "alpha_maps", "genotype", "losses_search"]


def test_no_run(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        run_figures(tmp_path)
