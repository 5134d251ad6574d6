"""Writes docs/benchmarks.md: what every benchmark of this folder prints on this machine, or the named ones anew."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
REPORT = FOLDER.parent / "docs" / "benchmarks.md"
NAMES = (
    "long_conv",
    "diagonal",
    "s4",
    "local_attention",
    "linear_step",
    "decode",
    "state_space",
    "scan_or_fft",
    "models",
    "lengths",
)
HEADER = "# Benchmarks\nWritten by `python benchmarks/report.py`.\n\n"


def section(name: str, options: list[str]) -> str:
    print(f"{name} ...", file=sys.stderr)
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return f"## {name}\n`python benchmarks/{name}.py`\n\n{printed}"


def text_of(sections: dict[str, str]) -> str:
    return HEADER + "\n".join(sections[name] for name in NAMES if name in sections)


def written_sections() -> dict[str, str]:
    text = REPORT.read_text().removeprefix(HEADER) if REPORT.exists() else ""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return {part.split("\n", 1)[0].removeprefix("## "): part.rstrip("\n") + "\n" for part in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; all of them unless given")
    parser.add_argument("--quick", action="store_true", help="small shapes, printed and not written")
    options = parser.parse_args()
    for name in options.names:
        if name not in NAMES:
            parser.error(f"name is {name!r}, expected one of {', '.join(NAMES)}")
    sections = {} if options.quick else written_sections()
    for name in options.names or NAMES:
        sections[name] = section(name, ["--quick"] if options.quick else [])
        if not options.quick:
            REPORT.write_text(text_of(sections))
    if options.quick:
        print(text_of(sections))


if __name__ == "__main__":
    main()
