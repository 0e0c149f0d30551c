"""Type a prompt and read the answers of base, full and LoRA side by side, with scores: rlhf compare --run NAME."""

from rlhf.cli.__main__ import run

if __name__ == "__main__":
    run("compare")
