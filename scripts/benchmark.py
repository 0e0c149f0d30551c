"""Time this trainer against TRL 1.12's on the same work, A B A B: rlhf benchmark --shape seed --trl DIR."""

from rlhf.cli.__main__ import run

if __name__ == "__main__":
    run("benchmark")
