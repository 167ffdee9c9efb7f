"""``flashsloth ablate``: the runs that are missing, one after the other, then the report."""

from __future__ import annotations

import argparse
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch

from flashsloth.ablation.flops import count
from flashsloth.ablation.material import Material
from flashsloth.ablation.report import write_report
from flashsloth.ablation.runs import Run, check_same, load_runs, run_name, save_run
from flashsloth.ablation.scoring import request, score
from flashsloth.ablation.settings import read_settings
from flashsloth.ablation.timing import load_times, measure, save_times
from flashsloth.ablation.training import checksum, train
from flashsloth.ablation.variants import Variant, choose, processor_of, variants_of

SEEDS = (0, 1, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML; not needed with --report")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results, kept features and the report")
    parser.add_argument("--variants", type=_names, metavar="A,B", help="default: all of the usual comparison")
    parser.add_argument("--seeds", type=_seeds, default=SEEDS, metavar="N,N", help="default: 0,1,2")
    parser.add_argument("--resume", action="store_true", help="keep the runs in DIR, make those that are missing")
    parser.add_argument("--report", action="store_true", help="only write the report on the runs in DIR")


def main(options: argparse.Namespace) -> int:
    """Runs with the options of :func:`add_arguments`. Returns 0.

    Raises:
        ValueError, TypeError, OSError: input that cannot be used, named.
    """
    if not options.report:
        if options.config is None:
            raise ValueError("--config: expected a YAML file, got none")
        ablate(options.config, options.out, options.variants, options.seeds, options.resume)
    for path in write_report(options.out):
        _say(f"wrote {path}")
    return 0


def ablate(config: Path, out: Path, names: list[str] | None, seeds: tuple[int, ...], resume: bool) -> None:
    """Make the runs that are missing, a seed at a time, then measure times."""
    settings = read_settings(config)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out: expected a folder, got the file {out}")
    done = {run.name: run for run in load_runs(out)}
    if done and not resume:
        raise ValueError(f"--out: expected a folder without runs, or --resume, got {out} with {len(done)}")
    material = Material(settings, out, _say)
    for run in done.values():
        check_same(run, material.identity, out)
    variants = variants_of(material.config, settings.query_layers)
    chosen = choose(variants, names)
    for variant in chosen:
        variant.config(material.config)  # what does not fit is told before hours of work
    _say(f"{len(chosen)} variants, seeds {', '.join(map(str, seeds))}, {settings.steps:,} steps of {settings.batch}")
    for seed in seeds:
        for variant in chosen:
            if run_name(variant.name, seed) not in done:
                run = run_one(material, variant, seed)
                save_run(run, out)
                done[run.name] = run
    there = [one for one in variants.values() if any(run.variant == one.name for run in load_runs(out))]
    known = load_times(out, material.identity)
    if known is None or set(known["seconds"]) != {one.name for one in there}:
        _say(f"times to first token, {settings.timing_rounds} rounds")
        save_times(measure(material, there, environment()), out)


def run_one(material: Material, variant: Variant, seed: int) -> Run:
    """Train and score one variant with one seed."""
    started = time.monotonic()
    settings, config = material.settings, variant.config(material.config)
    processor = processor_of(material.processor, config)
    model: Any = material.build(config, seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    material.tell(f"{variant.title}, seed {seed}")
    losses = train(model, processor, material, seed)
    scores = score(model, processor, material)
    row = request(processor, material.typical.text)
    run = Run(
        variant=variant.name,
        title=variant.title,
        family=variant.family,
        seed=seed,
        settings=material.identity,
        changes=variant.changes,
        visual_tokens=config.num_visual_tokens,
        queries=config.num_queries,
        prompt_tokens=len(row.ids),
        trained=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        flops=count(model, len(row.ids), row.spans[0][1] - row.spans[0][0])._asdict(),
        losses=losses,
        order=checksum(seed, material.train.pictures, settings.batch, settings.steps),
        scores=scores,
        environment=environment(),
    )
    material.tell(f"  {100 * run.accuracy:.1f} % right, {time.monotonic() - started:,.0f} s")
    return run


def environment() -> dict[str, Any]:
    """What may move the last digits of a result, and its times."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}


def _processor() -> str:
    """What the system calls the processor."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _say(line: str) -> None:
    print(line, flush=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> tuple[int, ...]:
    found = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in found) or len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(f"expected different whole numbers such as 0,1,2, got {text!r}")
    return tuple(int(part) for part in found)
