"""VTAB-1K's folders and lists, on small ones that are written here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optuna")
pytest.importorskip("PIL")

from PIL import Image  # noqa: E402

from superlora.demo.search_config import ConfigError, load_config  # noqa: E402
from superlora.demo.tasks import vtab_task  # noqa: E402
from superlora.demo.vtab import DataError, read_image, read_lists  # noqa: E402
from tests.demo.search_cases import make_vtab  # noqa: E402

TASK = "dsprites_loc"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_vtab(tmp_path)


def test_the_parts_are_those_of_the_lists(folder: Path) -> None:
    lists = read_lists(folder, TASK, 16, 8)
    assert [len(part) for part in (lists.train, lists.validation, lists.both, lists.test)] == [
        32,
        16,
        48,
        16,
    ]
    assert lists.train.labels.tolist() == [number % 16 for number in range(32)]
    assert lists.both.paths == lists.train.paths + lists.validation.paths
    drawn = lists.test[torch.tensor([5, 2])]
    assert drawn.labels.tolist() == [5, 2]
    assert drawn.pixels.shape == (2, 3, 8, 8)
    assert drawn.pixels.dtype == torch.uint8
    assert drawn.pixels[0, :, 3, 3].tolist() == [75, 180, 40]
    assert drawn.pixels[1, :, 7, 0].tolist() == [30, 225, 40]


def test_a_task_is_trained_on_800_and_searched_on_200(folder: Path) -> None:
    task = vtab_task(folder, TASK, load_config("vtab-1k", quick=True))
    assert (task.name, task.classes, task.resolution) == (TASK, 16, 56)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [32, 16, 16]
    assert task.train.pixels.shape == (32, 3, 56, 56)
    before = task.digest()
    Image.new("RGB", (5, 5), (1, 2, 3)).save(folder / TASK / "images/val200/000001.png")
    assert vtab_task(folder, TASK, load_config("vtab-1k", quick=True)).digest() != before


def test_images_of_any_kind_become_squares_in_colour(tmp_path: Path) -> None:
    Image.linear_gradient("L").save(tmp_path / "grey.jpg")
    grey = read_image(tmp_path / "grey.jpg", 16)
    assert grey.shape == (3, 16, 16)
    assert torch.equal(grey[0], grey[1])
    assert (grey[0, 1:].int() >= grey[0, :-1].int()).all()  # darker above
    Image.new("RGBA", (9, 30), (10, 20, 30, 255)).save(tmp_path / "tall.png")
    assert read_image(tmp_path / "tall.png", 4).flatten(1)[:, 0].tolist() == [10, 20, 30]


def test_paths_may_have_spaces_and_lines_may_be_empty(folder: Path) -> None:
    own = folder / TASK
    (own / "images/test/000003.png").rename(own / "images/test/an image.png")
    text = (own / "test.txt").read_text().replace("000003.png", "an image.png")
    (own / "test.txt").write_text(f"\n{text}\n  \n")
    lists = read_lists(folder, TASK, 16, 8)
    assert lists.test.paths[3].name == "an image.png"


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("train800.txt", "images/train800/000000.png", r"line 2, must be a path and a class"),
        ("val200.txt", "images/val200/000000.png 16", r"class from 0 to 15: got '16'"),
        ("test.txt", "images/test/000000.png x", r"class from 0 to 15: got 'x'"),
        ("test.txt", "images/test/000000.png -1", r"class from 0 to 15: got '-1'"),
        ("test.txt", "images/test/000000.png 1_0", r"class from 0 to 15: got '1_0'"),
        ("test.txt", "images/test/999999.png 1", r"line 2, must name an image .* no images/test/9"),
        ("test.txt", "../outside.png 1", r"line 2, must name a path inside the folder"),
        ("test.txt", "/etc/hostname 1", r"line 2, must name a path inside the folder"),
        ("test.txt", "images/train800/000000.png 0", r"share no image with the training part"),
        ("val200.txt", "images/train800/000000.png 0", r"share no image with the training part"),
    ],
)
def test_a_bad_line_is_named(folder: Path, file: str, line: str, message: str) -> None:
    path = folder / TASK / file
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(DataError, match=message) as caught:
        read_lists(folder, TASK, 16, 8)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("file", ["train800.txt", "val200.txt", "train800val200.txt", "test.txt"])
def test_a_missing_or_empty_list_is_named(folder: Path, file: str) -> None:
    path = folder / TASK / file
    path.write_text("\n")
    with pytest.raises(DataError, match=f"{file} must list at least one image"):
        read_lists(folder, TASK, 16, 8)
    path.unlink()
    with pytest.raises(DataError, match=f"{file} must be there"):
        read_lists(folder, TASK, 16, 8)


def test_a_missing_folder_and_a_broken_image_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match="must have a folder 'svhn'"):
        read_lists(folder, "svhn", 10, 8)
    (folder / TASK / "images/val200/000001.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"val200/000001\.png must be an image"):
        read_lists(folder, TASK, 16, 8).validation.read()


def test_the_config_has_the_19_tasks() -> None:
    config = load_config("vtab-1k")
    assert {group: len(tasks) for group, tasks in config.tasks.items()} == {
        "natural": 7,
        "specialised": 4,
        "structured": 8,
    }
    counts = [count for tasks in config.tasks.values() for count in tasks.values()]
    assert counts == [100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9]
    assert (config.resolution, config.supernet.epochs, config.search.trials) == (224, 500, 1000)
    assert config.search.evolution().probability == 0.2
    with pytest.raises(ValueError, match=r"task must be one of .*'svhn'.*: got 'mnist'"):
        config.classes("mnist")


def test_quick_changes_what_its_section_says_alone() -> None:
    whole, quick = load_config("vtab-1k"), load_config("vtab-1k", quick=True)
    assert quick.supernet.epochs < whole.supernet.epochs
    assert quick.supernet.rate == whole.supernet.rate
    assert quick.tasks == whole.tasks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data = 1", r"data must be one of \['digits', 'vtab-1k'\]: got 1"),
        ('data = "digits"\nresolution = 7', "resolution must be at least 14: got 7"),
        ('data = "digits"\nresolution = 40', "resolution must be a multiple of 14: got 40"),
        ('data = "digits"\nsize = 7', "must have keys of .*'resolution'.*: got 'size'"),
        ('data = "digits"\n[supernet]\nlr = 1', "supernet must have keys of .*: got 'lr'"),
        ('data = "digits"\n[supernet]\nrate = 0', "rate must be positive: got 0"),
        ('data = "digits"\n[supernet]\nrate = "a"', "rate must be a number: got 'a'"),
        ('data = "digits"\n[supernet]\nranks = []', "ranks must be a sequence of integers"),
        ('data = "digits"\n[supernet]\nranks = 3', "ranks must be a sequence of integers"),
        ('data = "digits"\n[supernet]\nrates = 3', "rates must be a section: got 3"),
        ('data = "digits"\n[supernet.rates]\nbias = 3', "operations in rates must be one of"),
        ('data = "digits"\n[supernet.rates]\nadd_bias = -1', "add_bias must be positive: got -1"),
        ('data = "digits"\n[supernet.options]\nbias = []', "operations in options must be one of"),
        (
            'data = "digits"\n[supernet.options]\nadd_weight = "none"',
            "options.add_weight must be a list, not empty: got 'none'",
        ),
        ('data = "digits"\n[supernet.options]\nadd_bias = []', "must be a list, not empty"),
        (
            'data = "digits"\n[supernet.options]\nadd_bias = ["rank"]',
            r"options.add_bias must be of \['vector', 'constant', 'none'\]: got 'rank'",
        ),
        ('data = "digits"\n[supernet.options]\nadd_weight = ["rank", 8]', "must be of .*: got 8"),
        (
            'data = "digits"\n[supernet.options]\nadd_weight = ["none", "none"]',
            "options.add_weight must be distinct",
        ),
        ('data = "digits"\ntasks = 3', "tasks must be a section: got 3"),
        ('data = "digits"\n[tasks]\nnatural = 3', "tasks.natural must be a section: got 3"),
        ('data = "digits"\nquick = 3', "quick must be a section: got 3"),
        ('data = "digits" # nothing quick', "must have a section quick"),
        ('data = "digits"\nsearch = 3', "search must be a section: got 3"),
        ('data = "digits"\n[search]\npopulation = 10', "at least mutations"),
        ("resolution = 56", "must say which data: expected one of"),
        ("data = ", "must be a TOML file"),
    ],
)
def test_a_bad_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(str(path), quick="quick" in text)
    assert str(path) in str(caught.value)


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config must be one of .*'digits'.*: got"):
        load_config(str(tmp_path / "no.toml"))


def test_the_config_of_the_docs_is_one(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "glora-experiment.md"
    if not page.exists():
        pytest.skip("the documentation is not part of an installed package")
    (text,) = re.findall(r"^```toml\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    path = tmp_path / "own.toml"
    path.write_text(text)
    found = load_config(str(path)).supernet
    assert found.rates == {"scale_weight": 3e-3}
    operations = found.operations()
    assert operations is not None
    assert operations["add_weight"] == (4, 2, "none")
    assert operations["add_bias"] == ("vector", "constant", "none")
