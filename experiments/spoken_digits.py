"""Spoken digits from few examples: what does an embedding trained to find key words know of them already?

Source: Google's speech embedding, 328,217 parameters. Target: the Free Spoken Digit Dataset, six speakers, 8 kHz.
Claim: a linear head on the frozen embedding knows the digits from five examples each, and speakers it never heard.
Expected (mean ± 95 % interval, 3 seeds): 86.4 ± 12.4 % at one example per class, 95.9 ± 4.1 % at five (from scratch
17.7 and 24.3 %), 97.7 ± 2.9 % with all, 99.5 ± 0.3 % and 95.8 ± 4.7 % on the unseen speakers theo and lucas.
Time: 15 minutes on 2 busy CPU cores, nearly all of it from scratch.

First write its tables into its folder, the official one (index 0 to 4 of each digit and speaker is the test split) and
one per unseen speaker:

    python experiments/spoken_digits.py recordings
    jxfer ablate experiments/spoken_digits.py --target.name table:recordings/digits.csv \
        --source.weights file:google_speech_embedding.npz
    jxfer ablate experiments/spoken_digits.py --target.name table:recordings/without_theo.csv --shots none \
        --source.weights file:google_speech_embedding.npz --out out/spoken_digits_theo
"""

import csv
import sys
from collections.abc import Callable
from pathlib import Path

from jxfer import methods
from jxfer.config import DataConfig, Experiment, ModelConfig, SearchConfig, SourceConfig, TrainConfig

experiment = Experiment(
    name="spoken_digits",
    source=SourceConfig(weights="file:google_speech_embedding.npz"),
    target=DataConfig("table:recordings/digits.csv", sample_rate=16000, seconds=1.0, validation_fraction=0.1),
    model=ModelConfig("speech_embedding"),
    train=TrainConfig(num_steps=60, batch_size=16, eval_every=30),
    search=SearchConfig(learning_rate=(1e-3, 1e-2)),
    methods=(methods.scratch, methods.linear_probe),
    shots=(1, 5),
    seeds=3,
)

SPEAKERS = ("theo", "lucas")
"""Left out of the training, one at a time."""


def write_table(folder: Path, name: str, is_test: Callable[[str, int], bool]) -> None:
    """Writes `name`, a table of the recordings `DIGIT_SPEAKER_INDEX.wav` in a folder, into it."""
    with (folder / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "split"])
        for path in sorted(folder.glob("*_*_*.wav")):
            digit, speaker, index = path.stem.split("_")
            writer.writerow([path.name, digit, "test" if is_test(speaker, int(index)) else "train"])


def main(folder: Path) -> None:
    """Writes the official table and one for each unseen speaker."""
    write_table(folder, "digits.csv", lambda speaker, index: index < 5)
    for unseen in SPEAKERS:
        write_table(folder, f"without_{unseen}.csv", lambda speaker, index, unseen=unseen: speaker == unseen)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
