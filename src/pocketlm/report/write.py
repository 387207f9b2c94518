"""Write the reports into an artefact folder, and the manifest that seals it."""

import json
from pathlib import Path

from pocketlm.errors import BadInputError
from pocketlm.model.files import file_sha256, written_whole
from pocketlm.report.card import model_card
from pocketlm.report.content import Report, from_dict, to_dict, to_json
from pocketlm.report.pages import html_page, markdown_page

MANIFEST = "manifest.json"


def write_reports(report: Report, folder: Path) -> None:
    """Write report.html, report.md, report.json and README.md (the model card) into `folder`.

    Args:
        report: Everything the run has to say.
        folder: Made if missing; files of these names are replaced.

    Raises:
        BadInputError: The report has no measured compressed file.
    """
    texts = {
        "report.html": html_page(report),
        "report.md": markdown_page(report),
        "report.json": to_json(to_dict(report)) + "\n",
        "README.md": model_card(report),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        replace_text(folder / name, text)


def write_manifest(folder: Path) -> None:
    """Write manifest.json: path, bytes and SHA-256 of every other file under `folder`, sorted by path."""
    entries = []
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            entries.append({"path": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
    replace_text(folder / MANIFEST, to_json({"schema": 1, "files": entries}, ascii_only=True) + "\n")


def strangers(folder: Path) -> list[str] | None:
    """Return the files of a folder that its manifest does not list; None where there is no manifest of this program."""
    listed = _listed(folder)
    if listed is None:
        return None
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [name for name in names if name != MANIFEST and name not in listed]


def is_whole(folder: Path) -> bool:
    """Return whether every file that a folder's manifest lists is there with as many bytes."""
    listed = _listed(folder)
    return listed is not None and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in listed.items()
    )


def _listed(folder: Path) -> dict[str, int] | None:
    """Return the bytes of each file in a folder's manifest; other programs have manifests of that name too."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {entry["path"]: entry["bytes"] for entry in manifest["files"]} if manifest["schema"] == 1 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_report(folder: Path) -> Report:
    """Read the report of a folder made by `fit`.

    Raises:
        BadInputError: There is none, or it cannot be read.
    """
    path = folder / "report.json" if folder.is_dir() else folder
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BadInputError(
            f"There is no report at {path}: {error.strerror}. Name a folder that `pocketlm fit` made; two GGUF files "
            "are compared by `pocketlm evaluate A --reference B` and `pocketlm bench A B`"
        ) from error
    except (ValueError, AttributeError, TypeError) as error:
        raise BadInputError(f"{path} is no report of pocketlm: {error}") from error


def replace_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with written_whole(path) as partial:
        # A lone surrogate, which a broken model's tokenizer may yield, must not stop the report.
        partial.write_bytes(text.encode("utf-8", errors="replace"))
