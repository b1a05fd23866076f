"""LSTM and GRU against PyTorch's on packed sequences: each layer, final states, and export."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import exported, fill

from jxfer.models.rnn import Rnn, RnnConfig
from jxfer.models.stages import run_stages
from jxfer.weights.names.rnn import NAMINGS

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

TOLERANCE = 1e-5  # of blocks in float32
LENGTHS = (7, 1, 4, 9)


class TorchClassifier(torch.nn.Module):
    def __init__(self, size: RnnConfig, num_classes: int):
        super().__init__()
        kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[size.cell]
        self.embedding = torch.nn.Embedding(size.vocab_size, size.embedding_dim)
        recurrent = kind(
            size.embedding_dim,
            size.hidden_dim,
            num_layers=size.num_layers,
            bidirectional=size.bidirectional,
            batch_first=True,
        )
        setattr(self, size.cell, recurrent)
        self.recurrent = [recurrent]  # in a list, so that it has one name only
        self.fc = torch.nn.Linear(size.hidden_dim * (1 + size.bidirectional), num_classes)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pack = torch.nn.utils.rnn.pack_padded_sequence
        packed = pack(self.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
        states, final = self.recurrent[0](packed)
        states, _ = torch.nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=ids.shape[1])
        final = final[0] if isinstance(final, tuple) else final
        directions = 1 + self.recurrent[0].bidirectional
        last = torch.cat(list(final[-directions:]), dim=-1)
        return states, last, self.fc(last)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_states_and_logits_are_pytorchs(cell, bidirectional, num_layers):
    size = RnnConfig(cell, 20, 6, 5, num_layers, bidirectional, pooling="last")
    reference, model = pair(size)
    ids = np.zeros((len(LENGTHS), 10), np.int32)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = np.random.default_rng(row).integers(1, 20, length)
    with torch.no_grad():
        expected = reference(torch.tensor(ids, dtype=torch.long), torch.tensor(LENGTHS))
    states, last, logits = (tensor.numpy() for tensor in expected)
    x = jnp.asarray(ids)
    np.testing.assert_allclose(run_stages(model, x, stop="pool")["hidden"], states, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(model.features(x), last, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(model(x), logits, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_exported_weights_are_the_original_ones(cell):
    size = RnnConfig(cell, 20, 6, 5, num_layers=2)
    reference, model = pair(size)
    back = exported(model, NAMINGS[0], size)
    state = reference.state_dict()
    assert set(back) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor.numpy())


def test_a_recurrent_layer_alone_has_its_own_names():
    size = RnnConfig("gru", 20, 6, 5)
    reference, _ = pair(size)
    rest = {name: tensor for name, tensor in reference.state_dict().items() if not name.startswith("gru.")}
    assert not {"embedding.weight", "fc.weight", "fc.bias"} - set(rest)
    model = fill(network(size), NAMINGS[1], size, rest | dict(reference.gru.state_dict()))
    x = jnp.asarray([[3, 4, 0]], jnp.int32)
    np.testing.assert_array_equal(model(x), fill(network(size), NAMINGS[0], size, reference.state_dict())(x))
    optional = {rule.theirs for rule in NAMINGS[1].rules(dataclasses.replace(size)) if rule.optional}
    assert optional == set(rest)


def pair(size: RnnConfig) -> tuple[Any, Rnn]:
    """Returns a reference with random weights and our network with the same."""
    torch.manual_seed(0)
    reference = TorchClassifier(size, num_classes=3).eval()
    return reference, fill(network(size), NAMINGS[0], size, reference.state_dict())


def network(size: RnnConfig) -> Rnn:
    return Rnn(size, input_shape=(10,), num_classes=3, dtype=jnp.float32, rngs=nnx.Rngs(1))
