"The grid: no run is repeated, a failure is a row, a killed worker loses only its last epoch."

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from msinet.cli import main
from msinet.config import SMOKE_SYNTH
from msinet.errors import InputError
from msinet.paper.experiments import differences, figure, runs_of, results, table
from msinet.paper.runs import PARTS, key_of, names_of, run_of
from msinet.paper.trials import collect, grid, perform, read_rows, rows, shrink_run

NAMES = ("MS/none", "MS/gate", "MS/exchange")

SCRIPT = f"""
import sys
from msinet.paper.runs import run_of
from msinet.config import SMOKE_SYNTH
from msinet.paper.trials import grid, shrink_run
if __name__ == '__main__':
    runs = [shrink_run(run_of(n, 'demo'), SMOKE_SYNTH, 12) for n in {NAMES}]
    print(grid(runs, sys.argv[1], workers=2)[['key', 'run', 'status']].to_string())
"""


def tiny(name, seed=0, epochs=2):
    return shrink_run(run_of(name, "demo", seed), SMOKE_SYNTH, epochs)


def workers_of(pid):
    "Ray's child processes that carry out a trial now."
    import psutil

    out = []
    for p in psutil.Process(pid).children(recursive=True):
        try:
            if p.name().startswith("ray::perform") or "ray::perform" in " ".join(p.cmdline()):
                out.append(p)
        except psutil.Error:
            pass
    return out


def test_a_killed_worker_loses_no_row(tmp_path):
    pytest.importorskip("ray")
    env = os.environ | dict(OMP_NUM_THREADS="1")
    job = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "grid")],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        killed = 0
        for _ in range(2400):
            time.sleep(0.1)
            begun = list((tmp_path / "grid").glob("*/train/train.pt"))  # a checkpoint: a training has begun
            busy = workers_of(job.pid)
            if begun and busy:
                busy[0].send_signal(signal.SIGKILL)
                killed = busy[0].pid
                break
            if job.poll() is not None:
                break
        out, _ = job.communicate(timeout=400)
    finally:
        job.kill()
    assert killed and job.returncode == 0, out[-2000:]
    found = read_rows(tmp_path / "grid")
    assert sorted(r["run"] for r in found) == sorted(NAMES) and {r["status"] for r in found} == {"done"}, out[-2000:]
    for r in found:  # each epoch exactly once, also in the trial that was killed
        log = [json.loads(t) for t in (tmp_path / "grid" / r["key"] / "train/history.jsonl").read_text().splitlines()]
        assert [e["epoch"] for e in log] == list(range(1, 13))
    alone = perform(tiny(NAMES[0], epochs=12), tmp_path / "alone")  # not killed: the same metrics
    assert next(r for r in found if r["run"] == NAMES[0])["metrics"] == alone["metrics"]


def test_a_grid_continues_where_it_stopped(tmp_path):
    bad = replace(tiny("MS/gate"), train=replace(tiny("MS/gate").train, genotype="GG"))
    seen = []
    t = grid([tiny("MS/none"), bad], tmp_path, say=seen.append)
    assert [r["status"] for r in seen] == ["done", "failed"] and "GG" in seen[1]["error"]
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/row.json")}
    grid([tiny("MS/none"), bad], tmp_path)
    done = tmp_path / key_of(tiny("MS/none")) / "row.json"
    again = tmp_path / key_of(bad) / "row.json"
    assert done.stat().st_mtime_ns == times[done] and again.stat().st_mtime_ns > times[again]
    assert t.status.tolist() == rows(tmp_path).status.tolist()
    assert not list(tmp_path.glob("*/*/*.pt")) or not (tmp_path / key_of(tiny("MS/none")) / "train/train.pt").exists()


def test_collect_keeps_the_rows_of_folder_and_file(tmp_path):
    perform(tiny("MS/none"), tmp_path / "a")
    perform(tiny("MS/none", 1), tmp_path / "b")
    for d in "ab":
        collect(tmp_path / d, tmp_path / "rows.jsonl")
    assert sorted(r["seed"] for r in read_rows(tmp_path / "rows.jsonl")) == [0, 1]


def test_a_row_has_its_configuration_environment_and_fingerprint(tmp_path):
    r = perform(tiny("VR>VID/sam"), tmp_path)
    assert r["status"] == "done", r["error"]
    assert r["config"]["train"]["lambda_sa"] == 2 if "lambda_sa" in r["config"]["train"] else True
    assert (
        r["seed"] == 0
        and r["environment"]["torch"]
        and len(r["metrics"]["VR"]["mark"]) == 12
        and r["seconds"]["train"] > 0
    )
    assert np.isclose(np.mean(r["metrics"]["VR"]["ap"]), r["metrics"]["VR"]["mAP"], atol=1e-4)


@pytest.mark.parametrize("name, kind", [("M/gs", "usl"), ("M>MS/idm", "uda")])
def test_a_run_without_identities_starts_from_another_run(name, kind, tmp_path):
    row = perform(tiny(name), tmp_path)
    assert row["status"] == "done", row["error"]
    first = next(r for r in read_rows(tmp_path) if r["run"] == "MS/long")
    assert (
        first["status"] == "done"
        and row["config"]["train"].get("method", "gs") == name.split("/")[1]
        and row["seconds"][kind] > 0
    )
    before = json.loads((tmp_path / row["key"] / kind / "metrics.json").read_text())["before"]
    assert before["mAP"] > 0 and list(row["metrics"]) == [name.split("/")[0].split(">")[-1]]


def test_what_several_runs_start_from_is_trained_first_and_once(tmp_path):
    seen = []
    t = grid([tiny("M/gs"), tiny("M/cc")], tmp_path, say=seen.append)
    assert [r["run"] for r in seen] == ["MS/long", "M/gs", "M/cc"] and {r["status"] for r in seen} == {"done"}
    assert sorted(t.run) == ["M/cc", "M/gs"]


@pytest.mark.parametrize("name", [k for k, p in PARTS.items() if p.against])
def test_the_baseline_of_a_part_is_one_of_its_rows(name):
    part = PARTS[name]
    t = pd.DataFrame(
        [
            dict(ablation=a, column=c, seed=s, status="done", ap=[0.5, 0.5 + s / 10])
            for a in part.ablations
            for c in part.columns
            for s in (0, 1)
        ]
    )
    d = differences(t, part.against)
    baselines = {part.against} if isinstance(part.against, str) else {*part.against.values()}
    assert len(d) == (len(part.ablations) - len(baselines)) * len(part.columns) and set(d.seeds) == {2}


def test_a_network_is_compared_with_itself_without_alignment():
    rows = {"MSINet, none": 0.5, "MSINet, PAM": 0.6, "OSNet, none": 0.8, "OSNet, PAM": 0.7}
    t = pd.DataFrame(
        [
            dict(ablation=a, column="VR", seed=s, status="done", ap=[v, v + s / 100])
            for a, v in rows.items()
            for s in (0, 1)
        ]
    )
    assert differences(t, PARTS["table 5"].against).set_index("ablation").difference.round(9).to_dict() == {
        "MSINet, PAM": 10,
        "OSNet, PAM": -10,
    }


def test_stored_rows_have_the_keys_of_their_runs():
    for r in read_rows(Path(__file__).parents[1] / "nbs/paper/demo.jsonl"):
        assert key_of(run_of(r["run"], "demo", r["seed"])) == r["key"], r["run"]


def test_every_run_has_a_config_at_both_scales():
    keys = {}
    for name in names_of(""):
        for scale in ("paper", "demo"):
            keys.setdefault(key_of(run_of(name, scale)), set()).add((scale, name))
    for same in keys.values():  # names with one key are one ablation in columns that share a training
        assert len({s for s, _ in same}) == 1 and len({n.split("/")[1] for _, n in same}) == 1, same


@pytest.mark.parametrize("n", range(1, 7))
def test_a_table_without_rows_says_not_run(n, tmp_path):
    t = table(n, tmp_path)
    if n > 1:
        ours = t.xs("ours", axis=1, level=1)
        assert set(np.unique(ours.values)) <= {"not run", "quoted", ""}


def test_a_figure_without_rows_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="msinet run 'figure 5b'"):
        figure("5b", tmp_path)


def test_a_difference_against_a_loop(tmp_path):
    rng = np.random.default_rng(0)
    t = pd.DataFrame(
        [
            dict(ablation=a, column="MS", seed=s, status="done", ap=list(rng.random(7)))
            for a in ("x", "y")
            for s in range(4)
        ]
    )
    d = differences(t, "y").iloc[0]
    each = [
        100 * sum(p - q for p, q in zip(*(t[(t.ablation == a) & (t.seed == s)].ap.iloc[0] for a in "xy"))) / 7
        for s in range(4)
    ]
    assert np.allclose(d.each, each) and np.isclose(d.difference, np.mean(each))
    assert np.isclose(d.high - d.difference, 3.182446 * np.std(each, ddof=1) / 2, rtol=1e-5)


def test_commands_run_and_table(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main(["run", "figure 9"])
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    main(["run", "figure 5c", "--seeds", "2", "--dry-run", "--dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "6 of 6 runs to do" in out and "hours" in out
    main(["table", "2", "--rows", str(tmp_path)])
    assert "95.3" in capsys.readouterr().out
    assert len(runs_of("figure 5c", "demo", 2)) == 6 and "figure 5c" in PARTS


def test_a_figure_is_drawn_from_rows(tmp_path):
    for name in ("MS/none", "MS/gate"):
        for seed in (0, 1):
            r = run_of(name, "demo", seed)
            row = perform(tiny(name, seed), tmp_path / "tiny")
            (tmp_path / "demo" / key_of(r)).mkdir(parents=True)
            (tmp_path / "demo" / key_of(r) / "row.json").write_text(json.dumps(row | dict(key=key_of(r))))
    t = results("figure 5b", tmp_path / "demo")
    assert sorted(t.ablation.unique()) == ["gate", "none"] and (t.status == "done").all()
    main(["figure", "5b", "--rows", str(tmp_path / "demo"), "--out", str(tmp_path / "fig" / "b")])
    assert (tmp_path / "fig/b.pdf").read_bytes()[:5] == b"%PDF-" and (tmp_path / "fig/b.png").exists()


def test_a_failed_run_sets_the_exit_code(tmp_path, capsys):
    for i in range(2):
        with pytest.raises(SystemExit) as e:
            main(
                [
                    "run",
                    "MS/msinet",
                    "--scale",
                    "paper",
                    "--seeds",
                    "1",
                    "--files",
                    f"MS={tmp_path}/nothing",
                    "--dir",
                    str(tmp_path / "grid"),
                ]
            )
        assert e.value.code == 1 and "0 of 1 runs done, 1 failed" in capsys.readouterr().out
    assert [r["status"] for r in read_rows(tmp_path / "grid")] == ["failed"]


def test_a_grid_without_paths_does_not_start(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main(["run", "table 3", "--scale", "paper", "--dir", str(tmp_path / "grid")])
    err = capsys.readouterr().err
    assert (
        e.value.code == 2
        and err.count("\n") == 1
        and "--files M=/path msinet+imagenet=/path MS=/path" in err
        and not (tmp_path / "grid").exists()
    )


def test_missing_rows_are_an_error_not_an_empty_table(tmp_path):
    for words in (["table", "5"], ["figure", "5b"]):
        with pytest.raises(SystemExit) as e:
            main([*words, "--rows", str(tmp_path / "no.jsonl")])
        assert e.value.code == 2


def test_bars_and_intervals_have_the_same_order():
    rows = Path(__file__).parents[1] / "nbs/paper/demo.jsonl"
    fig = figure("table 2", rows)  # OSNet has vehicles only, and they come later in the list of columns
    left, right = fig.axes
    t = results("table 2", rows)
    columns = [c for c in PARTS["table 2"].columns if (t.column == c).any()]
    assert [x.get_text() for x in left.get_legend().get_texts()] == [c.replace(">", " → ") for c in columns]
    d = differences(t, PARTS["table 2"].against)
    marks = {round(float(x.get_xdata()[0]), 6): float(x.get_ydata()[0]) for x in right.lines if x.get_marker() == "D"}
    bars = {round(b.get_width(), 6): b.get_y() + b.get_height() / 2 for b in left.patches}
    for r in d[d.seeds > 0].itertuples():
        at = t[(t.ablation == r.ablation) & (t.column == r.column)].mAP.mean()
        assert abs(bars[round(at, 6)] - marks[round(r.difference, 6)]) < 0.05
    plt.close(fig)


def test_a_part_without_a_baseline_has_one_half():
    fig = figure("table 4", Path(__file__).parents[1] / "nbs/paper/demo.jsonl")
    assert len(fig.axes) == 1 and "minus" not in fig.axes[0].get_xlabel()
    plt.close(fig)
