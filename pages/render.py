"""Fills the page templates of this folder: render("rollouts.html", ...) gives one HTML file without outside references.

All text is escaped, so captions and paths are passed as they are; a value that a template lacks is an error. What
several pages share is in macros.html, all styles are in style.css.
"""

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

FRAME_WIDTH = 320  # of the pictures in a page, in pixels
WORST_FIRST = ("unsupported", "unknown", "negated", "supported")  # kinds of marks

_pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                     trim_blocks=True, lstrip_blocks=True)


def render(template: str, **values) -> str:
    return _pages.get_template(template).render(**values)


def page_file(name: str) -> str:
    """The text of a file of this folder, a script for example."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def markdown_table(rows: list[list[str]]) -> str:
    """A table, its head first, as Markdown whose columns are padded, so that it also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        padded = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("| " + " | ".join(padded) + " |")
    return "\n".join(lines) + "\n"


def data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def jpeg_uri(frame, width: int = FRAME_WIDTH) -> str:
    """A frame, uint8 [H, W, 3], as a picture inside the page, `width` pixels wide at most."""
    picture = Image.fromarray(frame)
    picture.thumbnail((width, 10 * width), Image.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82)
    return data_uri(file.getvalue(), "image/jpeg")


def film_strip(frames, labels, boxes=None) -> list[dict]:
    """Frames, uint8 [K, H, W, 3], for the macro film_strip. `labels`: one text per frame.

    `boxes`: per frame a list of (kind, text, x1, y1, x2, y2) with corners as shares of the frame; kind: "present",
    "unknown" or "absent".
    """
    boxes = boxes or [[]] * len(frames)
    return [{"uri": jpeg_uri(frame), "label": label, "boxes": inside}
            for frame, label, inside in zip(frames, labels, boxes, strict=True)]


def highlight(text: str, spans) -> Markup:
    """The text with marks. `spans`: (start, end, kind, title), kind one of WORST_FIRST, or "contradicted", which looks
    like "unsupported".

    Of several marks on one span the worst kind shows, with all titles; a span that overlaps an earlier one is skipped.
    """
    marks = {}
    for start, end, kind, title in spans:
        marks.setdefault((start, end), []).append(("unsupported" if kind == "contradicted" else kind, title))
    parts, done = [], 0
    for (start, end), found in sorted(marks.items()):
        if start < done:
            continue
        kind = min((kind for kind, _ in found), key=WORST_FIRST.index)
        titles = "; ".join(title for _, title in found)
        parts.append(escape(text[done:start]))
        parts.append(Markup('<mark class="{}" title="{}">{}</mark>').format(kind, titles, text[start:end]))
        done = end
    return Markup("").join([*parts, escape(text[done:])])
