"""What a pruning chose, with scores, as one page that needs nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from pocketlm.report.charts import bars, columns, grid
from pocketlm.report.pages import page
from pocketlm.report.wording import estimate, text_used


def choices_page(name: str, made: Any, damage: Sequence[tuple[int, float]]) -> str:
    """Return the page of a pruning.

    Args:
        name: Of the original.
        made: A `Pruned`: its steps with what they chose and what the model behind them is worth.
        damage: (block, KL with it and all before it dropped), in the order of removal.
    """
    figures = [("", _table(made))]
    if damage:
        title = "KL with a block and those before it dropped, before repair, nats per token"
        figures.append((title, columns({f"{block}": kl for block, kl in damage}, title)))
    for cut in made.cuts:
        figures += [*_vocabulary(cut.details), *_width(cut.details), *_connections(cut.details)]
    said = f"Read in llama.cpp on {text_used(made.text)}. Brackets are 95 % intervals, bootstrap over windows, paired."
    body = "".join(f"<figure><figcaption>{escape(title)}</figcaption>{picture}</figure>" for title, picture in figures)
    return page(f"{name}, pruned", Markup('<p>{}</p><div class="charts">{}</div>').format(said, Markup(body)))


def _vocabulary(details: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """Draw what fewer tokens make of the text that they were chosen by."""
    if "tokens_per_word" not in details:
        return []
    whole = details["kept"] + details["removed"]
    title = f"Tokens per word of the text, of all {whole:,} tokens and of the {details['kept']:,} kept"
    kinds = {"before": "original", "after": "compressed"}
    rows = [(kinds[when], when, value, 0.0, f"{value:.3f}") for when, value in details["tokens_per_word"].items()]
    return [(title, bars(rows, title))]


def _connections(details: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """Draw what each block's matrices lost with their connections."""
    if "output_error" not in details:
        return []
    title = f"{details['share_of_zeros']:.1%} of the connections cut: share of the output that is error, by block"
    errors = {str(block): error for block, error in enumerate(details["output_error"])}
    return [(title, columns(errors, title))]


def _width(details: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """Draw what a narrowing chose: a column per block for channels, a cell per block and head."""
    drawn = []
    if "energy_kept" in details:
        title = f"FFN, {details['from']} to {details['to']} channels: output energy lost, by block"
        lost = {str(block): 1 - kept for block, kept in enumerate(details["energy_kept"])}
        drawn.append((title, columns(lost, title)))
    if "kv_groups_kept" in details:
        lost = "KL" if details["kv_group_scores_are_kl"] else "output energy lost"
        title = f"KV groups: {lost} without each alone, by block; those that went are framed"
        scores, kept = details["kv_group_scores"], details["kv_groups_kept"]
        gone = [[group not in left for group in range(len(row))] for row, left in zip(scores, kept, strict=True)]
        drawn.append((title, grid(scores, gone, title)))
    if "heads_kept" in details:
        title = "Query heads of these: output energy lost without each alone, by block; those that went are framed"
        kept, served = details["heads_kept"], details["heads_served"]
        gone = [[head not in left for head in heads] for heads, left in zip(served, kept, strict=True)]
        drawn.append((title, grid(details["head_scores"], gone, title)))
    return drawn


def _table(made: Any) -> Markup:
    rows = [
        (cut.step, cut.summary, f"{cut.parameters:,}", _interval(cut.quality.perplexity), _distance(cut.quality))
        for cut in made.cuts
    ]
    per_byte = made.cuts[0].quality.bits_per_byte is not None
    heads = ("step", "chosen", "parameters", "perplexity", "bits per byte" if per_byte else "KL")
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return Markup("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")


def _distance(quality: Any) -> str:
    found = quality.kl if quality.bits_per_byte is None else quality.bits_per_byte
    return "" if found is None else _interval(found)


def _interval(found: Any) -> str:
    return estimate(found)
