"""For mkdocs.yml: pages and pictures from outside of docs, and docstrings as Markdown.

Links are written for the repository, where docs/X.md names ../bench/results/X.png. In the site that is results/X.png.
"""

import re
from pathlib import Path

from griffe import Extension
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files, config):
    for page, path in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text().replace("](docs/", "](")))
    text = "".join(page.content_string for page in files.documentation_pages())
    for path in sorted(set(re.findall(r"\]\(\.\./(bench/results/[^)]+)\)", text))):
        if (ROOT / path).is_file():  # mkdocs warns of a link to what is not there
            files.append(File.generated(config, path.removeprefix("bench/"), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, **_):
    markdown = markdown.replace("](../bench/results/", "](results/")
    for page, path in PAGES.items():
        markdown = markdown.replace(f"](../{path}", f"]({page}")
    return markdown


class Markdown(Extension):
    """Docstrings of this repository as Markdown."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A line "name: meaning" becomes an item, with what follows up to an empty line; a formula becomes a paragraph."""
    lines, in_item = [], False
    for line in text.splitlines():
        if item := re.match(r" *([a-z_]\w*(?:, [a-z_]\w*)*): (.*)", line):
            lines += [] if in_item else [""]
            lines.append(f"- `{item[1]}`: {item[2]}")
            in_item = True
        elif in_item and line and not re.match(" *(Returns|Raises|[A-Z][a-z]+:$)", line):
            lines[-1] += f" {line.strip()}"
        else:
            lines += ["", line.strip()] if in_item and line else [re.sub("^ +``", "``", line)]
            in_item = False
    text = "\n".join(lines)
    return re.sub(r"(?m)^- .*", lambda item: re.sub(r"(?<=\.) ([a-z_]\w*): ", r"\n- `\1`: ", item[0]), text)
