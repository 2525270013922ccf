"""The way in: `import msinet` is light and gives the names that users need, the command line imports what a
command needs, README's code runs."""

import ast
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot
import pytest

import msinet
from msinet.cli import COMMANDS, main, parse_args
from msinet.config import SEARCH, TRAIN, SearchConfig, TrainConfig, UnsupConfig
from msinet.engine.run import read_config, run_data_spec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRACT = """Item ReIDData market1501 msmt17 veri776 vehicleid folder synth write_layout n_params rank rerank
rerank_dense
    Keep Exchange ChannelGate CrossAttention OPS Mixed Cell MSINet supernet derived alphas genotype TABLE1 FBLNeck
    ReIDNet
    id_loss triplet twin_split Memory activation_vectors PAM alignment SAM from_official SearchConfig search TrainConfig
    train UnsupConfig usl uda demo get_data open_net evaluate Gallery load""".split()


def python(code, **kw):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **kw).stdout


def test_the_names_of_the_contract_are_there_in_any_order_of_imports():
    assert set(CONTRACT) <= set(msinet.__all__) <= set(dir(msinet))
    out = python(
        "import pkgutil, importlib, msinet\n"
        "for m in pkgutil.walk_packages(msinet.__path__, 'msinet.'): importlib.import_module(m.name)\n"
        "print([n for n in msinet.__all__ if type(getattr(msinet, n)).__name__ == 'module'])\n"
        "print(msinet.search.__module__, msinet.train.__module__, msinet.synth.__module__)"
    ).split("\n")
    assert out[0] == "[]", "an imported module must not hide a name of the package"
    assert out[1] == "msinet.training.search msinet.training.train msinet.rendering.world"


def test_no_name_of_the_package_is_also_a_module():
    modules = {p.stem for p in (ROOT / "msinet").iterdir()}
    assert not modules & set(msinet.__all__)


@pytest.mark.parametrize(
    "code",
    [
        "import msinet",
        "from msinet.cli import main; main(['--help'])",
        "from msinet.cli import main\ntry: main(['search', '--help'])\nexcept SystemExit: pass",
        "from msinet.cli import main\ntry: main(['train', '--preset', 'full', '--help'])\nexcept SystemExit: pass",
        "from msinet.cli import main\ntry: main(['serach'])\nexcept SystemExit: pass",
    ],
)
def test_help_does_not_wait_for_pytorch(code):
    heavy = "{'torch', 'pandas', 'matplotlib', 'scipy', 'sklearn', 'timm'}"
    assert python(f"{code}\nimport sys\nprint({heavy} & set(sys.modules))").split("\n")[-2] == "set()"


def test_the_overview_names_every_command():
    out = python("from msinet.cli import main; main([])")
    assert all(re.search(rf"^  {name} ", out, re.M) for name in COMMANDS)
    assert "data check" in out and len(out.split("\n")) < 30


def test_a_slip_of_the_finger_is_one_line(capsys):
    with pytest.raises(SystemExit) as e:
        main(["serach"])
    line = capsys.readouterr().err.strip()
    assert e.value.code == 2 and "\n" not in line and line.endswith("did you mean search?")


def test_the_words_of_the_version_before_are_still_understood():
    old = "train --preset smoke --drops 3 5 --erase .2 --every=4".split()
    from msinet.cli import _todays_words

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        cfg = parse_args(_todays_words(old))
        assert _todays_words(["compare", "a.jpg", "b.jpg"])[0] == "verify"
        assert _todays_words(["figure", "5b"])[0] == "figures"
        assert _todays_words(["query", "--hide", "_cam1"])[1] == "--exclude"
        assert _todays_words(["search", "--drops_alpha", "3"])[1] == "--milestones-alpha"
    assert (cfg.milestones, cfg.random_erasing, cfg.eval_every) == ((3, 5), 0.2, 4)
    assert len(notes) == 7 and "--drops is called --milestones now" in str(notes[0].message)


def test_a_configuration_of_an_older_run_is_read(tmp_path):
    old = dict(vars(TRAIN["laptop"]))
    old = {k: v for k, v in old.items() if k not in ("milestones", "random_erasing", "eval_every")}
    old |= dict(drops=[1, 2], erase=0.25, every=7, data="synth:n_ids=8", gone="x")
    (tmp_path / "config.json").write_text(json.dumps(dict(train=old)))
    cfg = read_config(tmp_path, TrainConfig)
    assert (cfg.milestones, cfg.random_erasing, cfg.eval_every) == ((1, 2), 0.25, 7)
    assert read_config(tmp_path, SearchConfig) is None and run_data_spec(tmp_path) == "synth:n_ids=8"


@pytest.mark.parametrize("kind", [SearchConfig, TrainConfig, UnsupConfig])
def test_configurations_are_given_by_name(kind):
    with pytest.raises(TypeError):
        kind("full")
    assert SEARCH["laptop"].preset == "laptop"


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    "The same ten lines, at the size of a test."
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(code.strip().split("\n")) <= 12 and "TRAIN['laptop'], seed=0" in code
    small = code.replace("TRAIN['laptop'], seed=0", "TRAIN['smoke'], out='run'")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(small, "README.md", "exec"), names)
    matplotlib.pyplot.close("all")
    assert names["ranking"].mean_ap() == pytest.approx(names["trained"].metrics["after"]["mAP"], abs=1e-12)
    assert (tmp_path / "retrieved.png").stat().st_size > 10_000


def modules():
    return [p for p in sorted((ROOT / "msinet").rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_house_rules_of_exported_code(path):
    "Explicit imports, 120 columns (what nbdev itself writes apart), at most two targets in a tuple assignment."
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    everything = next(n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    free = range(everything.lineno, everything.end_lineno + 1)
    lines = enumerate(text.split("\n"), 1)
    long = [n for n, line in lines if len(line) > 120 and not line.startswith("# %%") and n not in free]
    assert not long, f"lines over 120 columns: {long}"
    for n in ast.walk(tree):
        assert not (isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names)), f"line {n.lineno}: a star"
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Tuple) and isinstance(n.value, ast.Tuple):
            assert len(n.value.elts) < 3, f"line {n.lineno}: {len(n.value.elts)} values in one assignment"
