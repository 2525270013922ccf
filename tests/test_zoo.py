"Networks that come with the package: whole, small, opened by name wherever a run is, from a wheel and offline."

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import msinet.zoo
from msinet.cli import main
from msinet.config import DemoConfig, SMOKE_SYNTH, TABLE1, TRAIN, TrainConfig
from msinet.data.sets import get_data
from msinet.engine.run import read_config, read_run, run_data_spec, run_test_spec
from msinet.errors import InputError
from msinet.quickstart import demo, tune_config
from msinet.retrieval.evaluate import evaluate, retrieval_metrics
from msinet.weights import load_initial_weights, open_net
from msinet.zoo import run_path, zoo_cards, zoo_folder, zoo_table

ROOT = Path(__file__).parent.parent
TRAINED = [n for n in zoo_cards() if (zoo_folder() / n / "model.safetensors").is_file()]


def test_the_zoo_is_small_and_says_where_it_comes_from():
    sizes = {n: sum(p.stat().st_size for p in (zoo_folder() / n).iterdir()) for n in zoo_cards()}
    assert max(sizes.values()) <= 5 * 2**20 and sum(sizes.values()) <= 30 * 2**20
    for name, card in zoo_cards().items():
        assert card["command"].startswith("msinet ") and card["licence"] == "Apache-2.0" and card["minutes"] > 0
        assert set(card["sha256"]) == {p.name for p in (zoo_folder() / name).iterdir()} - {"card.json"}
        text = "".join(p.read_text() for p in (zoo_folder() / name).glob("*.json*"))
        assert "/tmp" not in text and "/home" not in text


@pytest.mark.parametrize("name", TRAINED)
def test_a_network_is_opened_by_name(name):
    run = f"zoo:{name}"
    net, about = open_net(run)
    assert next(net.parameters()).dtype == torch.float32
    assert read_config(run, TrainConfig).size == tuple(about["size"]) and run_data_spec(run).startswith("synth")
    assert read_run(run)["history"] and read_run(run)["metrics"]["after"]["mAP"] > 0


@pytest.mark.parametrize("name", ["msinet-persons", "msinet-vehicles"])
def test_it_is_as_good_as_its_card_says(name):
    net, about = open_net(f"zoo:{name}")
    found = retrieval_metrics(evaluate(net, get_data(run_test_spec(f"zoo:{name}"), about["size"]), about["size"]))
    card = zoo_cards()[name]["measured"]["A"]
    assert abs(100 * found["mAP"] - card["mAP"]) < 0.5  # another processor adds in another order
    assert card["low"] < card["mAP"] < card["high"]


def test_persons_that_it_has_never_seen_are_found():
    assert zoo_cards()["msinet-persons"]["measured"]["A"]["low"] >= 90


def test_a_wrong_name_and_a_damaged_file_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="zoo:msinet-persons"):
        run_path("zoo:msinet")
    shutil.copytree(zoo_folder() / "msinet-persons", tmp_path / "msinet-persons")
    monkeypatch.setattr(msinet.zoo, "zoo_folder", lambda: tmp_path)
    assert open_net("zoo:msinet-persons")
    msinet.zoo._checked.cache_clear()
    whole = (tmp_path / "msinet-persons/model.safetensors").read_bytes()
    (tmp_path / "msinet-persons/model.safetensors").write_bytes(whole[:-1] + b"\0")
    with pytest.raises(InputError, match="install msinet again") as e:
        open_net("zoo:msinet-persons")
    assert "\n" not in str(e.value)
    (tmp_path / "msinet-persons/model.safetensors").unlink()
    with pytest.raises(InputError, match="SHA-256 nothing"):
        open_net("zoo:msinet-persons")
    msinet.zoo._checked.cache_clear()


def test_a_training_starts_from_it():
    net, _ = open_net("zoo:msinet-persons")
    want = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        [p.zero_() for p in net.parameters()]
    assert load_initial_weights(net, "zoo:msinet-persons") == []
    assert all(torch.equal(v, want[k]) for k, v in net.state_dict().items())


def test_the_table_has_every_network():
    assert [r["name"] for r in zoo_table()] == [f"zoo:{n}" for n in zoo_cards()]


def test_commands_take_it_and_write_nothing_into_the_package(tmp_path, monkeypatch, capsys):
    before = sorted(p.name for p in (zoo_folder() / "msinet-persons").iterdir())
    monkeypatch.chdir(tmp_path)
    main(["zoo"])
    assert "zoo:msinet-persons" in capsys.readouterr().out
    main(["evaluate", "--run", "zoo:msinet-persons", "--data", "synth:n_ids=4,n_test=4"])
    assert "mAP" in capsys.readouterr().out
    main(["report", "--run", "zoo:msinet-persons"])
    assert "RUN = 'zoo:msinet-persons'" in capsys.readouterr().out
    assert (tmp_path / "msinet-persons/report.html").is_file()
    assert before == sorted(p.name for p in (zoo_folder() / "msinet-persons").iterdir())


def test_the_wheel_answers_a_query_without_a_network(tmp_path):
    "Built, unpacked outside the repository, and asked from there, with no way to download anything."
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    source = tmp_path / "source"
    left = shutil.ignore_patterns(".*", "_*docs*", "_proc", "runs", "*.egg-info", "build", "dist", "nbs")
    shutil.copytree(ROOT, source, ignore=left)
    subprocess.run(build, check=True, cwd=source)
    wheel = next(tmp_path.glob("msinet-*.whl"))
    assert wheel.stat().st_size < 40e6
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    data = get_data("synth:n_ids=4,n_test=4", (64, 32))
    (tmp_path / "images").mkdir()
    from msinet.rendering.world import render

    for i, item in enumerate(data.gallery[:12]):
        Image.fromarray(np.asarray(render(item.path))).save(tmp_path / f"images/{i}.png")
    words = "query --image images/0.png --run zoo:msinet-persons --index images --gallery g --k 3".split()
    env = os.environ | dict(PYTHONPATH=str(tmp_path / "site"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    code = "import sys, msinet; print(msinet.__file__); from msinet.cli import main; main(sys.argv[1:])"
    out = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr
    assert str(tmp_path / "site") in out.stdout
    assert len(json.loads((tmp_path / "g/answer.json").read_text())["names"]) == 3


def test_a_demo_of_a_trained_network_needs_no_training(tmp_path):
    cfg = DemoConfig(run="zoo:msinet-persons", data=SMOKE_SYNTH, batch=8, K=2, out=str(tmp_path / "run"))
    done = demo(cfg)
    m = done.trained.metrics
    assert done.found is None and done.report.is_file() and set(m) == {"pixels", "after"}
    assert m["after"]["mAP"] > 0.9 > m["pixels"]["mAP"] and not done.trained.history
    kept = open_net(done.run)[0].state_dict()
    own = {k: v for k, v in open_net("zoo:msinet-persons")[0].state_dict().items() if "classifier" not in k}
    assert all(torch.equal(kept[k], v) for k, v in own.items())
    assert read_config(done.run, TrainConfig).size == (128, 64)
    longer = tune_config(replace(cfg, epochs_train=8), tmp_path / "longer")
    assert (longer.epochs, longer.milestones, longer.weights) == (8, (5, 7), "zoo:msinet-persons")
    assert longer.genotype == TABLE1 and longer.lr == TRAIN["laptop"].lr / 10
