"""The pages of the public classes: autodoc's rules show every public member, inherited ones too."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
TEMPLATE = (DOCS / "_templates/autosummary/class.rst").read_text("utf-8")
LISTS = "\n".join(page.read_text("utf-8") for page in sorted((DOCS / "api").glob("*.md")))
ENTRIES = sorted(set(re.findall(r"^ {4,}([\w.]+)$", LISTS, re.MULTILINE)))
MEMBERS = (property, functools.cached_property, classmethod, staticmethod)


def classes():
    """The classes that have a page, by name."""
    pytest.importorskip("torch")
    found = {entry: pkgutil.resolve_name(entry) for entry in ENTRIES}
    return {entry: value for entry, value in found.items() if inspect.isclass(value)}


def owners(cls, name):
    """The classes of the library that define a member."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("superlora")]
    return [base for base in own if name in vars(base)]


def public_members(cls):
    """The public methods and properties of a class that the library defines."""
    for name in dir(cls):
        if not name.startswith("_") and (found := owners(cls, name)):
            value = vars(found[0])[name]
            if inspect.isfunction(value) or isinstance(value, MEMBERS):
                yield name


def is_shown(cls, name, template):
    """Whether autodoc shows a member by a template's options: not from the bases they name on."""
    if ":members:" not in template or not inspect.getdoc(getattr(cls, name)):
        return False
    named = re.search(r":inherited-members: (.+)", template)
    for base in cls.__mro__:
        if base is not cls and (named is None or base.__name__ in named[1].split(", ")):
            return False
        if name in vars(base):
            return True
    return False


def missing(template):
    """The public members that a template does not show, with their classes."""
    return [
        f"{entry}.{name}"
        for entry, cls in classes().items()
        for name in public_members(cls)
        if not is_shown(cls, name, template)
    ]


def test_every_public_method_and_property_is_on_the_page_of_its_class():
    assert missing(TEMPLATE) == []


def test_without_inherited_members_or_with_a_base_of_our_own_left_out_some_are_missing():
    alone = TEMPLATE.replace(":inherited-members:", "")
    assert "superlora.maps.Fastfood.adjoint" in missing(alone)
    assert "superlora.maps.Fastfood.joined" in missing(TEMPLATE.replace("Module", "Map"))
    assert "superlora.Plan.fit" in missing(TEMPLATE.replace("   :members:", ""))


def test_every_field_is_named_where_the_class_or_a_base_with_a_page_is_described():
    found = classes()
    unnamed = []
    for entry, cls in found.items():
        bases = [base for base in cls.__mro__ if base in found.values()]
        text = "\n".join(inspect.cleandoc(base.__doc__ or "") for base in bases)
        lists = re.findall(r"^(\w+(?:, \w+)*) : ", text, re.MULTILINE)
        named = {name for names in lists for name in names.split(", ")}
        fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
        public = {item.name for item in fields if not item.name.startswith("_")}
        unnamed += [f"{entry}.{name}" for name in sorted(public - named)]
    assert unnamed == []


@pytest.mark.parametrize("module", ["superlora.maps", "superlora.torch.on_disk"])
def test_public_names_of_the_inner_modules_have_a_page(module):
    pytest.importorskip("torch")
    public = importlib.import_module(module).__all__
    assert [name for name in public if f"{module}.{name}" not in ENTRIES] == []
