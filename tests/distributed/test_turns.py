"""Several processes: their order, ending together if one fails, and gathering in the batch's order."""

from workers import launch

TURNS = """
import time
from rlhf.distributed.collectives import Shard, all_rows, main_process_first, on_all
run = trainer(**options)
rank, diary = run.accelerator.process_index, folder / "diary"
with main_process_first():
    if rank == 0:
        time.sleep(0.5)
    with diary.open("a") as file:
        file.write(f"{rank} ")
assert diary.read_text().startswith("0 ")
ends = []
for failing in (0, 1):
    try:
        with main_process_first():
            if rank == failing:
                raise KeyError(f"of {rank}")
            ends.append("ran")
    except (KeyError, SystemExit) as end:
        ends.append(repr(end))
assert ends == (["KeyError('of 0')", "ran", "SystemExit(2)"], ["SystemExit(2)", "KeyError('of 1')"])[rank], ends
assert on_all(lambda: rank) == rank
assert all_rows([len(ends)]) == [3, 2]
for items in (list("abcde"), list("abcdef"), ["a"], []):
    shard = Shard.of_rank(len(items), run.accelerator)
    assert shard.gather([f"{rank}{item}" for item in shard.of(items)[: shard.n_valid]]) == [
        f"{i % 2}{item}" for i, item in enumerate(items)
    ]
"""


def test_rank_0_goes_first_and_where_one_fails_all_end(tmp_path):
    launch(tmp_path, TURNS, {"max_steps": 1}, processes=2)
    assert (tmp_path / "diary").read_text() == "0 1 "
