"""How soon the first job starts, and what lies between two jobs of a worker: empty jobs.

.venv/bin/python tests/gaps.py --workers 2
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

from collapse.runs.engine import run_all
from collapse.runs.progress import Job


def note(job: Job, progress) -> None:
    with open(job.folder.parent / "spans.txt", "a") as file:
        begun = time.time()
        (job.folder / "metrics.json").touch()
        file.write(f"{os.getpid()} {begun} {time.time()}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job(f"job {i}", Path(folder) / f"job-{i}", 1) for i in range(arguments.jobs)]
        started = time.time()
        run_all(jobs, note, arguments.workers)
        whole = time.time() - started
        rows = [line.split() for line in (Path(folder) / "spans.txt").read_text().splitlines()]
    gaps, first = [], min(float(begun) for _, begun, _ in rows) - started
    for _, spans in itertools.groupby(sorted(rows), key=lambda row: row[0]):
        gaps += [float(b[1]) - float(a[2]) for a, b in itertools.pairwise(spans)]
    print(
        f"{len(rows)} jobs in {whole:.2f} s; the first began after {first:.2f} s; between two lay "
        f"{1000 * statistics.median(gaps):.1f} ms (median; at most {1000 * max(gaps):.1f})"
    )


if __name__ == "__main__":
    main()
