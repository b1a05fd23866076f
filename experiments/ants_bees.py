"""Ants or bees? 244 photographs, with and without ImageNet: what do 1.2 million pictures of other things bring?

Source: SqueezeNet 1.1 trained on ImageNet. Target: the hymenoptera set, 123 ants and 121 bees to train on, 153 to test.
Claim: transfer is better than training from scratch, and frozen features suffice. Expected (mean ± 95 %
interval, 5 seeds): scratch 58.2 ± 4.6, linear_probe 88.4 ± 0.7, fine_tuning 86.7 ± 2.4, layer_decay 85.2 ± 2.0 %.
Time: 22 minutes on 2 busy CPU cores.

    jxfer ablate experiments/ants_bees.py --target.name folder:hymenoptera_data \
        --source.weights file:squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5

Any other published network serves as well: `--source.weights hf:microsoft/resnet-18 --model.name auto`.
"""

from jxfer import methods
from jxfer.config import DataConfig, Experiment, ModelConfig, SearchConfig, SourceConfig, TrainConfig

experiment = Experiment(
    name="ants_bees",
    source=SourceConfig(weights="file:squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5"),
    target=DataConfig("folder:hymenoptera_data", channels=3, validation_fraction=0.2),
    model=ModelConfig("squeezenet1_1"),
    train=TrainConfig(num_steps=40, batch_size=16, warmup_steps=4, eval_every=20),
    search=SearchConfig(learning_rate=(1e-4, 1e-3)),
    methods=(methods.scratch, methods.linear_probe, methods.fine_tuning, methods.layer_decay),
    seeds=5,
)
