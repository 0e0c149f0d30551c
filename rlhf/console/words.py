"""Times, sizes and gains in few characters, the same on every line of the console."""

import os
import shlex
from pathlib import Path


def clock(seconds: float) -> str:
    """Minutes and seconds: 0:07, 12:30, 1:02:03."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def about(seconds: float) -> str:
    """A time that is an estimate: "about 8 min"."""
    return f"about {seconds / 3600:.1f} h" if seconds >= 5400 else f"about {max(1, round(seconds / 60))} min"


def count(number: float) -> str:
    """134.5M, 46.5K, 512."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.1f}{letter}"
    return f"{number:.0f}"


def gigabytes(size: float) -> str:
    """Bytes as GB."""
    return f"{size / 1e9:.1f} GB"


def signed(value: float) -> str:
    """+0.38; a zero has no sign."""
    text = f"{value:+.2f}"
    return text[1:] if float(text) == 0 else text


def plain(value: float, digits: int = 2) -> str:
    """0.38; no minus before a zero."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def interval(low: float, high: float) -> str:
    """[-0.60, +0.65]."""
    return f"[{low:+.2f}, {high:+.2f}]"


def percent(share: float) -> str:
    """96 %."""
    return f"{share:.0%}".replace("%", " %")


def path_to(path: Path) -> str:
    """A path from where the person stands, quoted for a shell. RLHF_SHELL_CWD: where that is, if a script has moved."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute, os.environ.get("RLHF_SHELL_CWD"))
    return quoted(min(relative, absolute, key=len))


def quoted(text: str) -> str:
    """For a shell."""
    return shlex.quote(text)


def one_line(text: str, width: int) -> str:
    """The text's beginning, in one line."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 2].rstrip() + " …"
