"""What `nbdev_clean` leaves to do.

A stored page has no kernel: of a widget only the image is kept that it left. nbdev takes the whole of a title's cell
for
front matter, so on the site its other words would be lost: they get a cell of their own. And each notebook opens in
Colab: by a link
under its title, and a cell that installs the kit there. In the class, the cells of the checks are folded, for they
hold the answers.
"""

import json
import re
import zlib
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
VIEW = "application/vnd.jupyter.widget-view+json"
COLAB = "https://colab.research.google.com/github/"


def address():
    "owner/name of the project."
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]["git_url"].removeprefix("https://github.com/")


def tidy(nb):
    "Drop views of widgets: a stored page shows the image they left, or nothing. True when something was dropped."
    before = json.dumps(nb)
    for c in (c for c in nb["cells"] if "outputs" in c):
        c["outputs"] = [o for o in c["outputs"] if VIEW not in o.get("data", {}) or "image/png" in o["data"]]
        for o in c["outputs"]:
            o.get("data", {}).pop(VIEW, None)
    return json.dumps(nb) != before


def title_of(nb):
    "Which cell has the title, or -1."
    return next((i for i, c in enumerate(nb["cells"]) if c["cell_type"] == "markdown"), -1)


def words(text, mark=""):
    "A cell of words."
    return dict(
        cell_type="markdown",
        id=f"{zlib.crc32((mark + text).encode()):08x}",
        metadata={},
        source=text.splitlines(keepends=True),
    )


def title_alone(nb):
    "Leave the title and the line below it alone in their cell. True when there was more in it."
    i = title_of(nb)
    m = re.match(r"(# .+\n+> .+)\n+(?=\S)", "".join(nb["cells"][i]["source"])) if i >= 0 else None
    if not m:
        return False
    rest = "".join(nb["cells"][i]["source"])[m.end() :]
    nb["cells"][i]["source"] = m[1].splitlines(keepends=True)
    nb["cells"].insert(i + 1, words(rest))
    return True


def link(path, where):
    "The line under a notebook's title."
    return f"[Open in Colab]({COLAB}{where}/blob/main/{path.relative_to(ROOT).as_posix()})"


def install(where):
    "The cell that does nothing but in Colab. It is plain Python, so that a notebook is a script, too."
    package = f"install -q 'msinet @ git+https://github.com/{where}'"
    return (
        "#| hide\nif 'google.colab' in str(globals().get('get_ipython')):\n"
        f"    get_ipython().run_line_magic('pip', \"{package}\")"
    )


def open_in_colab(nb, path, where):
    "Give a notebook its link and its cell, under the title. True when something changed."
    before = json.dumps(nb)
    nb["cells"] = [
        c
        for c in nb["cells"]
        if not re.match(r"\[Open in Colab\]\(|#\| hide\nif 'google.colab' in", "".join(c["source"]))
    ]
    code = dict(
        cell_type="code",
        execution_count=None,
        id=f"{zlib.crc32(path.name.encode() + b' colab'):08x}",
        metadata={},
        outputs=[],
        source=install(where).splitlines(keepends=True),
    )
    i = title_of(nb) + 1
    nb["cells"][i:i] = [words(link(path, where), path.name), code]
    return json.dumps(nb) != before


def is_check(cell):
    "Whether a cell checks an answer of the class."
    return cell["cell_type"] == "code" and re.match(r"(#\|.*\n)*check\(", "".join(cell["source"])) is not None


def fold(nb):
    "Fold the checks, in JupyterLab and on the site. True when something changed."
    before = json.dumps(nb)
    for c in filter(is_check, nb["cells"]):
        c["metadata"] = {"jupyter": {"source_hidden": True}}
        c["source"] = [
            "#| code-fold: true\n",
            "#| code-summary: Check\n",
            *(line for line in c["source"] if not line.startswith("#|")),
        ]
    return json.dumps(nb) != before


if __name__ == "__main__":
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        nb = json.loads(path.read_text(encoding="utf-8"))
        if any(
            [tidy(nb), title_alone(nb), open_in_colab(nb, path, address()), path.parent.name == "class" and fold(nb)]
        ):
            path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
