"""Transfers to a folder of your own images, one sub-folder per class, from characters or from a run of your own.

Claim: none; it is the shortest file to start from. Time: 4 minutes on 2 CPU cores for 250 images and one seed.

    jxfer ablate experiments/image_folder.py --target.name folder:PATH [--source.weights run:DIR]
"""

from jxfer import methods
from jxfer.config import AugmentConfig, DataConfig, Experiment, ModelConfig, SourceConfig, TrainConfig

experiment = Experiment(
    name="image_folder",
    source=SourceConfig(
        data=DataConfig("tfds:jxfer_glyphs/32x32", channels=3, validation_fraction=0.05),
        train=TrainConfig(num_steps=300, learning_rate=3e-3, checkpoint_every=100),
    ),
    target=DataConfig("folder:images", image_size=32, channels=3, augment=AugmentConfig(crop_padding=4, flip=True)),
    model=ModelConfig("resnet20"),
    train=TrainConfig(num_steps=150, checkpoint_every=50),
    methods=(methods.scratch, methods.feature_retraining, methods.fine_tuning),
    seeds=3,
)
