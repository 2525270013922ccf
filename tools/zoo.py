"""Put a run into the zoo: the networks that come with the package.

    python tools/zoo.py RUN NAME "msinet train … (the command that made it)"

Copies what tells of the run, weights in half precision (statistics of batch normalisation as they are), and measures
the network on the same 48 identities as always and on others: domain B, level hard, for a rendered run.
"""

import argparse
import json
import re
import shutil
from datetime import date
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from msinet.core import n_params, set_seed, threads, write_json
from msinet.data.sets import get_data
from msinet.engine.checkpoint import load
from msinet.engine.learner import read_log
from msinet.engine.run import read_run_config, read_run_json, run_data_spec
from msinet.paper.evidence import bootstrap_means
from msinet.retrieval.evaluate import evaluate
from msinet.weights import load_weights, open_net, save_weights
from msinet.zoo import zoo_folder

KEPT = "genotype.json metrics.json history.jsonl alphas.npy alpha_steps.npy".split()
WEIGHTS = "model search alignment".split()
LARGEST = 5 * 2**20  # bytes of a network


class _Halved(torch.nn.Module):
    "A state dict in half precision, but for running statistics and whole numbers."

    def __init__(self, sd):
        super().__init__()
        half = lambda k, v: v.half() if v.is_floating_point() and "running_" not in k else v
        self.sd = {k: half(k, v) for k, v in sd.items()}

    def state_dict(self):
        return self.sd


def interval(ap, pids) -> dict:
    "Mean in percent, with a bootstrap interval over identities."
    ap, pids = np.asarray(ap), np.asarray(pids)
    valid = np.isfinite(ap)
    low, high = np.quantile(bootstrap_means(ap[valid], pids[valid]), [0.025, 0.975])
    return {k: round(100 * float(v), 2) for k, v in dict(mAP=ap[valid].mean(), low=low, high=high).items()}


def elsewhere(spec: str) -> dict:  # what -> spec of a set
    "The sets that a rendered network is measured on."
    test = re.sub(r"n_ids=\d+", "n_ids=48", spec)  # identities to learn from don't change the others
    return {"A": spec, "A hard": f"{test},level=hard", "B": f"{test},domain=B"}


def measured(run) -> dict:  # what -> mAP, low, high, R1
    "Retrieval of a run's network on the sets of `elsewhere`, in percent."
    net, about = open_net(run)
    out = {}
    for what, spec in elsewhere(run_data_spec(run)).items():
        data = get_data(spec, about["size"])
        r = evaluate(net, data, about["size"])
        out[what] = interval(r.ap, [i.pid for i in data.query]) | dict(R1=round(100 * r.cmc(1), 2))
    return out


def parameters(run: Path) -> int:
    "Of a network without its classifiers, or of a supernet with everything."
    if (run / "model.safetensors").is_file():
        return n_params(open_net(run)[0], skip=["classifier"])
    sd = load_weights(run / "search.safetensors")[0]
    return sum(v.numel() for k, v in sd.items() if "running_" not in k and "num_batches" not in k)


def pack(run, name: str, command: str) -> Path:  # its folder in the zoo
    "Write a network of the zoo from a run."
    run, out = Path(run), zoo_folder() / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for f in KEPT:
        if (run / f).is_file():
            shutil.copyfile(run / f, out / f)
    for f in WEIGHTS:
        if (run / f"{f}.safetensors").is_file():
            sd, about = load_weights(run / f"{f}.safetensors")
            save_weights(_Halved(sd), out / f"{f}.safetensors", about)
    configs = {k: c | dict(out="", resume=False) for k, c in read_run_config(run).items()}
    last = configs.get("train") or configs.get("search")
    if last.get("lambda_sa") and not (out / "alignment.safetensors").is_file():  # a run of an earlier version
        sam = load(run / "train.pt")["parts"]["step"]["sam"]
        save_weights(_Halved(sam), out / "alignment.safetensors", dict(kind="alignment"))
    write_json(out / "config.json", configs)
    env = read_run_json(run, "environment")
    write_json(out / "environment.json", {k: v for k, v in env.items() if k not in ("platform", "git_changed")})
    set_seed(0)
    card = dict(
        command=command,
        seed=last["seed"],
        date=str(date.today()),
        minutes=round(sum(r["seconds"] for r in read_log(run / "history.jsonl")) / 60, 1),
        machine="one core of a 2-core x86-64 CPU, shared with other work",
        licence="Apache-2.0",
        parameters=parameters(out),
        measured=measured(out) if (out / "model.safetensors").is_file() else {},
    )
    card["sha256"] = {p.name: sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}
    write_json(out / "card.json", card)
    size = sum(p.stat().st_size for p in out.iterdir())
    assert size <= LARGEST, f"{name} has {size:,} bytes, expected at most {LARGEST:,}"
    return out


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("run", help="folder of a finished run")
    p.add_argument("name", help="its name in the zoo, such as msinet-persons")
    p.add_argument("command", help="the command that made it")
    a = p.parse_args()
    with threads(1):
        print(json.dumps(json.loads((pack(a.run, a.name, a.command) / "card.json").read_text())["measured"]))
