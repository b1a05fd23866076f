"""ConvNeXt against transformers: each block, logits on odd image sizes, and export."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import exported, fill

from jxfer.models.convnext import CONFIGS, ConvNeXt
from jxfer.weights.names.convnext import NAMINGS

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Float32 has 24 bits: sums in another order differ by about 1e-6 of their size, and blocks pass that on.
BLOCK_TOLERANCE = 1e-5
WHOLE_TOLERANCE = 1e-4
CLASSES = ("no", "maybe", "yes")
TRANSFORMERS = next(naming for naming in NAMINGS if naming.name == "transformers")


@pytest.fixture(scope="module", name="reference")
def _reference():
    config = transformers.ConvNextConfig(depths=[1, 2, 1, 1], hidden_sizes=[4, 6, 8, 12], num_labels=len(CLASSES))
    reference = transformers.ConvNextForImageClassification(config).eval()
    torch.manual_seed(0)
    for name, parameter in reference.named_parameters():
        near_one = name.endswith("layer_scale_parameter") or ("norm" in name and name.endswith("weight"))
        torch.nn.init.normal_(parameter, mean=1.0 if near_one else 0.0, std=0.3)
    return reference


def ours(reference: Any) -> tuple[nnx.Module, Any]:
    """Returns our model with their weights, and its size as read from their config."""
    name, fields = TRANSFORMERS.read_config(json.loads(reference.config.to_json_string(use_diff=False)))
    size = dataclasses.replace(CONFIGS[name], **fields)
    shape = (64, 64, 3)
    settings = {"input_shape": shape, "num_classes": len(CLASSES), "dtype": jnp.float32}
    model = nnx.eval_shape(lambda: ConvNeXt(size, **settings, rngs=nnx.Rngs(0)))
    return fill(model, TRANSFORMERS, size, reference.state_dict()), size


def nhwc(tensor: torch.Tensor) -> Any:
    return jnp.asarray(tensor.detach().numpy().transpose(0, 2, 3, 1))


def assert_near(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{what}: relative difference {error:.2e}"


@pytest.mark.parametrize("shape", [(64, 96), (75, 70)])
def test_each_block_and_the_logits_equal_transformers(reference, shape):
    model, size = ours(reference)
    seen: dict[tuple[int, int], Any] = {}
    hooks = []
    for stage, module in enumerate(reference.convnext.encoder.stages):
        for index, layer in enumerate(module.layers):
            key = (stage, index)
            hook = layer.register_forward_hook(lambda m, inputs, y, key=key: seen.update({key: (inputs[0], y)}))
            hooks.append(hook)
    images = torch.randn(2, 3, *shape)
    with torch.no_grad():
        expected = reference(images).logits
    for hook in hooks:
        hook.remove()
    assert len(seen) == sum(size.num_blocks)
    for (stage, index), (x, y) in seen.items():
        block = getattr(model, f"layer{stage + 1}")[index]
        before, block.downsample = block.downsample, None  # theirs is not part of the block
        assert_near(nnx.jit(lambda block, x: block(x))(block, nhwc(x)), nhwc(y), BLOCK_TOLERANCE, f"{stage}/{index}")
        block.downsample = before
    assert_near(nnx.jit(lambda model, x: model(x))(model, nhwc(images)), expected, WHOLE_TOLERANCE)


def test_exported_weights_and_config_give_transformers_the_same_model(reference, tmp_path):
    from safetensors.numpy import save_file

    model, size = ours(reference)
    tensors = exported(model, TRANSFORMERS, size)
    assert set(tensors) == set(reference.state_dict())
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, reference.state_dict()[name].numpy(), err_msg=name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMERS.write_config(size, CLASSES, (64, 64, 3))))
    loaded = transformers.ConvNextForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.id2label == dict(enumerate(CLASSES))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_near(loaded(images).logits, reference(images).logits, WHOLE_TOLERANCE)
