"""`python -m server.finetune`: the worker process; with JOB FENCE FOLDER the one that trains a job for it."""

import argparse
from pathlib import Path

from server.child_process import run_child


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m server.finetune")
    parser.add_argument("job", nargs="?", help="a job's id; without it, wait for jobs")
    parser.add_argument("fence", nargs="?", type=int, help="what the worker holds it under")
    parser.add_argument("folder", nargs="?", type=Path, help="where to compute")
    args = parser.parse_args()
    if args.job is None:
        from server.finetune.worker.worker import serve

        run_child("worker", serve)
    else:
        from server.finetune.worker.resource_limits import yield_to_others

        yield_to_others()  # before any thread is made, which would not
        from server.finetune.worker.training_process import train  # loads torch; the worker does not

        run_child("training", lambda settings: train(settings, args.job, args.fence, args.folder))


if __name__ == "__main__":
    main()
