"""Quantize a model with auto-round: int4, symmetric, group 32, all linear layers but the head.

Run it with the Python of an environment that has auto-round (see README.md):

    python auto_round.py --model HF_FOLDER --windows WINDOWS.safetensors --out OUT [--limit N] [--iters 200]

Everything else is auto-round's default: signed gradient descent on rounding and clipping, one block at a time.
OUT then holds the dequantized model as a plain Hugging Face folder, and results.json.
"""

from common import GROUP, arguments, exact_weight, measured, read_windows, save, write_results

BATCH = 8


def main() -> None:
    """Quantize, save and report."""
    parser = arguments(__doc__)
    parser.add_argument("--iters", type=int, default=200, help="optimization steps per block")
    args = parser.parse_args()
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = read_windows(args.windows, args.limit)
    # With a mask of its own: auto-round would take the end-of-text between documents for padding.
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(BATCH)]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    rounding = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(args.model),
        scheme={"bits": 4, "group_size": GROUP, "sym": True, "data_type": "int"},
        dataset=batches,
        iters=args.iters,
        seqlen=windows.shape[1],
        nsamples=len(windows),
        batch_size=BATCH,
        device_map="cpu",
    )
    model, figures = measured(lambda: rounding.quantize()[0])
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(getattr(layer, "scale", None), torch.Tensor)
    }
    weights = {f"{name}.weight": exact_weight(layer.weight, layer.scale) for name, layer in layers.items()}
    settings = {
        "method": "auto-round",
        "bits": 4,
        "group": GROUP,
        "symmetric": True,
        "iters": args.iters,
        "batch_size": BATCH,
        "scale_dtype": next(str(layer.scale.dtype) for layer in layers.values()),
        "windows": list(windows.shape),
        "layers": len(layers),
        "saved_dtype": save(args.model, args.out, weights),
    }
    write_results(args.out, "auto-round", figures, settings)


if __name__ == "__main__":
    main()
