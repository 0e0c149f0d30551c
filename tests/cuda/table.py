"""Prints what the pretend CUDA device counts, a line a scenario: python tests/cuda/table.py [NAME ...]

NAME: of the tests in test_scenarios.py, or part of it; all without. --ranks: those of two ranks.
"""

import sys

import test_scenarios
import test_two_ranks
from counts import Report
from server import PretendCuda

COLUMNS = ("sample", "rollout", "score", "advantages", "learn, rest", "micro-batch", "record")


def line(name: str, report: Report) -> str:
    """Faults; then synchronisations/kernels of each phase, with how often it came."""
    cells = [f"{report.n_syncs(p)}/{report.n_kernels(p)}" for p in COLUMNS]
    if not report.n_kernels("sample"):
        cells = [f"{phase} {report.n_syncs(phase)}/{report.n_kernels(phase)}" for phase in report.phases]
    calls = f"{report.n_calls('decoded token')}, {report.n_calls('micro-batch')}"
    end = "" if report.end == "ok" else f" | {report.end}"
    return f"| {name} | {len(report.faults)} | {' | '.join(cells)} | {calls} |{end}"


def main() -> None:
    ranks = "--ranks" in sys.argv
    wanted = [name for name in sys.argv[1:] if name != "--ranks"]
    rows = test_scenarios.SHORT | test_scenarios.LONG | test_scenarios.OTHERS
    if ranks:
        rows = test_two_ranks.SHORT | test_two_ranks.LONG
    print(f"| scenario | faults | {' | '.join(COLUMNS)} | decoded tokens, micro-batches |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    device = PretendCuda()
    try:
        for name, (scenario, options, *_) in rows.items():
            if not wanted or any(part in name for part in wanted):
                report = device.run_ranks(scenario, 2 if ranks else 1, **options)[0]
                print(line(name, report), flush=True)
    finally:
        device.close()


if __name__ == "__main__":
    main()
