"""The site without Quarto: every page as HTML in `_docs_check/`, and one line for each fault. `make docs-check` runs
it.

Pages are processed as `nbdev_docs` would process them (into `_proc/`), then rendered by nbconvert. What Quarto and
nbconvert do
differently is done Quarto's way: addresses, names of anchors, front matter, `:::` boxes, the order of the sidebar."""

import json
import multiprocessing
import os
import posixpath
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).parent.parent
OUT = "_docs_check"
LIMIT = 3_000_000  # bytes of a page that still opens at once on a phone
NO_WORDS = "No description has been provided for this image"  # what nbconvert writes where an image has none
# equations, for whoever reads a page while connected; no check needs it
MATHJAX = r"""<script>MathJax = {tex: {inlineMath: [['$', '$'], ['\\(', '\\)']]}}</script>
<script defer src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"></script>"""


# ---------------------------------------------------------------- the sidebar


def matches(pattern, name):
    "Quarto's globs: `/a*.ipynb` lies at the root, `a/*.ipynb` anywhere; `*` stays inside one folder."
    parts, names = pattern.lstrip("/").split("/"), name.split("/")
    if len(names) < len(parts) or (pattern.startswith("/") and len(names) != len(parts)):
        return False
    return all(map(fnmatchcase, names[-len(parts) :], parts))


def expand(contents, names):
    "The `contents` of a sidebar as rows (depth, text or None, page or None), globs expanded in alphabetical order."
    rows = []
    for item in contents if isinstance(contents, list) else [contents]:
        if isinstance(item, str):
            item = {"auto": item} if "*" in item else {"href": item}
        globs = item.get("auto", [])
        for glob in globs if isinstance(globs, list) else [globs]:
            found = sorted(
                (n for n in names if matches(glob, n) and posixpath.basename(n) != "index.ipynb"),
                key=lambda n: posixpath.basename(n).upper(),
            )
            rows += [(0, None, n) for n in found]
        if "section" in item or "href" in item:
            rows.append((0, item.get("section", item.get("text")), item.get("href")))
        rows += [(d + 1, t, n) for d, t, n in expand(item.get("contents", []), names)]
    return rows


def sidebar(nbs, names):
    "Rows of `nbs/sidebar.yml` for the notebooks `names`."
    conf = yaml.safe_load((nbs / "sidebar.yml").read_text(encoding="utf-8"))
    return expand(conf["website"]["sidebar"]["contents"], names)


def navbar(root):
    "What the bar at the top says and where it leads; a menu leads to its first page."
    items = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]["navbar"]["left"]
    return [(i["text"], i.get("href") or i["menu"][0]) for i in items]


# ---------------------------------------------------------------- one page


def slug(text):
    """The anchor of a heading, as pandoc makes it: lower case, no punctuation but `_-.`, hyphens for spaces, from
    the first letter on."""
    s = re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", text).strip().lower())
    return re.sub(r"^[^a-zà-￿]+", "", s) or "section"


def plain_markdown(text):
    """Quarto's markdown as plain markdown: boxes are `div`s, attributes go; ids of headings and equations stay as
    anchors."""
    out, fenced = [], False
    for line in text.split("\n"):
        if re.match(r"\s*(```|~~~)", line):
            fenced = not fenced
        if not fenced:
            m = re.match(r":::+\s*\{?([^}]*)\}?\s*$", line)
            if m:
                line = f'\n<div class="{m[1].replace(".", "").strip()}">\n' if m[1].strip() else "\n</div>\n"
            line = (
                re.sub(r"\s*\{#([\w-]+)[^}]*\}\s*$", r' <span id="\1"></span>', line)
                if re.match(r"#+ |.*\$\$\s*\{#", line)
                else line
            )
            line = re.sub(r"(\]\([^)]*\))\{[^}]*\}", r"\1", line)
        out.append(line)
    return "\n".join(out)


class Seen(HTMLParser):
    """Anchors, links and images of a page, each with the heading it stands under; `mute` are those of images that
    no words stand in for."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.images, self.mute, self.under, self.heading = set(), [], [], [], "the top", None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k) and (k == "id" or tag == "a")}
        if re.fullmatch("h[1-6]", tag):
            self.heading = ""
        if tag == "a" and "href" in a:
            self.links.append((a["href"] or "", self.under))
        if tag == "img":
            self.images.append(((a.get("src") or "")[:500], self.under))
            self.mute += [self.under] * ((a.get("alt") or NO_WORDS) == NO_WORDS)

    def handle_data(self, data):
        if self.heading is not None:
            self.heading += data

    def handle_endtag(self, tag):
        if re.fullmatch("h[1-6]", tag) and self.heading is not None:
            self.under, self.heading = f"“{' '.join(self.heading.split())}”", None


@dataclass
class Page:
    name: str  # its notebook, relative to the folder of notebooks: `paper/fig1.ipynb`
    cells: list  # of the processed notebook, or of the notebook itself
    html: str = ""  # the body
    faults: list = field(default_factory=list)

    def __post_init__(self):
        first = next((text(c) for c in self.cells if text(c).strip()), "")
        m = (
            re.match(r"\s*---\s*\n(.*?)\n---", first, re.S)
            if self.cells and self.cells[0]["cell_type"] == "raw"
            else None
        )
        self.front = yaml.safe_load(m[1]) if m else {}
        self.title = self.front.get("title") or (re.search(r"^# (.+)", first, re.M) or [0, self.name])[1]
        self.line = self.front.get("description") or (re.search(r"^> (.+)", first, re.M) or [0, ""])[1]
        self.address = posixpath.join(
            posixpath.dirname(self.name), self.front.get("output-file", posixpath.basename(self.name)[:-6] + ".html")
        )


def text(cell):
    return "".join(cell["source"] or "")


def render(page, exporter):
    "Fill `page.html`, the body, from its cells. Faults that only cells show are noted."
    import nbformat

    cells = []
    for n, c in enumerate(page.cells):
        source, outs = text(c), c.get("outputs", [])
        page.faults += [
            f"cell {n}: error output {o.get('ename')}: {str(o.get('evalue'))[:80]}"
            for o in outs
            if o["output_type"] == "error"
        ]
        if c["cell_type"] == "raw" or not source.strip() or source.startswith("<!-- WARNING"):
            continue
        if c["cell_type"] == "markdown":
            cells.append(nbformat.v4.new_markdown_cell(plain_markdown(source)))
            continue
        shown = re.search(r"^show_doc\((.*?)\)", source, re.M)
        docs = ["".join(o["data"]["text/markdown"]) for o in outs if "text/markdown" in o.get("data", {})]
        if shown and not docs:
            page.faults.append(f"cell {n}: show_doc({shown[1]}) gave nothing")
        if shown and "#| echo: false" in source:
            cells += [nbformat.v4.new_markdown_cell(plain_markdown(d)) for d in docs]
            continue
        code = "\n".join(s for s in source.split("\n") if not s.startswith("#|"))
        alt = re.search(r"^#\| *fig-alt: *(.+)", source, re.M)
        if folded := "#| code-fold: true" in source:
            cells.append(
                nbformat.v4.new_markdown_cell(
                    f"<details><summary>Check</summary>\n\n```python\n{code}\n```\n\n</details>"
                )
            )
        c = nbformat.from_dict(
            dict(
                c,
                source=code,
                execution_count=None,
                metadata={"tags": ["folded"] * folded, **({"alt": alt[1]} if alt else {})},
            )
        )
        for o in c.outputs:
            for at, keys in ((o, ("text",)), (o.get("data", {}), o.get("data", {}).keys())):
                at.update({k: "".join(at[k]) for k in keys if isinstance(at.get(k), list)})
        cells.append(c)
    body = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=cells))[0]
    seen = {}

    def heading(m):
        s = slug(unescape(re.sub("<.*?>", "", m[3])))
        seen[s] = seen.get(s, -1) + 1
        return f'<h{m[1]} id="{s}{"-" + str(seen[s]) if seen[s] else ""}"{m[2]}>{m[3]}</h{m[1]}>'

    page.html = re.sub(r"<h([1-6])((?:(?! id=)[^>])*)>(.*?)</h\1>", heading, body, flags=re.S)


# ---------------------------------------------------------------- what is wrong


def link_fault(href, page, pages, seen, nbs, home=""):
    "What is wrong with a link, or ''. `pages` by name, `seen` their anchors by name, `home` the site's own address."
    url = urlsplit(href)
    if home and href.startswith(home):
        path = next(
            (p.name for p in pages.values() if p.address == url.path.removeprefix(urlsplit(home).path).lstrip("/")),
            None,
        )
        if path is None:
            return "no such page on this site"
    elif url.scheme in ("http", "https"):
        return "" if re.fullmatch(r"[\w.-]+(:\d+)?", url.netloc) and " " not in href else "not a web address"
    elif url.scheme:
        return "" if url.scheme in ("mailto", "data") else "neither a page nor a web address"
    elif href.startswith("/"):
        return "starts with /; write it relative to the notebook"
    else:
        path = (
            posixpath.normpath(posixpath.join(posixpath.dirname(page.name), unquote(url.path)))
            if url.path
            else page.name
        )
        if path not in pages:
            if path.startswith("../"):
                return "leads out of the folder of notebooks, so it isn't on the site"
            return (
                ""
                if path[-6:] != ".ipynb" and (nbs / path).is_file()
                else "no such notebook"
                if path[-6:] == ".ipynb"
                else "no such file"
            )
    return "" if not url.fragment or unquote(url.fragment) in seen[path].ids else f"no anchor #{url.fragment} in {path}"


def image_fault(src, page, nbs):
    if not src:
        return "an image without a source"
    if src.startswith("data:") or urlsplit(src).scheme in ("http", "https"):
        return ""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page.name), unquote(src)))
    return "" if (nbs / path).is_file() else f"no such image: {src}"


def equation_faults(page):
    "References to equations (`@eq-x`, `\\eqref{x}`) that nothing is labelled with."
    md = "\n".join(
        re.sub(r"```.*?```|`[^`]*`", "", text(c), flags=re.S) for c in page.cells if c["cell_type"] == "markdown"
    )
    labels = set(re.findall(r"\{#(eq-[\w-]+)", md)) | set(re.findall(r"\\label\{(.+?)\}", md))
    asked = re.findall(r"(?<![\w`])@(eq-[\w-]+)", md) + re.findall(r"\\(?:eq)?ref\{(.+?)\}", md)
    return [f"equation {a} is not on this page" for a in dict.fromkeys(asked) if a not in labels]


def faults(pages, rows, nbs, home=""):
    "All faults of rendered pages, as lines `page: what, where`."
    seen, said = {p.name: Seen(p.html) for p in pages.values()}, []
    for p in pages.values():
        lines = [*p.faults, *equation_faults(p)]
        lines += [
            f"{why}: {href}, under {under}"
            for href, under in seen[p.name].links
            if (why := link_fault(href, p, pages, seen, nbs, home))
        ]
        lines += [f"{why}, under {under}" for src, under in seen[p.name].images if (why := image_fault(src, p, nbs))]
        if mute := seen[p.name].mute:
            lines.append(
                f"{len(mute)} of its images without words for those who can't see them, the first under {mute[0]}: "
                "#| fig-alt: what is to be seen"
            )
        if len(p.html.encode()) > LIMIT:
            lines.append(f"{len(p.html.encode()) / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}")
        said += [f"{p.name}: {line}" for line in lines]
    listed = [n for _, _, n in rows if n]
    said += [f"{n}: not in the sidebar" for n in pages if n not in listed]
    said += [f"{n}: in the sidebar, and no such notebook" for n in dict.fromkeys(listed) if n not in pages]
    where = {}
    for p in pages.values():
        where.setdefault(p.address, []).append(p.name)
    return said + [f"{' and '.join(ns)}: the same address {a}" for a, ns in where.items() if len(ns) > 1]


def lost_words(cells):
    """Words of a notebook's first markdown cell that no page shows: nbdev takes all of it for the title and the
    line below."""
    first = next((text(c) for c in cells if c["cell_type"] == "markdown"), "")
    rest = re.sub(r"\A\s*# .+\n+(> .+\n?)?", "", first).strip()
    return (
        ""
        if not rest
        else f"“{' '.join(rest.split())[:40]}…” stands in the title's cell and is lost; put it into a cell of its own "
        "(make export does)"
    )


# ---------------------------------------------------------------- reading and writing


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def why(error):
    """The exception of a cell, out of the traceback that a worker sends: the first line `Name: text` that isn't
    indented."""
    first = re.search(r"^(\w*(?:Error|Exception|Warning|Interrupt)\b.*)$", str(error.__cause__ or ""), re.M)
    return f"nbdev can't process it: {str(error).splitlines()[0][:80]} {first[1][:120] if first else ''}"


def notebooks(nbs):
    return {
        p.relative_to(nbs).as_posix(): p
        for p in sorted(nbs.rglob("*.ipynb"))
        if not any(x[0] in "._" for x in p.relative_to(nbs).parts)
    }


def read_processed(root, workers=2):
    "Pages as `nbdev_docs` would make them, and lines about notebooks that it couldn't make."
    from nbdev import serve_drv
    from nbdev.config import get_config
    from nbdev.processors import FilterDefaults

    os.chdir(root)
    nbs, proc = root / get_config().nbs_path, root / "_proc"
    shutil.rmtree(proc, ignore_errors=True)
    found = notebooks(nbs)
    for name in found:
        (proc / name).parent.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONWARNINGS"] = "ignore"
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn")
    ) as pool:  # IPython takes over a worker's __main__, so no function from here runs there
        jobs = [pool.submit(serve_drv.main, (p, proc / n, FilterDefaults)) for n, p in found.items()]
    said = [why(j.exception()) if j.exception() else "" for j in jobs]
    pages = {n: Page(n, read(proc / n if not bad else found[n])) for n, bad in zip(found, said)}
    for (n, p), bad in zip(found.items(), said):
        pages[n].faults += [f for f in (bad, lost_words(read(p))) if f]
    return pages


def exporter():
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    return HTMLExporter(
        config=Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags={"folded"})),
        template_name="basic",
        exclude_anchor_links=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        embed_images=False,
    )


def shell(page, rows, pages, title, bar):
    "The whole page: top bar, sidebar, body, the pages before and after."
    up = "../" * page.name.count("/")
    at = [n for _, _, n in rows if n in pages]
    i = at.index(page.name) if page.name in at else None
    link = lambda n, label, cls="": f'<a class="{cls}" href="{up}{pages[n].address}">{escape(label)}</a>'
    nav = "".join(
        f'<li class="d{d}">'
        + (link(n, t or pages[n].title, "here" * (n == page.name)) if n in pages else f"<b>{escape(t or '')}</b>")
        + "</li>"
        for d, t, n in rows
    )
    ends = (
        ""
        if i is None
        else "".join(
            link(at[j], label.format(pages[at[j]].title)) if 0 <= j < len(at) else "<span></span>"
            for j, label in ((i - 1, "←\u00a0{}"), (i + 1, "{}\u00a0→"))
        )
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)} – {escape(title)}</title>
<link rel="stylesheet" href="{up}site.css"><link rel="icon" href="{up}favicon.svg">
{MATHJAX}</head><body>
<header><a href="{up}index.html"><b>{escape(title)}</b></a>{''.join(link(n, t) for t, n in bar if n in pages)}</header>
<div class="page"><details class="side" open><summary>Pages</summary><nav><ul>{nav}</ul></nav></details>
<main><h1>{escape(page.title)}</h1><p class="line">{escape(page.line)}</p>{page.html}
<div class="ends">{ends}</div></main></div>
<script>if (innerWidth < 900) document.querySelector('.side').open = false;
document.querySelector('.here')?.scrollIntoView({{block: 'center'}}); scrollTo(0, 0)</script>
</body></html>"""


def relinked(html, page, pages, home=""):
    "Links to notebooks as links to their pages."

    def to(m):
        url = urlsplit(unescape(m[1]))
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.name), unquote(url.path)))
        if home and m[1].startswith(home):
            return f'href="{"../" * page.name.count("/")}{m[1][len(home) :].lstrip("/")}"'
        if url.scheme or path not in pages:
            return m[0]
        return f'href="{"../" * page.name.count("/")}{pages[path].address}{"#" + url.fragment if url.fragment else ""}"'

    return re.sub(r'href="([^"]*)"', to, html)


def write_site(pages, rows, nbs, out, title, home="", bar=()):
    "Every page, one style sheet, the images that pages name."
    from pygments.formatters import HtmlFormatter

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    colours = (
        HtmlFormatter(style="default").get_style_defs(".highlight")
        + "\n@media (prefers-color-scheme: dark) {\n"
        + HtmlFormatter(style="github-dark").get_style_defs(".highlight")
        + "\n}\n"
    )
    (out / "site.css").write_text(
        colours + Path(__file__).with_suffix(".css").read_text(encoding="utf-8"), encoding="utf-8"
    )
    for p in pages.values():
        to = out / p.address
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(relinked(shell(p, rows, pages, title, bar), p, pages, home), encoding="utf-8")
        for src, _ in Seen(p.html).images:
            if src and not urlsplit(src).scheme and (nbs / posixpath.dirname(p.name) / src).is_file():
                (to.parent / src).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(nbs / posixpath.dirname(p.name) / src, to.parent / src)
    if (nbs / "favicon.svg").exists():
        shutil.copy(nbs / "favicon.svg", out)


def main(root=ROOT):
    from nbdev.config import get_config

    start = time.time()
    pages = read_processed(root)
    cfg = get_config()
    nbs, home, to_html = root / cfg.nbs_path, cfg.doc_host + cfg.doc_baseurl, exporter()
    rows = sidebar(nbs, pages)
    for p in pages.values():
        render(p, to_html)
    said = faults(pages, rows, nbs, home)
    write_site(pages, rows, nbs, root / OUT, cfg.title, home, navbar(root))
    big = max(pages.values(), key=lambda p: len(p.html))
    print("\n".join(said))
    print(
        f"{len(pages)} pages in {OUT}/, the largest {len(big.html) / 1e6:.2f} MB ({big.name}), {len(said)} faults, "
        f"{time.time() - start:.0f} s"
    )
    return bool(said)


if __name__ == "__main__":
    sys.exit(main())
