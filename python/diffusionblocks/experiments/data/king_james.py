"""The King James Bible, 4 MB of English, as the program of Debian's package bible-kjv prints it."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess

EVERYTHING = "Genesis1:1-Revelation22:21"
VERSE = re.compile(r"(\w+):\d+ (.*)")  # as the program prints it: book and chapter, verse, text


def chapters() -> list[str]:
    """Return the text of each chapter, a verse a line.

    Raises: FileNotFoundError if the package isn't installed.
    """
    program = shutil.which("bible")
    if program is None:
        raise FileNotFoundError("text=king-james needs the program `bible`: install Debian's package bible-kjv")
    printed = subprocess.run([program, "-f", EVERYTHING], capture_output=True, text=True, check=True).stdout
    verses = [match.groups() for match in map(VERSE.fullmatch, printed.splitlines()) if match]
    return ["\n".join(text for _, text in group) for _, group in itertools.groupby(verses, lambda verse: verse[0])]
