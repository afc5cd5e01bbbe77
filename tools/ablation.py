"""Table 4: what every module is worth, and rows that nobody has published.

    python tools/ablation.py                              # `shapes`, seeds 0 to 7 of every row
    python tools/ablation.py --data voc --backbone vits16 -- --root /data --accumulate 4
    python tools/ablation.py --rows baseline all --seeds 0 -- --epochs 2

Every run is a train.py of its own, in OUT/<data>[-<backbone>]-<row>-<seed>; its words go to stderr, the
table to stdout. The same command again goes on where it stopped and reuses what is finished. Options after --
go to every train.py; what a row itself sets wins.

In the table, mean ± standard deviation over the seeds: mIoU and accuracy of the last epoch; mIoU of the best
epoch, chosen on val by the sum of both, as the peers do, and therefore too high; and the first epoch whose
mIoU is above the best epoch of the same seed's baseline: the mean, if there is one for every seed. With
`shapes` another seed also means other scenes, some of them harder. Rows are therefore also compared seed by
seed: the last mIoU minus that of the same seed's baseline (rows that add to it, and `all`) or of its `all`
(the rest), as mean ± standard error of the mean. With eight seeds, about one in twelve rows that change
nothing will show a difference of more than two standard errors; with fewer seeds, more.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import data                                               # noqa: E402
from model import BACKBONES                               # noqa: E402
from train import SETTINGS                                # noqa: E402

# row: (name, the three check marks of Table 4, options of train.py); NO_SEG: the lambdas with L_seg's 0
ROWS = {
    "baseline": ("L_CE + L_un + L_cls", "   ", "NO_SEG --aspp none --par"),
    "seg": ("+ L_seg", "✓  ", "--aspp none --par"),
    "aspp": ("+ ASPP", " ✓ ", "NO_SEG --par"),
    "par": ("+ PAR", "  ✓", "NO_SEG --aspp none"),
    "all": ("all (DMSA)", "✓✓✓", ""),
    "paper": ("L_CE + L_un + L_cls, TransFGU's teacher, fusion", "   ",
              "NO_SEG --aspp none --par --teacher reset --teacher-weight 0.5"),
    "no-seg": ("all, without L_seg", " ✓✓", "NO_SEG"),
    "no-aspp": ("all, without ASPP", "✓ ✓", "--aspp none"),
    "no-par": ("all, without PAR", "✓✓ ", "--par"),
    "static": ("all, DeepLabV3+'s rates in every epoch", "✓✓✓", "--aspp static"),
    "unscaled": ("all, ASPP added in full", "✓✓✓", "--aspp-scale 1"),
    "soft": ("all, CAM itself before PAR", "✓✓✓", "--coarse soft"),
    "afa": ("all, PAR with AFA's dilations", "✓✓✓", "--par 1 2 4 8 12 24"),
    "no-teacher": ("all, without a teacher", "✓✓✓", "--teacher none"),
    "transfgu": ("TransFGU", "   ", "--preset transfgu"),
    "released": ("DMSA as its authors released it", "✓  ", "--preset released"),
}
# Table 4 of the paper, mIoU and accuracy. Its column L_all holds the marks of L_seg (Sec. 4.3)
PAPER = {
    ("voc", "vits16"): {"baseline": (30.47, 69.37)},
    ("voc", "vits8"): {"baseline": (35.08, 81.20), "seg": (35.51, 81.80), "aspp": (37.11, 82.87),
                       "par": (36.16, 83.15), "all": (37.20, 83.60)},
    ("coco80", "vits16"): {"baseline": (11.87, 59.34)},
    ("coco80", "vits8"): {"baseline": (12.57, 64.06), "seg": (13.46, 68.80), "aspp": (13.17, 64.85),
                          "par": (12.58, 68.50), "all": (14.69, 69.70)},
}


def run(folder, options):
    """Run, or go on with, one training: its evaluations, one dict an epoch; None if it failed."""
    command = [sys.executable, str(HERE / "train.py"), *options, "--out", str(folder)]
    print(f"\n{' '.join(command)}", file=sys.stderr, flush=True)
    child = subprocess.Popen(command, stdout=sys.stderr)
    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))    # both end
    code = child.wait()
    if code:
        print(f"ablation.py: {folder}: ended with code {code}, see above", file=sys.stderr)
        if code != 1:                                     # wrong options or data, a signal: so would the rest
            sys.exit(code if code > 0 else 128 - code)
        return None
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "miou" in record]


def best(records):
    """The best epoch as train.py chooses it."""
    return max(records, key=lambda r: r["miou"] + r["accuracy"])


def spread(values, sign="", n=1):
    """Mean ± standard deviation / √n; one value as it is. sign "+": also before a positive mean."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values) / n ** 0.5:.2f}" if len(values) > 1 else mean


def passes(runs, baseline):
    """The epoch in which mIoU first is above the best of the seed's baseline: mean, or how many seeds do."""
    both, reached = [seed for seed in runs if seed in baseline], []
    for seed in both:
        goal = best(baseline[seed])["miou"]
        reached += [r["epoch"] for r in runs[seed] if r["miou"] > goal][:1]
    if not reached:
        return "never" if both else "–"
    if len(reached) < len(both):                          # a mean of the seeds that do would look too good
        return f"{len(reached)} of {len(both)} seeds"
    return f"{statistics.mean(reached):.1f}"


def against(row, found):
    """The last mIoU minus the reference row's, mean ± standard error over the seeds that both have."""
    name = "baseline" if row in ("seg", "aspp", "par", "all") else "all"
    runs, other = found[row], found.get(name, {})
    values = [runs[seed][-1]["miou"] - other[seed][-1]["miou"] for seed in runs if seed in other]
    return f"{spread(values, '+', len(values))} to {name}" if values else "–"


def table(found, paper):
    """The lines of the table. found: {row: {seed: evaluations}}; paper: {row: (mIoU, accuracy)} or None."""
    columns = ["method", "L_seg", "ASPP", "PAR", "mIoU", "seed by seed", "accuracy",
               "best epoch's mIoU (chosen on val)", "first epoch above the baseline's best",
               *(["paper's mIoU", "accuracy"] if paper else [])]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row, runs in found.items():
        name, marks, _ = ROWS[row]
        cells = [name, *marks, *["failed"] * 4, "–"]
        if runs:
            ends = [records[-1] for records in runs.values()]
            cells[4:] = [spread([r["miou"] for r in ends]),
                         "–" if row == "baseline" else against(row, found),
                         spread([r["accuracy"] for r in ends]),
                         spread([best(records)["miou"] for records in runs.values()]),
                         "–" if row == "baseline" else passes(runs, found.get("baseline", {}))]
        if paper:
            cells += [f"{v:.2f}" for v in paper[row]] if row in paper else ["–", "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 1)[1],
                                usage=argparse.SUPPRESS, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", choices=[n for n in data.NAMES if n != "folder"], default="shapes",
                   help="data set with labels (default: shapes)")
    p.add_argument("--backbone", choices=tuple(BACKBONES), help="pretrained ViT (default: by --data)")
    p.add_argument("--seeds", type=int, nargs="+", default=list(range(8)), metavar="N",
                   help="a run of each row for each (default: 0 to 7)")
    p.add_argument("--rows", choices=tuple(ROWS), nargs="+", default=list(ROWS), metavar="ROW",
                   help=f"of: {', '.join(ROWS)} (default: all of them)")
    p.add_argument("--out", default="runs/ablation", metavar="DIR",
                   help="folder of the runs (default: runs/ablation)")
    p.add_argument("options", nargs="*", metavar="-- OPTIONS", help="more options of train.py")
    args = p.parse_args()
    fixed = {"--data", "--backbone", "--seed", "--out", "--preset", "--lambdas", "--dry-run", "--help", "-h"}
    fixed &= {option.split("=")[0] for option in args.options}
    if fixed:
        p.error(f"{', '.join(sorted(fixed))}: not after --; the rows and the options before it set these")
    args.seeds = list(dict.fromkeys(args.seeds))
    # Ctrl-C goes to train.py too, which says so by its exit code
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    no_seg = " ".join(map(str, ("--lambdas", 0, *SETTINGS[args.data]["lambdas"][1:])))
    common = ["--data", args.data, *(["--backbone", args.backbone] if args.backbone else []), *args.options]
    found = {row: {} for row in args.rows}
    for seed in args.seeds:                               # seed by seed: the rows share the caches of a seed
        for row in found:
            records = run(Path(args.out) / "-".join(filter(None, (args.data, args.backbone, row, str(seed)))),
                          [*common, *ROWS[row][2].replace("NO_SEG", no_seg).split(), "--seed", str(seed)])
            if records:
                found[row][seed] = records
    count = {row: len(runs) for row, runs in found.items() if len(runs) < len(args.seeds)}
    lengths = {records[-1]["epoch"] for runs in found.values() for records in runs.values()}
    if len(lengths) > 1:                                  # train.py leaves a run alone that is already longer
        p.error(f"--out {args.out}: finished runs of {sorted(lengths)} epochs are not to be compared; give "
                f"another")
    print(f"{args.data}, seeds {args.seeds}, {max(lengths, default=0)} epochs"
          f"{f', finished runs: {count}' if count else ''}\n")
    print("\n".join(table(found, PAPER.get((args.data, args.backbone or "vits8")))))
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
