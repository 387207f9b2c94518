"""A model folder's card: the front matter of README.md, where people and hubs look for its licence and its source."""

import re
from pathlib import Path
from typing import Any

import yaml

CARD, TAG = "README.md", "pocketlm"


def write_card(folder: Path, license: str | None, base_model: str) -> None:
    """Write a card that `read_card` reads, where there is none."""
    if (folder / CARD).exists():
        return
    front = {"license": license} if license else {}
    text = yaml.safe_dump(front | {"base_model": base_model, "tags": [TAG]}, sort_keys=False, allow_unicode=True)
    (folder / CARD).write_text(f"---\n{text}---\n", encoding="utf-8")


def read_card(folder: Path) -> tuple[str | None, str | None]:
    """Return the licence that a folder's card states, and the name of what the model was made from.

    The name only from cards of this program: in others, it is what people trained a model of its own name from.
    """
    front = _front_matter(folder / CARD)
    tags = front.get("tags")
    own = isinstance(tags, list) and TAG in tags
    return _words(front.get("license")), _words(front.get("base_model")) if own else None


def _front_matter(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = yaml.safe_load(header.group(1)) if header else None
    except (yaml.YAMLError, ValueError):  # a date that is none is a ValueError
        front = None
    return front if isinstance(front, dict) else {}


def _words(value: object) -> str | None:
    """Return a text, or texts joined; None where there is nothing else than that."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        return None
    return ", ".join(text.strip() for text in texts if text.strip()) or None
