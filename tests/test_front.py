"What a visitor sees first is true: badges, links, versions, workflows, the map of the notebooks."

import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from tidy import COLAB, address, install, link, open_in_colab, title_alone

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NBS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
INI = ConfigParser(delimiters=["="])
INI.read(ROOT / "settings.ini", encoding="utf-8")
CONFIG = INI["DEFAULT"]


@pytest.mark.parametrize(
    "kind,names",
    {
        "github-workflows": "workflows/*.yml",
        "github-issue-forms": "ISSUE_TEMPLATE/[!c]*.yml",
        "github-issue-config": "ISSUE_TEMPLATE/config.yml",
    }.items(),
)
def test_github_reads_our_files(kind, names):
    files = sorted((ROOT / ".github").glob(names))
    assert files
    subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{kind}", *map(str, files)],
        check=True,
        capture_output=True,
    )


def test_citation():
    subprocess.run(
        [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.citation-file-format",
            str(ROOT / "CITATION.cff"),
        ],
        check=True,
        capture_output=True,
    )
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {CONFIG['version']}\n" in text and CONFIG["git_url"] in text


def test_pythons_that_are_promised_are_tested():
    tested = (
        re.search(r"python: \[(.*)\]", (ROOT / ".github/workflows/test.yml").read_text())[1]
        .replace("'", "")
        .split(", ")
    )
    assert tested == ["3.10", "3.11", "3.12", "3.13"] and tested[0] == CONFIG["min_python"]
    assert f'requires-python = ">={tested[0]}"' in (ROOT / "pyproject.toml").read_text()
    badge = re.search(r"badge/python-(.*?)-", README)[1]
    assert badge == f"{tested[0]}%20to%20{tested[-1]}"


def test_badges_say_what_is_so():
    assert "badge/licence-Apache--2.0-" in README and (ROOT / "LICENSE").read_text().lstrip().startswith(
        "Apache License"
    )
    named = set(re.findall(r"https://img\.shields\.io/badge/(\w+)-", README))
    assert named == {"python", "licence", "paper"}, "a badge that nothing checks"


def test_every_notebook_is_on_the_map():
    "The map is the table at the end of the start page."
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    last = "".join([c for c in cells if c["cell_type"] == "markdown"][-1]["source"])
    linked = re.findall(r"\]\(([\w/.]+\.ipynb)\)", last[last.index("## All notebooks") :])
    assert len(linked) == len(set(linked)), "a notebook is on the map twice"
    assert set(linked) == {p.relative_to(ROOT / "nbs").as_posix() for p in NBS} - {"index.ipynb"}


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(file):
    for target in re.findall(r"!?\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / file).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_notebook_opens_in_colab():
    for p in NBS:
        nb = json.loads(p.read_text(encoding="utf-8"))
        assert not open_in_colab(nb, p, address()), f"{p.name}: run make export"


def test_colab_finds_title_link_and_cell_once():
    path = ROOT / "nbs" / "sub" / "x.ipynb"
    source = ["# x\n", "\n", "> a line\n", "\n", "Words.\n", "\n", "More."]
    nb = dict(
        cells=[
            dict(cell_type="code", source=["#| default_exp x"]),
            dict(cell_type="markdown", source=source),
            dict(cell_type="code", source=["1"]),
        ]
    )
    assert (
        title_alone(nb)
        and open_in_colab(nb, path, "me/kit")
        and not open_in_colab(nb, path, "me/kit")
        and not title_alone(nb)
    )
    assert ["".join(c["source"]) for c in nb["cells"]] == [
        "#| default_exp x",
        "# x\n\n> a line",
        link(path, "me/kit"),
        install("me/kit"),
        "Words.\n\nMore.",
        "1",
    ]
    assert link(path, "me/kit") == f"[Open in Colab]({COLAB}me/kit/blob/main/nbs/sub/x.ipynb)"
    assert open_in_colab(nb, path, "you/kit") and len(nb["cells"]) == 6 and "me/kit" not in json.dumps(nb), (
        "a fork's links are its own"
    )
