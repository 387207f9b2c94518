"""Quantize a model with llama.cpp: an importance matrix, then its presets.

    python llama_cpp.py --tools BIN --model MODEL-f16.gguf --text FILE.txt --out OUT [--threads 2]

BIN holds llama-imatrix and llama-quantize (see README.md). OUT then holds imatrix.gguf, NAME.gguf per preset, the
tools' output, and results.json. In NAME `+emb` means that the token embedding, which llama.cpp keeps at 8 bits where
it is tied to the head, has 4 bits too: the smallest usable file of that preset. (Types in blocks of 256 weights cannot
hold rows of 576.)
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

WINDOW = 512  # tokens
WINDOWS = 128
PRESETS = ("Q8_0", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q4_K_M", "Q3_K_M", "IQ3_XXS", "Q2_K")
SMALLEST = {"Q4_0": "q4_0", "IQ4_NL": "iq4_nl", "IQ3_XXS": "iq4_nl", "Q2_K": "iq4_nl"}  # the embedding's type


def run(command: list[str], log: Path) -> float:
    """Run a tool, keep what it says and return the wall time in seconds.

    Raises:
        SystemExit: The tool failed.
    """
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise SystemExit(f"{command[0]} failed with status {status}: see {log}")
    return round(time.perf_counter() - start, 2)


def main() -> None:
    """Make the importance matrix and all presets, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="folder with llama-quantize and llama-imatrix")
    parser.add_argument("--model", type=Path, required=True, help="F16 GGUF")
    parser.add_argument("--text", type=Path, required=True, help="calibration text, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    threads = str(args.threads)
    matrix = args.out / "imatrix.gguf"
    command = [str(args.tools / "llama-imatrix"), "-m", str(args.model), "-f", str(args.text), "-o", str(matrix)]
    command += ["-c", str(WINDOW), "-b", str(WINDOW), "--chunks", str(WINDOWS), "-t", threads, "--no-ppl"]
    seconds = run(command, args.out / "imatrix.log")
    results: dict[str, dict[str, float]] = {matrix.name: {"bytes": matrix.stat().st_size, "seconds": seconds}}

    for name in (*PRESETS, *(f"{preset}+emb" for preset in SMALLEST)):
        preset, smallest = name.removesuffix("+emb"), name.endswith("+emb")
        made = args.out / f"{name}.gguf"
        command = [str(args.tools / "llama-quantize"), "--imatrix", str(matrix)]
        command += ["--token-embedding-type", SMALLEST[preset]] if smallest else []
        seconds = run([*command, str(args.model), str(made), preset, threads], args.out / f"{name}.log")
        results[made.name] = {"bytes": made.stat().st_size, "seconds": seconds}
        print(f"{made.name:16} {made.stat().st_size:>12,} bytes {seconds:7.2f} s", flush=True)

    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
