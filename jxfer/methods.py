"""Every method on one page: how to transfer, as data."""

from jxfer.config import Group, Method, Phase
from jxfer.penalties.l2sp import L2SP
from jxfer.solvers.logistic import LogisticPath
from jxfer.solvers.maps import Whiten
from jxfer.solvers.means import NearestMean
from jxfer.solvers.neighbours import NearestNeighbours
from jxfer.solvers.ridge import RidgePath
from jxfer.solvers.selection import SelectedLogistic
from jxfer.surgery.head import KeepRows, MLPHead, NewHead
from jxfer.surgery.lora import LoRA
from jxfer.surgery.neighbours import NeighbourVotes
from jxfer.surgery.taps import TapHead

ALL = ("head", "backbone")

scratch = Method(
    name="scratch",
    summary="train from random weights: the baseline to beat",
    start="scratch",
    phases=(Phase("train", train=ALL),),
)

zero_shot = Method(
    name="zero_shot",
    summary="the source model's own outputs for the target's classes, no training",
    surgeries=(KeepRows(),),
)

# Li et al. 2016, arXiv:1603.04779: what distinguishes domains sits in the statistics of the activations.
norm_statistics = Method(
    name="norm_statistics",
    summary="the source model with its normalisation statistics estimated anew on the target, nothing else",
    surgeries=(KeepRows(),),
    phases=(Phase("estimate", train=(), statistics=True),),
)

linear_probe = Method(
    name="linear_probe",
    summary="a new linear head on the frozen source",
    surgeries=(NewHead(),),
    phases=(Phase("probe", train=("head",)),),
)

logistic_probe = Method(
    name="logistic_probe",
    summary="logistic regression on the frozen source's features, exactly, at every strength of a path",
    surgeries=(NewHead(),),
    phases=(Phase("solve", train=("head",), solver=LogisticPath()),),
)

ridge_probe = Method(
    name="ridge_probe",
    summary="ridge regression on the frozen source's features, in closed form, at every strength of a path",
    surgeries=(NewHead(),),
    phases=(Phase("solve", train=("head",), solver=RidgePath()),),
)

# Mensink et al. 2013, "Distance-Based Image Classification"; as a baseline for few shots Snell et al. 2017,
# arXiv:1703.05175.
nearest_mean = Method(
    name="nearest_mean",
    summary="the class whose mean feature is nearest, as a linear head",
    surgeries=(NewHead(),),
    phases=(Phase("solve", train=("head",), solver=NearestMean()),),
)

nearest_neighbours = Method(
    name="nearest_neighbours",
    summary="a vote among the training examples with the most similar features",
    surgeries=(NeighbourVotes(),),
    phases=(Phase("solve", train=("head",), solver=NearestNeighbours()),),
)

# Evci et al. 2022, arXiv:2201.03529; the selection is described with the solver.
head2toe = Method(
    name="head2toe",
    summary="logistic regression on the most useful of all stages' features together",
    surgeries=(TapHead(),),
    phases=(Phase("solve", train=("head",), solver=SelectedLogistic()),),
)

feature_retraining = Method(
    name="feature_retraining",
    summary="features computed once by the frozen source, a new MLP trained on them",
    surgeries=(MLPHead(),),
    phases=(Phase("train", train=("head",)),),
)

fine_tuning = Method(
    name="fine_tuning",
    summary="everything trains from the source, under a new head",
    surgeries=(NewHead(),),
    phases=(Phase("tune", train=ALL),),
)

# Howard and Ruder 2018, arXiv:1801.06146, section 3.2: lower layers are more general and should move less.
layer_decay = Method(
    name="layer_decay",
    summary="fine-tuning at rates that fall by a quarter with each layer away from the head",
    surgeries=(NewHead(),),
    phases=(Phase("tune", train=ALL, layer_decay=0.75),),
)

fine_tuning_kept_head = Method(
    name="fine_tuning_kept_head",
    summary="everything trains from the source, the head from its rows for the target's classes",
    surgeries=(KeepRows(),),
    phases=(Phase("tune", train=ALL),),
)

partial = Method(
    name="partial",
    summary="the last stage and a new head train, the rest is frozen",
    rules=(("head/**", "head"), ("{last}/**", "last"), ("**", "frozen")),
    surgeries=(NewHead(),),
    phases=(Phase("tune", train=("head", "last")),),
)

# Kumar et al. 2022, arXiv:2202.10054: first the probe, then everything gently from there.
lp_ft = Method(
    name="lp_ft",
    summary="logistic probe on whitened features, then fine-tuning from it at a tenth of the learning rate",
    surgeries=(NewHead(),),
    phases=(
        Phase("probe", train=("head",), solver=LogisticPath(map=Whiten())),
        Phase("tune", train=ALL, groups=(("head", Group(0.1)), ("backbone", Group(0.1)))),
    ),
)

# Li et al. 2018, arXiv:1802.01483.
l2_sp = Method(
    name="l2_sp",
    summary="fine-tuning with a pull of the backbone towards the source's weights",
    surgeries=(NewHead(),),
    penalties=(L2SP(),),
    phases=(Phase("tune", train=ALL),),
)

# Hu et al. 2021, arXiv:2106.09685.
lora = Method(
    name="lora",
    summary="a low-rank update beside every layer and a new head train, the source is frozen under them",
    rules=(("head/**", "head"), ("**/lora/**", "lora"), ("**", "frozen")),
    surgeries=(NewHead(), LoRA()),
    phases=(Phase("tune", train=("head", "lora")),),
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        scratch,
        zero_shot,
        norm_statistics,
        linear_probe,
        logistic_probe,
        ridge_probe,
        nearest_mean,
        nearest_neighbours,
        head2toe,
        feature_retraining,
        fine_tuning,
        layer_decay,
        fine_tuning_kept_head,
        partial,
        lp_ft,
        l2_sp,
        lora,
    )
}
