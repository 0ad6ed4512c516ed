"""The documentation: its examples run, and its API pages name everything that is public."""

import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT = ("_build", "auto_gallery", "generated")  # what sphinx-build leaves in docs
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(
        page
        for page in sorted((ROOT / "docs").rglob("*.md"))
        if not set(BUILT) & {*page.relative_to(ROOT).parts}
    ),
]
PAGES_WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def example_model():
    """A model as the README's reader has one."""
    torch = pytest.importorskip("torch")
    return torch.nn.ModuleDict(
        {part: torch.nn.Linear(8, 8) for part in ("query", "value", "q_proj", "v_proj")}
    )


# What a page's examples take for granted.
GIVEN = {"README.md": lambda: {"model": example_model()}}


def api_entries():
    """The names that the lists on the API pages have."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    return set(re.findall(r"^ {4,}([\w.]+)$", text, re.MULTILINE))


def page_id(page):
    return str(page.relative_to(ROOT))


def read_blocks(text):
    """The Python blocks of a page, each after as many newlines as lines stand before it."""
    for match in FENCE.finditer(text):
        yield "\n" * text.count("\n", 0, match.start(1)) + match.group(1)


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=page_id)
def test_examples_of_page_run(page, tmp_path, monkeypatch):
    """The blocks of a page are one program, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__", **GIVEN.get(page_id(page), dict)()}
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for block in read_blocks(page.read_text(encoding="utf-8")):
        if ">>>" not in block:
            exec(compile(block, page_id(page), "exec"), names)
            continue
        example = doctest.DocTestParser().get_doctest(block, names, page_id(page), str(page), 0)
        messages = []
        failed = runner.run(example, out=messages.append, clear_globs=False).failed
        assert failed == 0, "".join(messages)
        names = example.globs


SLOW = ("plot_decompositions", "plot_fastfood_distortion", "plot_kronecker_rank")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SLOW))
        for path in sorted((ROOT / "docs/gallery").glob("plot_*.py"))
    ],
)
def test_pages_of_the_gallery_draw_a_figure(path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    runpy.run_path(str(path))
    numbers = pyplot.get_fignums()
    drawn = [any(own.has_data() for own in pyplot.figure(n).axes) for n in numbers]
    pyplot.close("all")
    assert drawn
    assert all(drawn)


@pytest.mark.parametrize("stage", [page.stem for page in (ROOT / "docs/equation").glob("*.md")])
def test_each_stage_has_a_figure_with_data(stage):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    page = (ROOT / "docs/equation" / f"{stage}.md").read_text("utf-8")
    (name,) = re.findall(r"^\.\. plot:: equation_figures\.py (\w+)$", page, re.MULTILINE)
    runpy.run_path(str(ROOT / "docs/equation_figures.py"))[name]()
    drawn = [axes.has_data() for axes in pyplot.gcf().axes]
    pyplot.close("all")
    assert any(drawn)


def test_blocks_of_failing_page_fail():
    """The extraction finds blocks, and keeps their line numbers."""
    text = "# Page\n\n```python\n>>> 1 + 1\n3\n```\n\n```shell\nls\n```\n"
    (block,) = read_blocks(text)
    example = doctest.DocTestParser().get_doctest(block, {}, "page", "page", 0)
    assert example.examples[0].lineno == 3
    assert doctest.DocTestRunner().run(example, out=lambda message: None).failed == 1


@pytest.mark.parametrize("module", ["superlora", "superlora.search", "superlora.torch"])
def test_api_pages_name_everything_public(module):
    """Each public name is an entry of a list on the API pages."""
    public = importlib.import_module(module).__all__
    missing = [f"{module}.{name}" for name in public if f"{module}.{name}" not in api_entries()]
    assert missing == []


@pytest.mark.parametrize("entry", sorted(api_entries()))
def test_what_api_pages_name_is_there_with_its_parameters(entry):
    if entry.startswith(("superlora.torch.", "superlora.search.")):
        pytest.importorskip("torch")
    value = pkgutil.resolve_name(entry)
    if inspect.isfunction(value) and inspect.signature(value).parameters:
        assert "\nParameters\n----------\n" in (inspect.getdoc(value) or "")
