"""python docs/api.py: writes docs/api.md from the docstrings of the public names."""

import inspect
from pathlib import Path

import mnistnorm

PAGE = Path(__file__).with_name("api.md")

HEAD = """\
# API

What `import mnistnorm` offers, from its docstrings; `python docs/api.py` writes this page.
[layers.md](layers.md) explains the layers, [fuse.md](fuse.md) the conversion of models.
"""


def entry(name: str) -> str:
    """The section of a public name."""
    value = getattr(mnistnorm, name)
    if value.__name__ != name:
        return f"## {name}\n\nAnother name of [{value.__name__}](#{value.__name__.lower()}).\n"
    # Annotations are printed differently by different versions of Python.
    signature = inspect.signature(value)
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    bare = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    summary, _, details = inspect.getdoc(value).partition("\n")
    body = f"\n```text\n{details.strip()}\n```\n" if details.strip() else ""
    return f"## {name}\n\n```python\n{name}{bare}\n```\n\n{summary}\n{body}"


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *map(entry, sorted(mnistnorm.__all__, key=str.lower))])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
