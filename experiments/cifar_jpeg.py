"""A network trained on clean images meets JPEG: how much must move, and how many images does it take?

Source: ResNet-20 trained on CIFAR-10 (91.8 % there). Target: the same images after JPEG compression at quality 75.

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
