"""Table 4: what every module is worth, and rows that nobody has published.

    python tools/ablation.py                              # `shapes`, seeds 0 to 7 of every row
    python tools/ablation.py --data voc --backbone vits16 -- --root /data --accumulate 4
    python tools/ablation.py --rows baseline dmsa --seeds 0 -- --epochs 2

Every run is a train.py of its own (of TransFGU and the released code: tools/transfgu.py), in
OUT/<data>[-<backbone>]-<row>-<seed>; its words go to stderr, the table to stdout. The same command again goes
on where it stopped and does not start what is finished. Options after -- go to every run; what a row itself
sets wins.

In the table, over the seeds: mIoU of the last epoch, mean ± standard deviation and median; how many seeds
lost a class, whose IoU is below half of its median over the row's seeds; accuracy; mIoU of the best epoch,
chosen on val by mIoU + accuracy, as the peers do, and therefore too high; and the first epoch whose mIoU is
above the best epoch of the same seed's baseline: the mean, if there is one for every seed. With `shapes`
another seed also means other scenes, some of them harder. Rows are therefore also compared seed by seed: the
last mIoU minus that of the same seed's `baseline` (rows that add to it, and `dmsa`) or of its `dmsa` (the
rest): the mean and its 95 % interval, by bootstrap over the seeds, and in how many seeds the row is better.
Of rows that change nothing, one in twenty has an interval without 0; with few seeds, more.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)          # Ctrl-C ends this program and the run, at once

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import data                                               # noqa: E402
import train                                              # noqa: E402
from model import BACKBONES                               # noqa: E402
from tools import transfgu                                # noqa: E402

# row: (name, the three check marks of Table 4, options of train.py); NO_SEG: the lambdas with L_seg's 0
ROWS = {
    "baseline": ("L_CE + L_un + L_cls", "   ", "NO_SEG --aspp none --par"),
    "seg": ("+ L_seg", "✓  ", "--aspp none --par"),
    "aspp": ("+ ASPP", " ✓ ", "NO_SEG --par"),
    "par": ("+ PAR", "  ✓", "NO_SEG --aspp none"),
    "dmsa": ("all (DMSA)", "✓✓✓", ""),
    "no-seg": ("all, without L_seg", " ✓✓", "NO_SEG"),
    "no-aspp": ("all, without ASPP", "✓ ✓", "--aspp none"),
    "no-par": ("all, without PAR", "✓✓ ", "--par"),
    "static": ("all, DeepLabV3+'s rates in every epoch", "✓✓✓", "--aspp static"),
    "pixels": ("all, L_seg as in AFA", "✓✓✓", "--balance pixels"),
    "unscaled": ("all, ASPP added in full", "✓✓✓", "--aspp-scale 1"),
    "soft": ("all, CAM itself before PAR", "✓✓✓", "--coarse soft"),
    "afa": ("all, PAR with AFA's dilations", "✓✓✓", "--par 1 2 4 8 12 24"),
    "no-teacher": ("all, without a teacher", "✓✓✓", "--teacher none"),
    "transfgu": ("TransFGU", "   ", ""),
    "released": ("DMSA as its authors released it", "✓  ", "--released"),
}
BY_TRANSFGU = ("transfgu", "released")                    # rows of tools/transfgu.py
ADDED = ("seg", "aspp", "par", "dmsa")                    # rows that are compared with the baseline
# Table 4 of the paper, mIoU and accuracy. Its column L_all holds the marks of L_seg (Sec. 4.3)
PAPER = {
    ("voc", "vits16"): {"baseline": (30.47, 69.37)},
    ("voc", "vits8"): {"baseline": (35.08, 81.20), "seg": (35.51, 81.80), "aspp": (37.11, 82.87),
                       "par": (36.16, 83.15), "dmsa": (37.20, 83.60)},
    ("coco80", "vits16"): {"baseline": (11.87, 59.34)},
    ("coco80", "vits8"): {"baseline": (12.57, 64.06), "seg": (13.46, 68.80), "aspp": (13.17, 64.85),
                          "par": (12.58, 68.50), "dmsa": (14.69, 69.70)},
}


# ----------------------------------------------------------------------------
# Runs


class Run(NamedTuple):
    """One row with one seed."""
    row: str
    seed: int
    program: Path
    options: list                                         # of the program, --out among them
    args: argparse.Namespace                              # which these options are
    method: type                                          # the Trainer of the program

    def finished(self):
        """Whether all its epochs are done. Raises UserError if its folder has a run of other options."""
        state = train.resume(self.args, self.method)
        return state is not None and state["epoch"] >= self.args.epochs

    def evaluations(self):
        """What its log says of each epoch, a list of dicts; epochs beyond --epochs are left out."""
        records = map(json.loads, (Path(self.args.out) / "log.jsonl").read_text().splitlines())
        return [record for record in records if "miou" in record and record["epoch"] <= self.args.epochs]


def runs_of(args):
    """All Runs, seed by seed: the rows share the caches of a seed."""
    common = ["--data", args.data, *args.options]
    if args.backbone:
        common += ["--backbone", args.backbone]
    lambdas = train.parse(["--data", args.data]).lambdas
    no_seg = " ".join(map(str, ["--lambdas", 0, *lambdas[1:]]))
    runs = []
    for seed in args.seeds:
        for row in args.rows:
            own = ROWS[row][2].replace("NO_SEG", no_seg).split()
            name = "-".join(filter(None, (args.data, args.backbone, row, str(seed))))
            options = [*common, *own, "--seed", str(seed), "--out", str(Path(args.out) / name)]
            if row in BY_TRANSFGU:
                runs.append(Run(row, seed, HERE / "tools" / "transfgu.py", options, transfgu.parse(options),
                                transfgu.TransFGU))
            else:
                runs.append(Run(row, seed, HERE / "train.py", options, train.parse(options), train.Trainer))
    return runs


def start(run):
    """Start a run, or go on with it; returns its exit code, negative if a signal ended it."""
    command = [sys.executable, str(run.program), *run.options]
    print(" ".join(command), file=sys.stderr, flush=True)
    child = subprocess.Popen(command, stdout=sys.stderr)
    signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())        # both end
    return child.wait()


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


# ----------------------------------------------------------------------------
# The table


def best(records):
    """The best epoch as train.py chooses it."""
    return max(records, key=lambda r: r["miou"] + r["accuracy"])


def spread(values):
    """Mean ± standard deviation; one value as it is."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def lost(runs):
    """How many seeds end with a class that is below half of its median IoU over the seeds."""
    iou = np.array([records[-1]["iou"] for records in runs.values()], float)      # (seeds, n), NaN: absent
    return int((iou < np.nanmedian(iou, 0) / 2).any(1).sum())


def interval(values):
    """The 95 % interval of the mean of values (n,), by bootstrap: 10,000 samples of n with replacement."""
    means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    return np.percentile(means, [2.5, 97.5])


def passes(runs, baseline):
    """The epoch in which mIoU first is above the best of the seed's baseline: mean, or how many seeds do."""
    both = [seed for seed in runs if seed in baseline]
    reached = []
    for seed in both:
        goal = best(baseline[seed])["miou"]
        reached += [r["epoch"] for r in runs[seed] if r["miou"] > goal][:1]
    if not reached:
        return "never" if both else "–"
    if len(reached) < len(both):                          # a mean of the seeds that do would look too good
        return f"{len(reached)} of {len(both)} seeds"
    return f"{statistics.mean(reached):.1f}"


def against(row, finished):
    """The last mIoU minus the reference row's, seed by seed: mean [interval], and how many are above 0."""
    name = "baseline" if row in ADDED else "dmsa"
    runs, other = finished[row], finished.get(name, {})
    values = [runs[seed][-1]["miou"] - other[seed][-1]["miou"] for seed in runs if seed in other]
    if row == "baseline" or not values:
        return ["–", "–"]
    low, high = interval(values)
    return [f"{statistics.mean(values):+.2f} [{low:+.2f}, {high:+.2f}] to {name}",
            f"{sum(value > 0 for value in values)} of {len(values)}"]


def table(finished, paper):
    """Lines of the table. finished: {row: {seed: evaluations}}; paper: {row: (mIoU, accuracy)}, or None."""
    columns = ["method", "L_seg", "ASPP", "PAR", "mIoU", "median", "lost a class", "seed by seed [95 %]",
               "better", "accuracy", "best epoch's mIoU (chosen on val)",
               "first epoch above the baseline's best", *(["paper's mIoU", "accuracy"] if paper else [])]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row, runs in finished.items():
        name, marks, _ = ROWS[row]
        cells = [name, *marks, *["failed"] * 7, "–"]
        if runs:
            ends = [records[-1] for records in runs.values()]
            miou = [r["miou"] for r in ends]
            cells[4:] = [spread(miou), f"{statistics.median(miou):.2f}", f"{lost(runs)} of {len(runs)}",
                         *against(row, finished), spread([r["accuracy"] for r in ends]),
                         spread([best(records)["miou"] for records in runs.values()]),
                         "–" if row == "baseline" else passes(runs, finished.get("baseline", {}))]
        if paper:
            cells += [f"{v:.2f}" for v in paper[row]] if row in paper else ["–", "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 1)[1],
                                usage=argparse.SUPPRESS, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", choices=[n for n in data.NAMES if n != "folder"], default="shapes",
                   help="data set with labels (default: shapes)")
    p.add_argument("--backbone", choices=tuple(BACKBONES), help="pretrained ViT (default: by --data)")
    p.add_argument("--seeds", type=int, nargs="+", default=list(range(8)), metavar="N",
                   help="a run of each row for each (default: 0 to 7)")
    p.add_argument("--rows", choices=("all", *ROWS), nargs="+", default=["all"], metavar="ROW",
                   help=f"of: {', '.join(ROWS)} (default: all)")
    p.add_argument("--out", default="runs/ablation", metavar="DIR",
                   help="folder of the runs (default: runs/ablation)")
    p.add_argument("options", nargs="*", metavar="-- OPTIONS", help="more options of train.py")
    args = p.parse_args(argv)
    fixed = {"--data", "--backbone", "--seed", "--out", "--lambdas", "--released", "--dry-run", "--help",
             "-h"}
    fixed &= {option.split("=")[0] for option in args.options}
    if fixed:
        p.error(f"{', '.join(sorted(fixed))}: not after --; the rows and the options before it set these")
    args.seeds = list(dict.fromkeys(args.seeds))          # each once
    args.rows = list(ROWS) if "all" in args.rows else list(dict.fromkeys(args.rows))
    return args


def main():
    args = parse()
    runs = runs_of(args)
    waiting = [run for run in runs if not run.finished()]
    print(f"{len(runs)} runs, {len(args.rows)} rows of {len(args.seeds)} seeds: {len(runs) - len(waiting)} "
          f"are finished", file=sys.stderr, flush=True)
    failed = set()
    begin = time.time()
    for i, run in enumerate(waiting):
        left = f", about {duration((time.time() - begin) / i * (len(waiting) - i))} left" if i else ""
        number = len(runs) - len(waiting) + i + 1
        print(f"\nrun {number} of {len(runs)}{left}: {run.args.out}", file=sys.stderr, flush=True)
        code = start(run)
        if code:
            print(f"ablation.py: {run.args.out}: ended with code {code}, see above", file=sys.stderr)
            if code != 1:                                 # wrong options or data, a signal: so would the rest
                return code if code > 0 else 128 - code
            failed.add(run.args.out)
    finished = {row: {} for row in args.rows}
    for run in runs:
        if run.args.out not in failed:
            finished[run.row][run.seed] = run.evaluations()
    count = {row: len(seeds) for row, seeds in finished.items() if len(seeds) < len(args.seeds)}
    print(f"{args.data}, seeds {args.seeds}, {runs[0].args.epochs} epochs"
          f"{f', finished runs: {count}' if count else ''}\n")
    print("\n".join(table(finished, PAPER.get((args.data, args.backbone or "vits8")))))
    print("\nmIoU of each seed")
    for row, runs in finished.items():
        print(f"{row:10} ", *(f"{records[-1]['miou']:5.1f}" for records in runs.values()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(data.exit_code(main))
