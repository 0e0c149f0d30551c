"""Type a prompt and read base, full and LoRA side by side with their scores: python scripts/compare.py --run NAME."""

from rlhf.cli.compare import main
from rlhf.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
