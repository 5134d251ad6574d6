"""Writes docs/benchmarks.md: what every benchmark of this folder prints on this machine."""

import argparse
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
REPORT = FOLDER.parent / "docs" / "benchmarks.md"
NAMES = ("long_conv", "diagonal", "s4", "local_attention", "state_space", "scan_or_fft", "models", "lengths")


def section(name: str, options: list[str]) -> str:
    print(f"{name} ...", file=sys.stderr)
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return f"## {name}\n`python benchmarks/{name}.py`\n\n{printed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, printed and not written")
    options = parser.parse_args()
    sections = [section(name, ["--quick"] if options.quick else []) for name in NAMES]
    text = "# Benchmarks\nWritten by `python benchmarks/report.py`.\n\n" + "\n".join(sections)
    if options.quick:
        print(text)
    else:
        REPORT.write_text(text)


if __name__ == "__main__":
    main()
