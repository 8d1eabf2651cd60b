"""Print the folder to give fairseq as --user-dir: fairseq-train --user-dir "$(python -m fwp_fairseq)" ..."""

from pathlib import Path

if __name__ == "__main__":
    print(Path(__file__).resolve().parent)
