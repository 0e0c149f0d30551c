"""One run of one side, in a separate process: python -m rlhf.benchmark.worker SIDE RUN; prints one JSON line."""

import json
import sys
import tempfile
from typing import Any

from rlhf.benchmark import work
from rlhf.benchmark.work import RESULT, read_run


def result(side: str, run: work.Run, folder: str) -> dict[str, Any]:
    """side: rlhf, trl (for evaluation: plain transformers), or counts, of what rlhf computes."""
    if side == "counts":
        from rlhf.benchmark import counts

        return counts.counted(run, folder)
    ours = side == "rlhf"
    if run.work.startswith("ppo"):
        from rlhf.benchmark import ppo

        return (ppo.rlhf if ours else ppo.trl)(run, folder)
    from rlhf.benchmark import others

    return (others.reward if run.work == "reward" else others.evaluation)(run, folder, ours)


def main() -> None:
    """Arguments: the side, and a Run as JSON."""
    side, given = sys.argv[1], json.loads(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        print(RESULT + json.dumps(result(side, read_run(given), folder)))


if __name__ == "__main__":
    main()
