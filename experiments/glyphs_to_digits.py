"""How should one transfer from printed characters to handwritten digits, with 1 to 20 labelled examples per class?

Source: 62 characters rendered from matplotlib's fonts at 8×8. Target: scikit-learn's handwritten digits.
Claim: with one and two examples per class transfer is better than training from scratch, with twenty it is not.
Expected (mean ± 95 % interval, 5 seeds): fine_tuning_kept_head 84.1 ± 3.6 and fine_tuning 78.1 ± 6.2 % against scratch
64.1 ± 9.7 % at one example per class, 97.2 ± 0.7 and 97.2 ± 1.1 % against 96.6 ± 1.7 % at twenty. Time: 5 minutes on 2
CPU cores.

    jxfer ablate experiments/glyphs_to_digits.py
"""

from jxfer import methods
from jxfer.config import DataConfig, Experiment, ModelConfig, SearchConfig, SourceConfig, TrainConfig

experiment = Experiment(
    name="glyphs_to_digits",
    source=SourceConfig(
        data=DataConfig("tfds:jxfer_glyphs", validation_fraction=0.05),
        train=TrainConfig(
            num_steps=800, batch_size=128, learning_rate=3e-3, warmup_steps=50, eval_every=200, checkpoint_every=200
        ),
    ),
    target=DataConfig("tfds:jxfer_digits"),
    model=ModelConfig("convnet_dropout"),
    train=TrainConfig(num_steps=100, batch_size=64, eval_every=25),
    search=SearchConfig(learning_rate=(1e-3, 1e-2)),
    methods=(
        methods.scratch,
        methods.zero_shot,
        methods.linear_probe,
        methods.logistic_probe,
        methods.feature_retraining,
        methods.fine_tuning,
        methods.fine_tuning_kept_head,
        methods.partial,
        methods.lp_ft,
    ),
    shots=(1, 2, 5, 10, 20),
    seeds=5,
)
