"""Does the 7B path do on this GPU what it was written to do? Run this first on a new card.

Nine steps, each below ten minutes, on the architecture of Qwen2.5-7B with random weights: no
download, no data but for step 9. Every check prints what is expected and what was found; results
are kept after each step in gpu_check.json, and steps that are done are skipped the next time.

1 libraries: driver, versions, bitsandbytes, attention    6 out of memory in a step, an evaluation
2 memory of plan, unpacking, a model that is dropped      7 profile of ten steps
3 NF4 products against unpacked ones                      8 adapters' function, TF32, cuDNN, compile
4 gradients packed, unpacked, recomputed                  9 throughput, as studies/throughput.py
5 peak memory against the plan
"""

import gc
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from collapse.config import DEFAULT_MODEL, check_bounds
from collapse.utils.device import set_allocator
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import ROOT, read_json, write_json
from collapse.utils.provenance import environment
from studies import gpu_steps, throughput
from studies.gpu_steps import Card, Checks, constant


@dataclass
class Config:
    """Settings of the check; the comment above a field is its --help text."""

    # Steps to do, of 1 to 9.
    steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    # In miniature, on the CPU: whether the checks themselves run.
    tiny: bool = False
    # Do steps again that are done.
    fresh: bool = False
    # GPU memory that the process may take, in GiB: of a card of 16, what its driver leaves.
    memory_gib: float = 15.0
    # Folder for gpu_check.json. Default: results_7b, for the miniature a folder that git ignores.
    output_dir: Path | None = None
    # Folder with the data in its official layout, for step 9.
    data_dir: Path | None = None
    # Tokenizer for step 9: a hub name, a folder or smollm2-135m.
    tokenizer: str = DEFAULT_MODEL


def speed(card: Card) -> Checks:
    if card.tiny:
        split, model = card.split(64, constant(12)), card.planned(2)
        config = throughput.Config(rounds=1, steps=1)
        found = {
            "miniature": {
                "model2": throughput.measure(2, model, split, card.settings, config, None)
            }
        }
    else:
        config = throughput.Config(
            backbone="7b",
            data_dir=card.data_dir,
            tokenizer=card.tokenizer,
            output_dir=card.output_dir / "gpu_check",
            rounds=3,
            steps=10,
            memory_gib=card.memory_gib,
        )
        found = throughput.measure_language_model(config)
    for data, results in found.items():
        for key in [key for key in results if key.startswith("model")]:
            line = throughput.describe(results[key])
            yield f"{data}, {key}", "ours the fastest", line, not results[key]["out_of_memory"]


STEPS = dict(
    enumerate(
        (
            gpu_steps.libraries,
            gpu_steps.memory,
            gpu_steps.products,
            gpu_steps.gradients,
            gpu_steps.peaks,
            gpu_steps.out_of_memory,
            gpu_steps.profiles,
            gpu_steps.switches,
            speed,
        ),
        1,
    )
)


def do(number: int, card: Card) -> dict:
    """One step: its checks, printed as they come; an error is kept as one that went wrong."""
    started, checks = time.monotonic(), []
    print(f"step {number}: {STEPS[number].__name__.replace('_', ' ')}", flush=True)
    try:
        for what, expected, found, right in STEPS[number](card):
            mark = {True: "right", False: "WRONG", None: "seen"}[right]
            print(f"  {mark:6}{what}: expected {expected}, found {found}", flush=True)
            checks.append({"what": what, "expected": expected, "found": found, "right": right})
    except Exception as error:
        message = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"  WRONG {message}", flush=True)
        checks.append({"what": "error", "expected": "none", "found": message, "right": False})
    gc.collect()
    torch.cuda.empty_cache()
    return {"checks": checks, "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    set_allocator()
    for number in config.steps:
        check_bounds("steps", number, 1, len(STEPS))
    folder = config.output_dir or ROOT / "results_7b" / ("limit-tiny" if config.tiny else "")
    card = Card(config.tiny, config.memory_gib, config.data_dir, config.tokenizer, folder)
    if not config.tiny:
        throughput.cap_memory(config.memory_gib)
    file, results = folder / "gpu_check.json", {}
    if file.exists():
        results = read_json(file)
        if results["tiny"] != config.tiny:
            raise UserError(f"{file} is of another kind of check: choose another --output-dir.")
    results |= {"tiny": config.tiny, **environment(card.device)}
    steps = results.setdefault("steps", {})
    folder.mkdir(parents=True, exist_ok=True)
    for number in config.steps:
        done = steps.get(str(number), FAILED)["checks"]
        if not config.fresh and all(check["right"] is not False for check in done):
            print(f"step {number}: done before, see {file}; --fresh does it again", flush=True)
            continue
        steps[str(number)] = do(number, card)
        write_json(file, results)
    wrong = [n for n in config.steps if any(c["right"] is False for c in steps[str(n)]["checks"])]
    if wrong:
        raise UserError(f"not as expected: step {', '.join(map(str, wrong))}; see {file}.")
    print(f"all as expected; {file}")


FAILED = {"checks": [{"right": False}]}  # a step that was not done


if __name__ == "__main__":
    run_script(main)
