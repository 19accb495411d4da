"""A hook of mkdocs: links that lead out of docs/ work on the site too.

On GitHub a page may link to any file of the repository. For the site every such file becomes a page
under repository/ (text as it is, code in a block), and the links follow.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = Path(__file__).resolve().parent
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")
PICTURES = {".svg", ".png"}
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp"}


def source_of(uri: str) -> Path:
    """The repository's file behind a page of the site."""
    path, inside, rest = uri.partition("repository/")
    if path or not inside:
        return DOCS / uri
    return ROOT / rest if (ROOT / rest).exists() else ROOT / rest.removesuffix(".md")


def uri_of(source: Path) -> str:
    """Where the site has a file of the repository."""
    if source.is_relative_to(DOCS):
        return source.relative_to(DOCS).as_posix()
    uri = "repository/" + source.relative_to(ROOT).as_posix()
    return uri if source.suffix in {".md", *PICTURES} else uri + ".md"


def targets(uri: str, markdown: str) -> list[tuple[str, Path]]:
    """(link, file) for every link of a page to a file of the repository."""
    folder = source_of(uri).parent
    found = [(link, (folder / link).resolve()) for _, link in LINK.findall(markdown)]
    return [(link, path) for link, path in found if path.is_file() and ROOT in path.parents]


def as_page(source: Path) -> str:
    """Markdown for a file: itself, or its code in a block."""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".md":
        return text
    language = LANGUAGES.get(source.suffix, "text")
    name = source.relative_to(ROOT).as_posix()
    return f"# {name}\n\n````{language}\n{text.rstrip()}\n````\n"


def on_files(files: Files, config: Any) -> Files:
    """Adds every file outside docs/ that a page links to, and those that these link to."""
    pages = [(f.src_uri, f.content_string) for f in files.documentation_pages()]
    while pages:
        uri, markdown = pages.pop()
        for _, path in targets(uri, markdown):
            new = uri_of(path)
            if path.is_relative_to(DOCS) or files.get_file_from_path(new) is not None:
                continue
            if path.suffix in PICTURES:
                files.append(File.generated(config, new, abs_src_path=str(path)))
                continue
            text = as_page(path)
            files.append(File.generated(config, new, content=text))
            if path.suffix == ".md":
                pages.append((new, text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns a page's links to files of the repository into links to pages of the site."""
    uri = page.file.src_uri
    where = {link: uri_of(path) for link, path in targets(uri, markdown)}

    def follow(match: re.Match[str]) -> str:
        new = where.get(match[2])
        if new is None or files.get_file_from_path(new) is None:
            return match[0]
        return match[1] + posixpath.relpath(new, posixpath.dirname(uri) or ".")

    return LINK.sub(follow, markdown)
