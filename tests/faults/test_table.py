"""The campaign's table counts what was not tried as that."""

import trials


def test_the_table_by_hand(monkeypatch):
    why = "a file system cannot be mounted here: mount: permission denied"
    lines = trials.table({"kill": [3, 2], "disk": [1, 1]}, [why, "no GPU", why])
    assert [line.split() for line in lines[:4]] == [
        ["fault", "tried", "survived", "lost"],
        ["disk", "1", "1", "0"],
        ["kill", "3", "2", "1"],
        ["all", "4", "3", "1"],
    ]
    assert lines[4:] == [f"skipped 2: {why}", "skipped 1: no GPU"]
    assert trials.table({}, [])[1].split() == ["all", "0", "0", "0"]


def test_the_tables_of_several_processes_are_one(monkeypatch):
    monkeypatch.setattr(trials, "TALLY", trials.defaultdict(lambda: [0, 0], kill=[1, 1]))
    node = type("Node", (), {"workeroutput": {"faults": {"kill": [2, 1], "disk": [1, 0]}}})
    trials.pytest_testnodedown(node)
    trials.pytest_testnodedown(object())  # one that died has nothing to tell
    assert trials.TALLY == {"kill": [3, 2], "disk": [1, 0]}
