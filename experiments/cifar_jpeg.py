"""A network trained on clean images meets JPEG: how much must move, and how many images does it take?

Source: ResNet-20 trained on CIFAR-10 (91.8 % there). Target: the same images after JPEG compression at quality 75.
Claim: with few images the statistics of the norms are all that should move, with more everything should. Expected (mean
± 95 % interval, 3 seeds): as it is 81.0 %; at 10 / 100 / all images per class norm_statistics 83.2 ± 0.2 each time,
head_only 82.3 ± 0.9 / 82.6 ± 0.4 / 82.6 ± 0.1, last_stage 79.2 ± 0.8 / 82.4 ± 1.4 / 83.6 ± 0.6, fine_tuning_kept_head
79.0 ± 3.9 / 83.8 ± 0.9 / 85.1 ± 0.4, scratch 26.7 ± 3.5 / 35.5 ± 0.3 / 37.5 ± 2.4 %. Time: 40 minutes on 2 CPU cores.

    jxfer ablate experiments/cifar_jpeg.py --target.name folder:cifar10_jpeg \
        --source.weights file:resnet20-12fca82f.th
"""

from jxfer import methods
from jxfer.config import (
    AugmentConfig,
    DataConfig,
    Experiment,
    Method,
    ModelConfig,
    Phase,
    SourceConfig,
    TrainConfig,
)
from jxfer.surgery.head import KeepRows

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# The classes are the source's own, so every method starts from the source's head.
head_only = Method(
    "head_only",
    summary="the source's head trains, the rest is frozen",
    surgeries=(KeepRows(),),
    phases=(Phase("tune", train=("head",)),),
)

last_stage = Method(
    "last_stage",
    summary="the last stage and the source's head train, the rest is frozen",
    rules=methods.partial.rules,
    surgeries=(KeepRows(),),
    phases=(Phase("tune", train=("head", "last")),),
)

experiment = Experiment(
    name="cifar_jpeg",
    source=SourceConfig(weights="file:resnet20-12fca82f.th", classes=CLASSES),
    target=DataConfig(
        "folder:cifar10_jpeg", validation_fraction=0.02, augment=AugmentConfig(crop_padding=4, flip=True)
    ),
    model=ModelConfig("resnet20"),
    train=TrainConfig(num_steps=100, batch_size=128, eval_every=50, warmup_steps=10),
    methods=(
        methods.zero_shot,
        methods.norm_statistics,
        head_only,
        last_stage,
        methods.fine_tuning_kept_head,
        methods.scratch,
    ),
    shots=(10, 100, None),
    seeds=3,
)
