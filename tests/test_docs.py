"The site: its configuration is consistent, every notebook is on it, links work, and `docs_check` finds each fault."

import re
import sys
from pathlib import Path

import docs_check as dc
import nbformat
import pytest
import yaml
from tidy import title_alone

ROOT = Path(__file__).parent.parent

NBS = ROOT / "nbs"
NAMES = dc.notebooks(NBS)


@pytest.fixture(scope="module")
def to_html():
    return dc.exporter()


def md(*texts):
    return [dict(cell_type="markdown", source=t, metadata={}) for t in texts]


def code(source, *outputs):
    return dict(cell_type="code", source=source, metadata={}, execution_count=None, outputs=list(outputs))


def said(tmp_path, to_html, cells, others=(), listed=True):
    "Faults of a site with one page of these cells, and other pages."
    (tmp_path / "here.txt").write_text("a file")
    pages = {n: dc.Page(n, cs) for n, cs in {"a.ipynb": md("# a\n\n> a page", *[]) + cells, **dict(others)}.items()}
    for p in pages.values():
        dc.render(p, to_html)
    rows = [(0, None, n) for n in pages] if listed else []
    return dc.faults(pages, rows, tmp_path, "https://example.org/kit")


FIGURE = dict(output_type="display_data", metadata={}, data={"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"})
OTHER = {"sub/b.ipynb": md("# b", "## Two words, and β\n\n### `fold`")}


def test_a_sound_page_has_no_fault(tmp_path, to_html):
    cells = md(
        "[b](sub/b.ipynb), [there](sub/b.ipynb#two-words-and-β), [and](sub/b.ipynb#fold), [here](#place), "
        "[file](here.txt), [web](https://a.org/x?y=1#z)",
        "## Place\n\nSee @eq-x\n\n$$y=1$$ {#eq-x}",
        "<span id=\"own\"></span>[own](#own) [home](https://example.org/kit/sub/b.html#fold) `[no](link.ipynb)`",
        "```python\n[x](nowhere.ipynb) @eq-none\n```",
    )
    assert said(tmp_path, to_html, cells, OTHER) == []


def test_the_description_of_a_figure_reaches_the_page(to_html):
    page = dc.Page(
        "a.ipynb", [code("#| label: two\n#| fig-alt: Two curves, one <below> the other\ndraw()", FIGURE, FIGURE)]
    )
    dc.render(page, to_html)
    assert (
        page.html.count('alt="Two curves, one &lt;below&gt; the other"') == 2
        and "fig-alt" not in page.html
        and not dc.Seen(page.html).mute
    )


@pytest.mark.parametrize(
    "cells,what",
    [
        (md("[x](nowhere.ipynb)"), "no such notebook"),
        (md("[x](sub/none.txt)"), "no such file"),
        (md("[x](../README.md)"), "leads out"),
        (md("[x](/b.ipynb)"), "starts with /"),
        (md("[x](sub/b.ipynb#three)"), "no anchor #three"),
        (md("## Here\n\n[x](#there)"), "no anchor #there"),
        (md("[x](https://example.org/kit/none.html)"), "no such page"),
        (md("[x](http://)"), "not a web address"),
        (md("[x](htp://a.org)"), "neither a page nor"),
        (md("![x](none.png)"), "no such image"),
        (md("<img alt='x'>"), "without a source"),
        (md("![](data:,)"), "1 of its images without words"),
        (
            [code("draw()", FIGURE, FIGURE)],
            "2 of its images without words for those who can't see them, the first under “a”",
        ),
        (md("as @eq-far says"), "equation eq-far"),
        (md(r"as \eqref{far} says"), "equation far"),
        (
            [
                code(
                    "1/0", dict(output_type="error", ename="ZeroDivisionError", evalue="division by zero", traceback=[])
                )
            ],
            "error output ZeroDivisionError",
        ),
        ([code("#| echo: false\n#| output: asis\nshow_doc(lost)")], "show_doc(lost) gave nothing"),
        (md("x" * (dc.LIMIT + 9)), "MB, more than"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_each_fault_is_found(tmp_path, to_html, cells, what):
    found = said(tmp_path, to_html, cells, OTHER)
    assert len(found) == 1 and found[0].startswith("a.ipynb: ") and what in found[0] and "\n" not in found[0]


def test_faults_of_the_whole_site(tmp_path, to_html):
    assert said(tmp_path, to_html, [], listed=False) == ["a.ipynb: not in the sidebar"]
    front = [dict(cell_type="raw", source="---\ntitle: c\noutput-file: a.html\n---\n", metadata={})]
    assert said(tmp_path, to_html, [], {"c.ipynb": front}) == ["a.ipynb and c.ipynb: the same address a.html"]
    pages = {"a.ipynb": dc.Page("a.ipynb", md("# a"))}
    assert dc.faults(pages, [(0, None, "a.ipynb"), (0, None, "gone.ipynb")], tmp_path) == [
        "gone.ipynb: in the sidebar, and no such notebook"
    ]


def test_a_notebook_that_cannot_be_processed_is_named(tmp_path):
    "As nbdev does it: imports are run, and what stands beside them fails."
    for name in ("settings.ini",):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "nbs").mkdir()
    cells = [
        nbformat.v4.new_code_cell("#| default_exp one"),
        nbformat.v4.new_markdown_cell("# one\n\n> a page\n\nwords"),
        nbformat.v4.new_code_cell("#| export\ndef f(): pass"),
        nbformat.v4.new_code_cell("import json\njson.dumps(t)"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "nbs" / "00_one.ipynb")
    import subprocess

    out = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r})\nif __name__ == '__main__':\n  import pathlib, "
            "docs_check as d\n"
            f"  print(d.read_processed(pathlib.Path({str(tmp_path)!r}), 1)['00_one.ipynb'].faults)",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "NameError: name 't' is not defined" in out and "is lost" in out, out


def test_title_alone():
    nb = dict(cells=md("# one\n\n> a line\n\nWords, and\n\n- more"))
    assert dc.lost_words(nb["cells"])
    assert title_alone(nb) and not title_alone(nb)
    assert [dc.text(c) for c in nb["cells"]] == ["# one\n\n> a line", "Words, and\n\n- more"] and len(
        {c.get("id") for c in nb["cells"]}
    ) == 2
    assert not dc.lost_words(nb["cells"])


def test_globs_and_anchors_are_quartos():
    assert (
        dc.matches("/0[0-9]_*.ipynb", "00_core.ipynb")
        and not dc.matches("/0[0-9]_*.ipynb", "class/01_space.ipynb")
        and not dc.matches("/0[0-9]_*.ipynb", "05a_top15.ipynb")
    )
    assert dc.matches("paper/*.ipynb", "paper/fig1.ipynb") and not dc.matches("paper/*.ipynb", "fig1.ipynb")
    assert (
        dc.slug("The mixed choice (Eq. 1)") == "the-mixed-choice-eq.-1"
        and dc.slug("1. Images") == "images"
        and dc.slug("???") == "section"
    )


def configs():
    return {
        n: yaml.safe_load((ROOT / n).read_text(encoding="utf-8"))
        for n in ("_quarto.yml", "nbs/_quarto.yml", "nbs/sidebar.yml")
    }


def hrefs(node):
    "Every page that a configuration names."
    if isinstance(node, dict):
        return [h for v in node.values() for h in hrefs(v)]
    if isinstance(node, list):
        return [h for v in node for h in hrefs(v)]
    return [node] if isinstance(node, str) and node.endswith(".ipynb") and "*" not in node else []


def test_the_configuration_is_consistent():
    top, inner, side = configs().values()
    assert inner["metadata-files"] == ["../_quarto.yml", "nbdev.yml", "sidebar.yml"]
    settings = (ROOT / "settings.ini").read_text()
    assert re.search(r"^custom_sidebar = True", settings, re.M), "or nbdev writes over nbs/sidebar.yml"
    assert re.search(r"^skip_procs = add_links", settings, re.M), "or nbdev puts links into links"
    theme = inner["format"]["html"]["theme"]
    files = [f for t in theme.values() for f in t if f.endswith("css")] + [inner["website"]["favicon"]]
    assert files and all((NBS / f).is_file() for f in files)
    ready = {n for n in hrefs(top) + hrefs(side) if not n.startswith("class/") or (NBS / "class").exists()}
    assert not ready - set(NAMES), "pages that the navigation names and that are not there"
    git = re.search(r"^git_url = (.+)", settings, re.M)[1]
    assert [i["href"] for i in top["website"]["navbar"]["right"]] == [git], (
        "the address of settings.ini and that of the bar differ"
    )


def test_colours_are_the_kits():
    from msinet.vis import OP_COLORS

    scss = (NBS / "colours.scss").read_text()
    assert [re.search(rf"^\${n}: (#\w+);", scss, re.M)[1] for n in ("none", "exchange", "gate", "attention")] == [
        OP_COLORS[k] for k in "NEGA"
    ]


def test_every_notebook_is_in_the_sidebar_once():
    listed = [n for _, _, n in dc.sidebar(NBS, NAMES) if n]
    assert sorted(n for n in listed if n in NAMES) == sorted(NAMES)


@pytest.fixture(scope="module")
def raw_pages():
    "Pages of the notebooks as they are, markdown only: quick, since nothing is run."
    from nbconvert.filters import markdown2html

    pages = {n: dc.Page(n, [c for c in dc.read(p) if c["cell_type"] == "markdown"]) for n, p in NAMES.items()}
    for p in pages.values():
        html = re.sub(
            '<a class="anchor-link".*?</a>',
            "",
            markdown2html("\n\n".join(dc.plain_markdown(dc.text(c)) for c in p.cells)),
        )
        p.html = re.sub(
            r"<h([1-6])[^>]*>(.*?)</h\1>",
            lambda m: f'<h{m[1]} id="{dc.slug(re.sub("<.*?>", "", m[2]))}">{m[2]}</h{m[1]}>',
            html,
            flags=re.S,
        )
    return pages


def test_links_and_equations_of_all_notebooks(raw_pages):
    found = dc.faults(raw_pages, [(0, None, n) for n in raw_pages], NBS)
    if not (NBS / "class").exists():
        found = [f for f in found if "class/" not in f]
    assert not found, "\n".join(found)


def test_the_glossary_is_sorted_and_linked():
    text = "\n".join(dc.text(c) for c in dc.read(NBS / "guide" / "glossary.ipynb") if c["cell_type"] == "markdown")
    ids, terms = re.findall(r'<span id="([\w-]+)"></span>', text), re.findall(r"</span>\*\*(.+?)\.\*\*", text)
    assert len(ids) == len(set(ids)) == len(terms) >= 60
    assert all(re.search(r"\]\([^)]*ipynb", line) for line in text.split("\n") if line.startswith("<span"))
    heads = re.findall(r"^## (\w)", text, re.M)
    assert heads == sorted(heads)


def test_the_commands_of_the_guide_are_there(monkeypatch, capsys):
    "Every `msinet …` in the guide names a command and options that exist."
    from msinet.cli import main

    texts = "\n".join(
        dc.text(c)
        for n, p in NAMES.items()
        if n.startswith("guide/")
        for c in dc.read(p)
        if c["cell_type"] == "markdown"
    )
    asked = {}
    for line in re.findall(
        r"(?:msinet(?:\.cli)?) "
        r"((?:demo|search|train|evaluate|usl|uda|query|compare|verify|figures|run|table|figure|bench|export|pretrain)\b[^`\n#]*)",
        texts,
    ):
        asked.setdefault(line.split()[0], set()).update(re.findall(r"(--[a-z-]+)", line))
    assert {"run", "train", "search"} <= set(asked)
    for command, options in asked.items():
        monkeypatch.setattr(sys, "argv", ["msinet", command, "--help"])
        with pytest.raises(SystemExit):
            main()
        shown = capsys.readouterr().out
        assert not {o for o in options if not re.search(rf"{o}\b", shown)}, command
