"""The prediction of what a backward pass keeps: against a count by hand; `test_remat.py` has compiled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from test_remat import FACTOR

from jxfer import sharding
from jxfer.activations import activations_of
from jxfer.config import Experiment, MeshConfig, ModelConfig, TrainConfig
from jxfer.methods import fine_tuning, linear_probe, scratch
from jxfer.objectives import classification
from jxfer.partition import Partition
from jxfer.plan import _activations, phase_steps, plan_method, start_phase
from jxfer.planned import plan_phases
from jxfer.state import init_state, place_state
from jxfer.step import from_input
from jxfer.task import Task, base_model

ONE_AXIS = MeshConfig()


class Mlp(nnx.Module):
    """Two linear layers, of whose backward passes everything is known."""

    stages = ("hidden", "head")

    def __init__(self):
        self.hidden = nnx.Linear(8, 32, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(32, 3, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(jnp.square(self.hidden(x)))


def test_of_two_layers_exactly_what_calculus_needs_is_kept():
    batch = {"image": jnp.ones((16, 8)), "label": jnp.zeros(16, jnp.int32), "mask": jnp.ones(16)}
    kept = {}
    for name, rules in {"all": [("**", "all")], "head": [("head/**", "head"), ("**", "frozen")]}.items():
        state, fixed = init_state(Mlp(), Partition.of(Mlp(), rules), optax.sgd(0.1))
        kept[name] = activations_of(classification(), from_input, None, state, fixed, batch)
    # The square's derivative, 2 h, is kept where the hidden layer trains; all else is of the head and its loss.
    assert kept["all"].kept - kept["head"].kept == 4 * 16 * 32
    assert kept["head"].kept >= 4 * 16 * 32
    assert (kept["all"].num_examples, kept["all"].remat) == (16, kept["all"].kept)


def planned(method=fine_tuning, mesh=ONE_AXIS, **settings):
    experiment = Experiment("test", model=ModelConfig("convnet"), mesh=mesh, train=TrainConfig(**settings))
    task = Task(tuple("abcdef"), tuple("dba"), (8, 8, 1), num_train=12)
    return plan_method(experiment, method, task)


def test_a_plan_states_it_for_one_device_and_one_microbatch():
    plan = planned(batch_size=64)
    (phase,) = plan.to_json()["phases"]
    assert phase["activations"] == dataclasses.asdict(plan.activations[0])
    assert plan.activations[0].num_examples == 64 // jax.device_count()
    assert f"activations kept for the backward pass: {plan.activations[0].kept:,} bytes for 8 examples" in str(plan)
    (half,) = planned(batch_size=64, num_microbatches=2).activations
    (wide,) = planned(batch_size=64, mesh=MeshConfig(model=2)).activations
    assert (half.num_examples, wide.num_examples) == (4, 16)
    assert half.kept < 0.6 * plan.activations[0].kept < 0.6 * 0.6 * wide.kept


def test_a_head_on_stored_features_keeps_next_to_nothing_and_a_solver_has_no_backward_pass():
    (probe,), (whole,) = planned(linear_probe).activations, planned().activations
    assert probe.kept < 0.02 * whole.kept
    assert probe.remat == probe.kept


def test_under_tensor_rules_a_device_keeps_its_part_of_the_blocks():
    size = (("patch_size", "4"), ("hidden_dim", "64"), ("num_layers", "2"), ("num_heads", "4"), ("mlp_dim", "256"))
    task, found = Task(tuple("abcdef"), tuple("abcdef"), (32, 32, 1)), {}
    for rule in ("replicated", "tensor"):
        mesh = MeshConfig(model=4, trainable=(("**", rule),), frozen=(("**", rule),))
        train = TrainConfig(batch_size=16, optimizer="sgd")
        experiment = Experiment("test", model=ModelConfig("vit_ti_16", size=size), mesh=mesh, train=train)
        model = base_model(experiment.model, scratch, task, seed=0)
        (planned,) = plan_phases(experiment, scratch, model)
        found[rule] = _activations(experiment, scratch, planned, model, task)
    assert found["tensor"].num_examples == found["replicated"].num_examples == 16 // (jax.device_count() // 4)
    assert found["tensor"].remat < 0.6 * found["replicated"].remat
    on_devices = sharding.make_mesh(mesh)
    started = start_phase(experiment, scratch, planned, model, key=jax.random.key(0))
    state, fixed = place_state(*started, on_devices, mesh)
    batch = {"image": np.zeros((16, 32, 32, 1), np.uint8), "label": np.zeros(16, np.int32), "mask": np.ones(16, "f")}
    train_step, _ = phase_steps(experiment, scratch, planned, 6)
    program = train_step.lower(state, fixed, sharding.put_batch(batch, on_devices)).compile()
    allocated = program.memory_analysis().temp_size_in_bytes
    assert allocated / FACTOR < found["tensor"].kept < FACTOR * allocated < found["replicated"].kept
