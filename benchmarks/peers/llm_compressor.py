"""Quantize a model with llm-compressor's GPTQ: int4, symmetric, group 32, all linear layers but the head.

Run it with the Python of an environment that has llm-compressor (see README.md):

    python llm_compressor.py --model HF_FOLDER --windows WINDOWS.safetensors --out OUT [--limit N]

Everything else is llm-compressor's default: activation order `static` (columns are quantized by importance, groups
stay where they are), dampening 0.01, blocks of 128 columns, one window at a time, layer after layer.
OUT then holds the dequantized model as a plain Hugging Face folder, and results.json.
"""

from typing import TYPE_CHECKING

from common import GROUP, arguments, exact_weight, measured, read_windows, save, write_results

if TYPE_CHECKING:
    from llmcompressor.modifiers.gptq import GPTQModifier


def int4_recipe() -> "GPTQModifier":
    """Return llm-compressor's GPTQ with its defaults, for int4 weights in groups."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return GPTQModifier(config_groups=groups, ignore=["lm_head"])


def main() -> None:
    """Quantize, save and report."""
    args = arguments(__doc__).parse_args()
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    windows = read_windows(args.windows, args.limit)
    masks = [[1] * windows.shape[1]] * len(windows)
    dataset = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": masks})
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    recipe = int4_recipe()
    model, figures = measured(
        lambda: oneshot(
            model=model,
            dataset=dataset,
            recipe=recipe,
            max_seq_length=windows.shape[1],
            num_calibration_samples=len(windows),
            shuffle_calibration_samples=False,
        )
    )
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight_scale")}
    weights = {f"{name}.weight": exact_weight(layer.weight, layer.weight_scale) for name, layer in layers.items()}
    settings = {
        "method": "GPTQ",
        "bits": 4,
        "group": GROUP,
        "symmetric": True,
        "actorder": next(str(layer.quantization_scheme.weights.actorder.value) for layer in layers.values()),
        "dampening": recipe.dampening_frac,
        "block_size": recipe.block_size,
        "scale_dtype": next(str(layer.weight_scale.dtype) for layer in layers.values()),
        "windows": list(windows.shape),
        "layers": len(layers),
        "saved_dtype": save(args.model, args.out, weights),
    }
    write_results(args.out, "llmcompressor", figures, settings)


if __name__ == "__main__":
    main()
