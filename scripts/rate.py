"""Blind human rating of a run's responses: rlhf rate sheet|serve|import --run NAME [--field value …]."""

from rlhf.cli.rate import main
from rlhf.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
