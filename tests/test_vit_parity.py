"""Vision transformers against transformers and against plain PyTorch under timm's and torchvision's names."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import exported, fill

from jxfer.models.stages import run_stages
from jxfer.models.vit import CONFIGS, ViT, ViTConfig
from jxfer.partition import eval_graphdef
from jxfer.weights.names.vit import NAMINGS, RESIZES, join_heads
from jxfer.weights.tensors import in_memory

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
functional = torch.nn.functional

# Float32 has 24 bits: sums in another order differ by about 1e-6 of their size, and blocks pass that on.
BLOCK_TOLERANCE = 1e-5
WHOLE_TOLERANCE = 1e-4
CLASSES = ("no", "maybe", "yes")
BY_NAME = {naming.name: naming for naming in NAMINGS}

SHARED = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4, "image_size": [8, 12]}
SQUARE = {"mlp_ratio": 2, "image_size": 12}  # its DINOv2 has positions for square images only
KINDS = {
    "vit": ("ViT", "ForImageClassification", {"intermediate_size": 24}),
    "deit": ("DeiT", "ForImageClassificationWithTeacher", {"intermediate_size": 24}),
    "deit without teacher": ("DeiT", "ForImageClassification", {"intermediate_size": 24}),
    "dinov2": ("Dinov2", "ForImageClassification", {**SQUARE, "layerscale_value": 0.5}),
    "registers": ("Dinov2WithRegisters", "ForImageClassification", {**SQUARE, "num_register_tokens": 3}),
}


def randomise(reference: torch.nn.Module) -> None:
    """Gives every parameter a value that a mistake would show up in, norms and factors around 1."""
    torch.manual_seed(0)
    for name, parameter in reference.named_parameters():
        near_one = ("norm" in name or "ln" in name or "gamma" in name or "lambda" in name) and not name.endswith("bias")
        torch.nn.init.normal_(parameter, mean=1.0 if near_one else 0.0, std=0.3)


def ours(size: ViTConfig, naming: Any, state: dict[str, Any], shape: tuple[int, ...]) -> nnx.Module:
    """Returns our model in inference mode with their weights, two heads made one."""
    arrays = {name: tensor.numpy() if hasattr(tensor, "numpy") else tensor for name, tensor in state.items()}
    joined = {name: tensor.read() for name, tensor in join_heads(in_memory(arrays)).items()}
    model = ViT(size, input_shape=shape, num_classes=len(CLASSES), dtype=jnp.float32, rngs=nnx.Rngs(0))
    model = fill(model, naming, size, joined)
    return nnx.merge(eval_graphdef(model), nnx.state(model))


def published(reference: Any, folder: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns tensors and config as transformers writes them to disk, where names differ from those in memory."""
    from safetensors.numpy import load_file

    reference.save_pretrained(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def naming_of(config: dict[str, Any]) -> tuple[Any, ViTConfig]:
    """Returns the naming that knows a config, and the size it reads from it."""
    naming, found = next((naming, found) for naming in NAMINGS if (found := naming.read_config(config)) is not None)
    return naming, dataclasses.replace(CONFIGS[found[0]], **found[1])


def nhwc(tensor: torch.Tensor) -> Any:
    return jnp.asarray(tensor.detach().numpy().transpose(0, 2, 3, 1))


def run(model: nnx.Module, images: torch.Tensor) -> Any:
    return nnx.jit(lambda model, x: model(x))(model, nhwc(images))


def assert_near(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{what}: relative difference {error:.2e}"


def random_reference(kind: str, **changes: Any) -> Any:
    """Returns a classifier of transformers with random weights."""
    name, head, fields = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SHARED, **fields, **changes}, num_labels=len(CLASSES))
    reference = getattr(transformers, f"{name}{head}")(config)
    randomise(reference)
    return reference.eval()


def shape_of(reference: Any) -> tuple[int, int, int]:
    """Returns the shape of the images it has positions for."""
    side = reference.config.image_size
    return (side, side, 3) if isinstance(side, int) else (*side, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_each_block_and_the_logits_equal_transformers(kind, tmp_path):
    reference = random_reference(kind)
    shape = shape_of(reference)
    tensors, config = published(reference, tmp_path)
    naming, size = naming_of(config)
    model = ours(size, naming, tensors, shape)
    images = torch.randn(2, 3, *shape[:2])
    with torch.no_grad():
        expected = reference(images, output_hidden_states=True)
    states = [state.numpy() for state in expected.hidden_states]
    assert len(states) == len(model.blocks) + 1
    assert_near(run_stages(model, nhwc(images), stop="blocks/0"), states[0], BLOCK_TOLERANCE, "embed")
    for index, block in enumerate(model.blocks):
        assert_near(block(jnp.asarray(states[index])), states[index + 1], BLOCK_TOLERANCE, f"blocks/{index}")
    assert_near(run(model, images), expected.logits, WHOLE_TOLERANCE, "logits")


@pytest.mark.parametrize("kind", ["vit", "dinov2", "registers", "deit without teacher"])
def test_exported_weights_and_config_give_transformers_the_same_model(kind, tmp_path):
    from safetensors.numpy import save_file

    reference = random_reference(kind)
    shape = shape_of(reference)
    tensors, config = published(reference, tmp_path)
    naming, size = naming_of(config)
    back = exported(ours(size, naming, tensors, shape), naming, size)
    assert {name for name in tensors if not name.endswith("mask_token")} == set(back)
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    save_file(back, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(naming.write_config(size, CLASSES, shape)))
    loaded = type(reference).from_pretrained(tmp_path).eval()
    assert loaded.config.id2label == dict(enumerate(CLASSES))
    images = torch.randn(2, 3, *shape[:2])
    with torch.no_grad():
        assert_near(loaded(images).logits, reference(images).logits, WHOLE_TOLERANCE)


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2"])
@pytest.mark.parametrize("shape", [(20, 20), (8, 24)])
def test_resized_positions_give_the_logits_of_transformers(kind, shape, tmp_path):
    reference = random_reference(kind, image_size=12)
    tensors, config = published(reference, tmp_path)
    naming, size = naming_of(config)
    path, (_, resize) = next(name for name in tensors if "position" in name), RESIZES[0]
    grid = (shape[0] // 4, shape[1] // 4)
    wanted = (size.num_prefix + grid[0] * grid[1], size.hidden_dim)
    tensors[path] = resize(tensors[path][0], wanted, grid=grid)[None]
    images = torch.randn(2, 3, *shape)
    with torch.no_grad():
        options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
        expected = reference(images, **options).logits
    assert_near(run(ours(size, naming, tensors, (*shape, 3)), images), expected, WHOLE_TOLERANCE)


class TimmBlock(torch.nn.Module):
    """A block under timm's names, queries, keys and values in one."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, layer_scale: bool):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (torch.nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = torch.nn.ModuleDict({"qkv": torch.nn.Linear(dim, 3 * dim), "proj": torch.nn.Linear(dim, dim)})
        self.mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(dim, mlp_dim), "fc2": torch.nn.Linear(mlp_dim, dim)})
        if layer_scale:
            for name in ("ls1", "ls2"):
                setattr(self, name, torch.nn.ParameterDict({"gamma": torch.nn.Parameter(torch.ones(dim))}))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (qkv[0] @ qkv[1].transpose(2, 3) / (dim / self.heads) ** 0.5).softmax(3)
        mixed = (weights @ qkv[2]).transpose(1, 2).reshape(batch, length, dim)
        x = x + self._scaled("ls1", self.attn["proj"](mixed))
        return x + self._scaled("ls2", self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x)))))

    def _scaled(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x * getattr(self, name)["gamma"] if hasattr(self, name) else x


class TimmViT(torch.nn.Module):
    """A vision transformer under timm's names, distilled or not."""

    def __init__(self, size: ViTConfig, grid: tuple[int, int], classes: int):
        super().__init__()
        dim = size.hidden_dim
        self.distilled = size.distilled
        patch = torch.nn.Conv2d(3, dim, size.patch_size, size.patch_size)
        self.patch_embed = torch.nn.ModuleDict({"proj": patch})
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, size.num_prefix + grid[0] * grid[1], dim))
        scaled = size.layer_scale is not None
        blocks = [TimmBlock(dim, size.num_heads, size.mlp_dim, scaled) for _ in range(size.num_layers)]
        self.blocks = torch.nn.ModuleList(blocks)
        self.norm = torch.nn.LayerNorm(dim, eps=1e-6)
        self.head = torch.nn.Linear(dim, classes)
        if size.distilled:
            self.dist_token = torch.nn.Parameter(torch.zeros(1, 1, dim))
            self.head_dist = torch.nn.Linear(dim, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)
        tokens = (self.cls_token, self.dist_token) if self.distilled else (self.cls_token,)
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2 if self.distilled else self.head(x[:, 0])


SIZES = {
    "vit": ViTConfig(4, 16, 3, 4, 24),
    "distilled": ViTConfig(4, 16, 3, 4, 24, distilled=True, pooling="cls_dist"),
    "layer scale": ViTConfig(4, 16, 3, 4, 24, layer_scale=1.0),
}


@pytest.mark.parametrize("name", SIZES)
def test_blocks_and_logits_equal_pytorch_under_the_names_of_timm(name):
    size = SIZES[name]
    reference = TimmViT(size, (2, 3), len(CLASSES)).eval()
    randomise(reference)
    state = reference.state_dict()
    model = ours(size, BY_NAME["timm"], state, (8, 12, 3))
    images, tokens = torch.randn(2, 3, 8, 12), torch.randn(2, 7, 16)
    with torch.no_grad():
        expected, blocks = reference(images), [block(tokens).numpy() for block in reference.blocks]
    for index, block in enumerate(model.blocks):
        assert_near(block(jnp.asarray(tokens.numpy())), blocks[index], BLOCK_TOLERANCE, f"blocks/{index}")
    assert_near(run(model, images), expected, WHOLE_TOLERANCE)
    if not size.distilled:
        for tensor_name, tensor in exported(model, BY_NAME["timm"], size).items():
            np.testing.assert_array_equal(tensor, state[tensor_name].numpy(), err_msg=tensor_name)


class TorchvisionLayer(torch.nn.Module):
    """A block under torchvision's names."""

    def __init__(self, size: ViTConfig):
        super().__init__()
        dim = size.hidden_dim
        self.ln_1, self.ln_2 = (torch.nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.self_attention = torch.nn.MultiheadAttention(dim, size.num_heads, batch_first=True)
        up, down = torch.nn.Linear(dim, size.mlp_dim), torch.nn.Linear(size.mlp_dim, dim)
        self.mlp = torch.nn.Sequential(up, torch.nn.GELU(), torch.nn.Identity(), down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TorchvisionViT(torch.nn.Module):
    """A vision transformer under torchvision's names."""

    def __init__(self, size: ViTConfig, grid: tuple[int, int], classes: int):
        super().__init__()
        self.class_token = torch.nn.Parameter(torch.zeros(1, 1, size.hidden_dim))
        self.conv_proj = torch.nn.Conv2d(3, size.hidden_dim, size.patch_size, size.patch_size)
        self.encoder = torch.nn.Module()
        self.encoder.pos_embedding = torch.nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], size.hidden_dim))
        layers = {f"encoder_layer_{i}": TorchvisionLayer(size) for i in range(size.num_layers)}
        self.encoder.layers = torch.nn.ModuleDict(layers)
        self.encoder.ln = torch.nn.LayerNorm(size.hidden_dim, eps=1e-6)
        self.heads = torch.nn.ModuleDict({"head": torch.nn.Linear(size.hidden_dim, classes)})

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.conv_proj(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.encoder.pos_embedding
        for layer in self.encoder.layers.values():
            x = layer(x)
        return self.heads["head"](self.encoder.ln(x)[:, 0])


@pytest.mark.parametrize("old_names", [False, True])
def test_logits_equal_pytorch_under_the_names_of_torchvision(old_names):
    size = SIZES["vit"]
    reference = TorchvisionViT(size, (2, 3), len(CLASSES)).eval()
    randomise(reference)
    state = reference.state_dict()
    if old_names:
        state = {name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): x for name, x in state.items()}
    images = torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        expected = reference(images)
    model = ours(size, BY_NAME["torchvision"], state, (8, 12, 3))
    assert_near(run(model, images), expected, WHOLE_TOLERANCE)
    back = exported(model, BY_NAME["torchvision"], size)
    assert len(back) == len(state)
