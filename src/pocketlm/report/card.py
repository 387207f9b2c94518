"""The model card: README.md as model hubs read it, with measured numbers only."""

import re
import shlex
from pathlib import PurePath
from typing import Any

import yaml

from pocketlm.report.answers import is_fault
from pocketlm.report.content import Report
from pocketlm.report.pages import render

# Formats younger than the engines that many people run.
_NEW_FORMATS = {"Q1_0", "Q2_0", "NVFP4", "MXFP4"}


def model_card(report: Report) -> str:
    """Return the model card: front matter in YAML, then Markdown."""
    product = report.product
    front = yaml.safe_dump(front_matter(report), sort_keys=False, allow_unicode=True, width=110)
    used = {name for part in report.parts for name in part.formats}
    body = render(
        "card.md.j2",
        report=report,
        product=product,
        quoted=shlex.quote(f"./{product.file_name}"),
        short_name=_short_name(product.file_name),
        new_formats=sorted(used & _NEW_FORMATS),
        flagged=[answer for answer in report.answers if any(is_fault(note) for note in answer.notes)],
    )
    return f"---\n{front}---\n\n{body}"


def front_matter(report: Report) -> dict[str, Any]:
    """Return the card's metadata in the words of the Hugging Face hub."""
    did = {"trim": "vocabulary-trimmed", "prune": "pruned", "distil": "distilled"}
    tags = ["gguf", "quantized", "pocketlm", "llama.cpp"]
    tags += [tag for verb, tag in did.items() if any(verb in stage.name.lower() for stage in report.stages)]
    tags += ["conversational"] if report.model.is_chat else []
    front: dict[str, Any] = {
        "license": (report.model.license or "unknown").lower(),
        "base_model": report.model.name,
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    metrics = _metrics(report)
    if metrics and report.measured_text is not None:
        text = report.measured_text
        front["model-index"] = [
            {
                "name": PurePath(report.product.file_name).stem,
                "results": [
                    {
                        "task": {"type": "text-generation", "name": "Text generation"},
                        "dataset": {"type": "text", "name": text.name, "revision": text.sha256},
                        "metrics": metrics,
                    }
                ],
            }
        ]
    return front


def _metrics(report: Report) -> list[dict[str, Any]]:
    product = report.product
    named = [
        ("perplexity", "Perplexity", product.perplexity),
        ("bits_per_byte", "Bits per byte", product.bits_per_byte),
        ("perplexity_ratio", "Perplexity ratio to the original", product.perplexity_ratio),
        ("kl_divergence", "KL divergence from the original, nats per token", product.divergence),
        ("agreement", "Fraction of tokens with the original's first choice", product.agreement),
    ]
    metrics: list[dict[str, Any]] = [
        {
            "type": kind,
            "name": name,
            "value": estimate.value,
            "args": {"interval_95": [estimate.low, estimate.high]},
        }
        for kind, name, estimate in named
        if estimate is not None and estimate.known
    ]
    if product.speed is not None:
        rate = product.speed.decode_tokens_per_second
        metrics.append(
            {
                "type": "decode_tokens_per_second",
                "name": "Decode, tokens/s on the machine of the report",
                "value": rate.mean,
                "args": {"deviation": rate.deviation},
            }
        )
    return [*metrics, {"type": "bytes", "name": "Bytes of the file", "value": product.bytes}]


def _short_name(file_name: str) -> str:
    """Return a name that ollama accepts: lower case, without the ending."""
    return re.sub(r"[^a-z0-9._-]+", "-", PurePath(file_name).stem.lower()).strip("-.") or "model"
