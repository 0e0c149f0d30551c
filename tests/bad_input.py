"""What a script answers to a bad input, held against the promise: one line, code 2, soon, and nothing left behind."""

import time
from pathlib import Path

import pytest
from limits import HANG

from rlhf.cli.script import run_script


class Asker:
    """Runs a script's main in this process and returns the one line by which it refuses its input."""

    def __init__(self, folder: Path, capsys, monkeypatch) -> None:
        self.folder, self.capsys, self.monkeypatch = folder, capsys, monkeypatch

    def run(self, main, argv) -> tuple[int, str]:
        """Exit code and standard error."""
        self.monkeypatch.setattr("sys.argv", ["script", *map(str, argv)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(main)
        return stop.value.code, self.capsys.readouterr().err

    def __call__(self, main, *argv, words: str | list[str]) -> str:
        """The line, which holds all the words."""
        before, start = sorted(self.folder.rglob("*")), time.monotonic()
        code, said = self.run(main, argv)
        assert time.monotonic() - start < HANG, said
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2, said
        assert len(lines) == 1, said
        assert said.rstrip("\n").endswith(lines[0]), said  # a second line of the message would stand after it
        assert "Traceback" not in said
        for word in [words] if isinstance(words, str) else words:
            assert word in lines[0], lines[0]
        assert sorted(self.folder.rglob("*")) == before, "something was left behind"
        return lines[0]


def cases(table: dict[str, tuple]) -> pytest.MarkDecorator:
    """Parametrise `given` and `words` by a table: name of the case -> (what is given, words of the answer)."""
    return pytest.mark.parametrize(("given", "words"), table.values(), ids=table)
