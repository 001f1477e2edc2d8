"""`python -m peers PATH JOB_FOLDER OUT_FOLDER`: run one path of the job once.

The paths are modules that this one imports, and never `__main__` itself: Ray sends functions of
`__main__` to its actors as copies, and what a copy keeps between two calls is lost.
"""

from __future__ import annotations

import sys
from pathlib import Path

from peers.job import read_job


def main() -> None:
    """Import only what the path needs: imports are part of its start-up."""
    path, job_folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    job = read_job(job_folder)
    if path == "prepare":
        from peers.prepare import prepare

        prepare(job)
    elif path.startswith("bare"):
        from peers.bare import run_bare

        run_bare(job, out, processes=2 if path == "bare-2proc" else 1)
    elif path.startswith("flower"):
        from peers.flower_ray import run_flower

        run_flower(job, out, path)
    elif path == "pfl":
        from peers.pfl_research import run_pfl

        run_pfl(job, out)
    else:
        raise SystemExit(f"there is no path '{path}'")


if __name__ == "__main__":
    main()
