"""draft"""
from jxfer import methods
from jxfer.config import DataConfig, Experiment, ModelConfig, SearchConfig, SourceConfig, TrainConfig

experiment = Experiment(
    name="glyphs_to_digits",
    source=SourceConfig(data=DataConfig("tfds:jxfer_glyphs"), train=TrainConfig(num_steps=int(__import__("os").environ.get("SRC",1500)), batch_size=128, learning_rate=3e-3, eval_every=300, log_every=100, warmup_steps=100)),
    target=DataConfig("tfds:jxfer_digits"),
    model=ModelConfig("convnet"),
    train=TrainConfig(num_steps=150, batch_size=64, eval_every=50),
    search=SearchConfig(learning_rate=(1e-3, 1e-2)),
    methods=(methods.scratch, methods.zero_shot, methods.linear_probe, methods.feature_retraining, methods.fine_tuning, methods.fine_tuning_kept_head, methods.partial, methods.lp_ft),
    shots=(1, 2, 5, 10, 20),
    seeds=5,
)
