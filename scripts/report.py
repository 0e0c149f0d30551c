"""Write a run's report from its files: rlhf report --run NAME."""

from rlhf.cli.__main__ import run

if __name__ == "__main__":
    run("report")
