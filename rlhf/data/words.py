"""The words of a text, also in scripts that write no blanks between them: there each character counts as a word."""

import re

# Thai, Lao, Tibetan, Myanmar, Khmer, Tai, Balinese, Javanese, kana, bopomofo, Chinese characters.
_NO_BLANKS = (
    "\u0e01-\u0eff\u0f00-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9df\uaa60-\uaa7f"
    "\u3005-\u3007\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
_MARKS = "\u3001-\u3003\u3008-\u301f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"  # their punctuation
_WORD = re.compile(rf"[{_NO_BLANKS}{_MARKS}]|[^\s{_NO_BLANKS}{_MARKS}]+")

# For scikit-learn: its own words of two or more letters or digits, and single characters of those scripts.
TOKEN_PATTERN = rf"[{_NO_BLANKS}]|(?:(?![{_NO_BLANKS}])\w){{2,}}"


def words(text: str) -> list[str]:
    """What stands between white space; in scripts without it, each character."""
    return _WORD.findall(text)
