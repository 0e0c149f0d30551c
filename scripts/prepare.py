"""Download all that a recipe needs, on a machine with network: rlhf prepare --recipe NAME."""

from rlhf.cli.__main__ import run

if __name__ == "__main__":
    run("prepare")
