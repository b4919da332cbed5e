"""Which functions a sidecar runs at its start and for its calls, as a linker script that puts them next to each other.
An idle sidecar's memory is mostly the pages of its code, and the kernel maps sixteen at a time."""

import glob
import re
import subprocess

from . import count

# Enough of a name to tell functions apart; a shorter file is worth a few that come along.
_NAME = 48
# Requests after which nothing new is run.
_REQUESTS = 50


def _plain(name):
    """Without the hash, which is another one with each compiler, and callgrind's mark of recursion."""
    return re.sub(r"::h[0-9a-f]{16}$", "", re.sub(r"'\d+$", "", name.strip()))


def _ran(programs, folder):
    """Names of the functions that ran, as people read them."""
    counter = count.Counter(programs, folder)
    for case in count.CASES:
        if not case.many:
            counter.run(case, _REQUESTS)
    names = set()
    for dump in glob.glob(f"{folder}/*.out.*"):
        with open(dump, errors="replace") as file:
            found = (re.match(r"c?fn=\(\d+\) (.+)", line) for line in file)
            names.update(_plain(match[1]) for match in found if match)
    return names


def _symbols(program):
    """Each function of the program: its name for people, and for the linker."""
    listed = subprocess.run(["nm", program], check=True, capture_output=True, text=True).stdout
    rows = (line.split() for line in listed.splitlines())
    symbols = [row[2] for row in rows if len(row) == 3 and row[1] in "tTwW"]
    names = subprocess.run(["c++filt"], check=True, input="\n".join(symbols), capture_output=True, text=True).stdout
    return zip(map(_plain, names.splitlines()), symbols)


def _pattern(symbol):
    pattern = re.sub(r"17h[0-9a-f]{16}E(\.llvm\.\d+)?$", "17h*", symbol)
    return pattern if len(pattern) <= _NAME else pattern[:_NAME].rstrip("*") + "*"


def script(programs, folder):
    """The linker script."""
    ran = _ran(programs, folder)
    patterns = sorted({_pattern(symbol) for name, symbol in _symbols(f"{programs}/duet-proxy") if name in ran})
    lines = "\n".join(f"    *(.text.{pattern})" for pattern in patterns)
    return f"""/* What a sidecar runs at its start and for its calls; written by bench/layout, which see. Names that
   are not there any more do no harm, and code that is not named here goes where it always goes. */
SECTIONS {{
  .text.used : {{
{lines}
  }}
}} INSERT BEFORE .text;
"""
