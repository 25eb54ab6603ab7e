"""Does a text of your own need a recurrent model?

    python examples/compare_text.py [FILE]

Without a file a small periodic text is made up, so that this runs anywhere in seconds.
"""

import sys
import tempfile
from pathlib import Path

import unrecurrent as ur


def main() -> None:
    """Compare two small models on a text file and print table and verdict."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rhyme.txt"
        path.write_text("one for sorrow, two for joy, three for a girl, four for a boy. " * 100, encoding="utf-8")
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else path
        comparison = ur.compare(
            f"text:{path}", models=["gru", "window:k=8"], seeds=2, parameters=20_000, epochs=8, progress=False
        )
    print(comparison.table)
    print(comparison.verdict.text)


if __name__ == "__main__":
    main()
