"""The other export: integer and FP8 weights as a Hugging Face folder, for transformers and vLLM instead of llama.cpp.

model ─> text ─> quantize ─> compressed-tensors folder ─> measure the decoded weights
"""

from dataclasses import asdict, dataclass

from pocketlm.errors import BadInputError
from pocketlm.export.compressed_tensors import predicted_bytes, quantization_config, write_compressed_tensors
from pocketlm.measure.quality import Quality
from pocketlm.model.language_model import LanguageModel
from pocketlm.pipeline.artefact import new_folder
from pocketlm.pipeline.cache import remove_leftovers
from pocketlm.pipeline.planning import Fit, Planned, check_job
from pocketlm.pipeline.preflight import check_resources, load_if_room
from pocketlm.pipeline.proof import measure_as_f16
from pocketlm.pipeline.stages import Progress, gather_texts, run_recipe, silent
from pocketlm.plan.budget import Budget
from pocketlm.plan.recipe import Recipe, to_yaml
from pocketlm.plan.sizes import sizes_of
from pocketlm.report.content import to_json
from pocketlm.report.write import replace_text, write_manifest
from pocketlm.steps.quantize import Quantize, check_formats, format_name, with_fixed


@dataclass(frozen=True)
class IntegerFolder:
    """What was made.

    Attributes:
        predicted_bytes: Of the tensors.
        actual_bytes: Of the safetensors file, whose header comes on top.
        quality: The original and the decoded weights, both read in llama.cpp as F16 files.
    """

    predicted_bytes: int
    actual_bytes: int
    quality: dict[str, Quality]


def quantize_integers(job: Fit, progress: Progress = silent) -> IntegerFolder:
    """Quantize the linears of a model's blocks into one integer or FP8 format; embedding and head stay 16-bit.

    Writes `job.out`, whole or not at all: the folder `model` that transformers loads, the recipe, and the quality.

    Raises:
        BadInputError: The format is unknown, its groups do not divide a row, or compressed-tensors cannot express it.
        MissingExtraError: compressed-tensors is not installed.
    """
    check_job(job)
    remove_leftovers()
    with new_folder(job.out, job.force, job.reads) as folder:
        model = load_if_room(job.model)
        planned = _plan(job, model)
        check_resources(model, job.out, trained=False)
        texts = gather_texts(model, list(job.data), job.seed, progress)
        compressed = run_recipe(model, planned.recipe, texts, progress)
        write_compressed_tensors(compressed.model, compressed.packed, folder / "model")
        measured = measure_as_f16(model, compressed.model, texts.test.windows, progress)
        quality = dict(zip(("original", "compressed"), measured, strict=True))
        (folder / "recipe.yaml").write_text(to_yaml(planned.recipe), encoding="utf-8")
        replace_text(folder / "quality.json", to_json({name: asdict(each) for name, each in quality.items()}) + "\n")
        actual = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        write_manifest(folder)
    return IntegerFolder(planned.predicted_bytes, actual, quality)


def plan_integers(job: Fit) -> Planned:
    """Decide what `quantize_integers` would do and how many bytes its tensors would have; nothing is written.

    Raises:
        BadInputError: As `quantize_integers`.
    """
    check_job(job)
    return _plan(job, load_if_room(job.model))


def _plan(job: Fit, model: LanguageModel) -> Planned:
    if job.tune:
        raise BadInputError(f"Tuning is for GGUF's formats, and {job.format} is none. Leave one of the two out")
    sizes = sizes_of(model)
    own = {group: "F16" if group in ("embedding", "head") else job.format for group in sizes.group_names}
    step = Quantize(formats=with_fixed(own, dict(job.fixed)), method=job.method, seed=job.seed)
    check_formats(sizes.tensors(sizes.original), step.formats)
    names = {name: format_name(step.formats, name, group) for name, group in sizes.groups.items()}
    quantized = {name: form for name, form in names.items() if form != "F16"}
    predicted = predicted_bytes(sizes.shapes, quantized)
    quantization_config(model, quantized)  # what the folder's format cannot say is told before the work
    recipe = Recipe(steps=(step,), seed=job.seed)
    return Planned(recipe, Budget("the recipe's size", predicted), predicted, sizes, None)
