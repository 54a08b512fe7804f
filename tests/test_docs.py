"""The pages of docs/ are what the code says, and the README's code runs."""

import re
import runpy
from pathlib import Path

import torch

import mnistnorm

ROOT = Path(__file__).parents[1]


def test_the_api_page_is_what_the_docstrings_say() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "api.py"))
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == script["page"](), "run python docs/api.py"
    assert all(f"## {name}\n" in script["page"]() for name in mnistnorm.__all__)


def test_the_links_of_all_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([^):#]*)#?([^)]*)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{page.name}: {target}#{anchor}"


def test_the_readme_is_short_and_its_code_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    names: dict[str, object] = {"model": torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU())}
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)
