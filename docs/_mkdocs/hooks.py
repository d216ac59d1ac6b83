"""What the site has from outside of docs/, and where links to it lead."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# Files of the repository and what they are on the site.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PICTURES = {f"bench/results/{path.name}": path.name for path in ROOT.glob("bench/results/*.png")}
LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for source, name in PICTURES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository lead to their pages, or are their words alone.

    What links lead to is looked up from where the file lies, so that they work in the repository,
    too.
    """
    folder = (ROOT / "docs" / page.file.src_uri).parent
    for source, name in PAGES.items():
        if page.file.src_uri == name:
            folder = (ROOT / source).parent

    def rewritten(link: re.Match[str]) -> str:
        mark, words, target, anchor = link.groups()
        path = (folder / target).resolve().relative_to(ROOT).as_posix()
        if name := (PAGES | PICTURES).get(path):
            up = "../" * page.file.src_uri.count("/")
            return f"{mark}[{words}]({up}{name}{anchor or ''})"
        if path.startswith("docs/"):
            up = "../" * page.file.src_uri.count("/")
            return f"{mark}[{words}]({up}{path.removeprefix('docs/')}{anchor or ''})"
        return words

    return LINK.sub(rewritten, markdown)
