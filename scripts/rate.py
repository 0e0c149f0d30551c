"""Blind human rating of a run's responses: rlhf rate sheet|serve|import --run NAME [--field value …]."""

from rlhf.cli.__main__ import run

if __name__ == "__main__":
    run("rate")
