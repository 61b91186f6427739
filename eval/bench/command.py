"""``opd bench``: steps per second and memory, ours beside TRL's on the same work."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

from eval.bench.workloads import WORKLOADS, Workload, prepare
from eval.figures import bench_bars, png
from eval.files import output_folder, write_files
from opd.errors import UserError

AGREEMENT = 1e-3  # of gradients: largest difference over the largest number of a tensor
MIB = 2**20
Result = dict[str, Any]  # of one process: what Stopwatch.report writes


def bench(
    peer: Literal["trl", "none"] = "trl",
    workloads: str = "small,large,tail",
    model: str | None = None,
    repeats: int = 5,
    threads: int = 1,
    peer_python: str | None = None,
    output: str = "runs/bench",
    overwrite: bool = False,
) -> None:
    """Time steps of on-policy distillation, and measure their memory.

    Both sides get the same weights, prompts, sampler, threads, precision and optimizer, in
    processes of their own that run in turn. First both must find the same loss and gradient of one
    batch. Writes bench.json, bench.md and bench.png.

    Args:
        peer: trl, whose side needs the package trl; none: ours alone, by phase, with a trace of two
            steps for Chrome's or Perfetto's viewer.
        workloads: Names of workloads, separated by commas: small, large, tail, model.
        model: Folder of the model that is student and teacher of the workload ``model``.
        repeats: Processes per side and workload.
        threads: Of the processor, per process.
        peer_python: Interpreter that has trl. None: this one.
        output: Folder for what is written.
        overwrite: Replace an earlier bench there.

    Raises:
        UserError: A workload is unknown, a number is out of range, trl is missing, a side fails, or
            the two do not compute the same.
    """
    names = list(dict.fromkeys(filter(None, (name.strip() for name in workloads.split(",")))))
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise UserError(f"--workloads {unknown[0]}: is none; known are {', '.join(WORKLOADS)}")
    if not names:
        raise UserError(f"--workloads names none; known are {', '.join(WORKLOADS)}")
    for option, value in [("repeats", repeats), ("threads", threads)]:
        if value < 1:
            raise UserError(f"--{option} {value} must be at least 1")
    if peer == "trl" and peer_python is None and importlib.util.find_spec("trl") is None:
        raise UserError(
            "--peer trl: the package trl is not installed; pip install trl==1.16.0, name an "
            "interpreter that has it with --peer-python, or --peer none"
        )
    sides = {"ours": sys.executable}
    if peer == "trl":
        sides["trl"] = peer_python or sys.executable
    with output_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
        if (folder / "bench.json").exists() and not overwrite:
            raise UserError(f"{folder / 'bench.json'} exists; replace it with --overwrite true")
        found = {}
        for name in names:
            workload, place = WORKLOADS[name], Path(scratch) / name
            prepare(workload, place, model)
            if peer == "trl":
                _agree(workload, place, sides, threads)
            trace = folder / f"trace_{name}.json" if peer == "none" else None
            found[name] = _measure(name, workload, place, sides, repeats, threads, trace)
            shutil.rmtree(place)
        _write(folder, found, threads)


def _agree(workload: Workload, place: Path, sides: Mapping[str, str], threads: int) -> None:
    """See that both sides find the same loss and gradient.

    Raises:
        UserError: They do not.
    """
    found = {}
    for side, python in sides.items():
        path = place / f"{side}.safetensors"
        _run(side, python, workload, place, path, threads, check=True)
        found[side] = load_file(path)
    ours, theirs = found.values()
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            raise UserError(f"{name}: only one side has a gradient of it")
        largest = max(float(theirs[name].abs().max()), 1e-12)
        gap = float((ours[name] - theirs[name]).abs().max()) / largest
        if not gap <= AGREEMENT:
            raise UserError(f"{name}: the sides differ by {gap:.1e} of the largest number")
    print(f"{workload.about}: both sides find the same loss and gradient", flush=True)


def _measure(
    name: str,
    workload: Workload,
    place: Path,
    sides: Mapping[str, str],
    repeats: int,
    threads: int,
    trace: Path | None,
) -> dict[str, list[Result]]:
    """Run both sides in turn."""
    results: dict[str, list[Result]] = {side: [] for side in sides}
    for i in range(repeats):
        for side, python in sides.items():
            path = place / f"{side}_{i}.json"
            _run(side, python, workload, place, path, threads)
            results[side].append(json.loads(path.read_text()))
            last = results[side][-1]
            print(
                f"{name} {i + 1}/{repeats} {side}: {last['cpu_seconds']:.3f} s a step on the "
                f"processor, {last['wall_seconds']:.3f} s in all, "
                f"{last['memory_bytes'] / MIB:.0f} MiB over the models",
                flush=True,
            )
    if trace is not None:  # by a process of its own: what is traced is slower
        traced = place / "traced.json"
        _run("ours", sides["ours"], workload, place, traced, threads, trace=trace)
    return results


def _run(
    side: str,
    python: str,
    workload: Workload,
    place: Path,
    output: Path,
    threads: int,
    *,
    check: bool = False,
    trace: Path | None = None,
) -> None:
    options = asdict(workload) | {
        "folder": str(place),
        "output": str(output),
        "check": check,
        "threads": threads,
        "fixed": workload.mean_tokens is None,
        "trace": trace and str(trace.resolve()),
    }
    root = str(Path(__file__).parents[2])
    paths = filter(None, [root, os.environ.get("PYTHONPATH")])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
    }
    command = [python, "-m", f"eval.bench.{side}", json.dumps(options)]
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UserError(f"{side} cannot be run by {python} ({error.strerror})") from error
    if ended.returncode or not output.is_file():
        said = [line for line in (ended.stderr + ended.stdout).splitlines() if line.strip()]
        raise UserError(f"{side} has failed: {said[-1] if said else ended.returncode}")


# --- what is written ------------------------------------------------------------------------------


def _write(folder: Path, found: Mapping[str, Mapping[str, Sequence[Result]]], threads: int) -> None:
    compared = {name: ratios(sides) for name, sides in found.items() if "trl" in sides}
    text = _comparison(compared, threads) if compared else _phases(found, threads)
    contents: dict[Path, str | bytes] = {
        folder / "bench.json": json.dumps(
            {"threads": threads, "runs": found, "ratios": compared}, indent=2
        ),
        folder / "bench.md": text,
    }
    if compared:
        contents[folder / "bench.png"] = png(bench_bars(compared))
    write_files(contents)
    print("\n" + text, end="")


def ratios(sides: Mapping[str, Sequence[Result]]) -> dict[str, list[float]]:
    """Compare runs that were made in turn, pair by pair.

    Args:
        sides: Results of ``ours`` and of ``trl``, as many of each.

    Returns:
        ``speed``, steps per second of the processor, ours over theirs; ``wall``, the same by the
        clock on the wall; ``memory``, over the models, ours over theirs. One of each per pair.
    """
    pairs = list(zip(sides["ours"], sides["trl"], strict=True))
    return {
        "speed": [theirs["cpu_seconds"] / ours["cpu_seconds"] for ours, theirs in pairs],
        "wall": [theirs["wall_seconds"] / ours["wall_seconds"] for ours, theirs in pairs],
        "memory": [ours["memory_bytes"] / theirs["memory_bytes"] for ours, theirs in pairs],
    }


def spread(values: Sequence[float]) -> str:
    """Write a median, and the least and the most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _comparison(compared: Mapping[str, Mapping[str, Sequence[float]]], threads: int) -> str:
    rows = [
        f"| {WORKLOADS[name].about} | {spread(r['speed'])} | {spread(r['wall'])} "
        f"| {spread(r['memory'])} |"
        for name, r in compared.items()
    ]
    return "\n".join(
        [
            "| workload | steps per second, ours / TRL | by the wall clock | memory, ours / TRL |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Median of {len(next(iter(compared.values()))['speed'])} runs of each, in turn, with "
            f"{threads} {'thread' if threads == 1 else 'threads'}, and the least and the most. "
            "Speed by seconds of the processor; memory over the loaded models.",
            "",
        ]
    )


def _phases(found: Mapping[str, Mapping[str, Sequence[Result]]], threads: int) -> str:
    lines = [
        "| workload | phase | seconds a step | share | tokens a second |",
        "|---|---|---|---|---|",
    ]
    for name, sides in found.items():
        runs = sides["ours"]
        tokens = statistics.median(run["tokens"] for run in runs)
        whole = statistics.median(run["wall_seconds"] for run in runs)
        named = {phase: [run["phases"][phase] for run in runs] for phase in runs[0]["phases"]}
        spent = {name.removesuffix("_seconds"): statistics.median(v) for name, v in named.items()}
        spent["all else"] = max(whole - sum(spent.values()), 0.0)
        for phase, seconds in spent.items():
            rate = f"{tokens / seconds:,.0f}" if seconds and phase != "all else" else ""
            share = f"{seconds / whole:.0%}"
            lines.append(
                f"| {WORKLOADS[name].about} | {phase} | {seconds:.4f} | {share} | {rate} |"
            )
    return "\n".join([*lines, "", f"{threads} threads, by the wall clock.", ""])
