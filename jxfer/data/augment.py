"""From what a data set holds to what the model sees, inside jit: scaling, random changes in training, normalisation.

Every random choice of an example comes from a key of its own, so it does not depend on how the batch is sharded.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jxfer.config import AugmentConfig, DataConfig
from jxfer.typing import Batch, InputError

NORMAL = (0.5,)
"""Mean and standard deviation where neither the user nor the weights say."""

VIEW_SEED = 0
"""Of the random changes of stored views: no run's own, so that all runs share them."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Prepares a batch on the device; token ids and stored features pass unchanged.

    With mixup or cutmix, `label_probs` [B K] joins the batch and `label` stays.
    """

    config: DataConfig
    num_classes: int
    train: bool

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        """Returns the batch with `image` as float32, changed at random by `key` in training; `audio` in [-1, 1]."""
        if "audio" in batch:
            return {**batch, "audio": batch["audio"].astype(jnp.float32) / 2**15}
        if "image" not in batch:
            return batch
        prepared: Batch = {**batch, "image": batch["image"].astype(jnp.float32) / 255}
        if self.train and self.config.augment.active:
            prepared = augment(key, prepared, self.config.augment, num_classes=self.num_classes)
        return {**prepared, "image": normalise(prepared["image"], self.config)}


@dataclasses.dataclass(frozen=True)
class PrepareViews:
    """Prepares images as `Prepare` does in training, each changed by a key that its `example` and `view` [B] make.

    So a view of an example is the same whenever it is made. Mixup and cutmix, which need a batch, are left out.
    """

    config: DataConfig

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        """Returns the batch with `image` as float32; the key does not count."""
        del key

        def change(example: Array, view: Array, image: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(VIEW_SEED), example), view)
            return _change(key, image, self.config.augment)

        image = jax.vmap(change)(batch["example"], batch["view"], batch["image"].astype(jnp.float32) / 255)
        return {**batch, "image": normalise(image, self.config)}


def normalise(image: Float[Array, "B H W C"], config: DataConfig) -> Float[Array, "B H W C"]:
    """Puts the channels into their order, subtracts the mean and divides by the standard deviation of each."""
    channels = image.shape[-1]
    mean, std = config.mean or NORMAL, config.std or NORMAL
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise InputError(
                f"data.{name} has {len(values)} values for images of {channels} channels; "
                f"give {' or '.join(map(str, sorted({1, channels})))}, or convert the images with data.channels"
            )
    image = image[..., ::-1] if config.channel_order == "bgr" else image
    return (image - jnp.array(mean)) / jnp.array(std)


def augment(key: jax.Array, batch: Batch, config: AugmentConfig, *, num_classes: int) -> Batch:
    """Applies the random changes that are on to `image`, float32 in [0, 1]."""
    change_key, mix_key = jax.random.split(key)
    keys = jax.random.split(change_key, len(batch["image"]))
    image = jax.vmap(lambda key, image: _change(key, image, config))(keys, batch["image"])
    changed = {**batch, "image": image}
    if config.mixup or config.cutmix:
        return _mix(mix_key, changed, config, num_classes=num_classes)
    return changed


def _change(key: jax.Array, image: Float[Array, "H W C"], config: AugmentConfig) -> Float[Array, "H W C"]:
    crop_key, flip_key, colour_key = jax.random.split(key, 3)
    if config.crop_padding:
        image = _crop(crop_key, image, config.crop_padding)
    if config.flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    if config.brightness:
        image = _colour(colour_key, image, config.brightness)
    return image


def _crop(key: jax.Array, image: Float[Array, "H W C"], padding: int) -> Float[Array, "H W C"]:
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def _colour(key: jax.Array, image: Float[Array, "H W C"], strength: float) -> Float[Array, "H W C"]:
    """Scales brightness, then contrast about the mean grey, then saturation about each pixel's grey."""
    brightness, contrast, saturation = jax.random.uniform(key, (3,), minval=1 - strength, maxval=1 + strength)
    image = image * brightness
    image = _blend(_grey(image).mean(), image, contrast)
    if image.shape[-1] == 3:
        image = _blend(_grey(image), image, saturation)
    return jnp.clip(image, 0, 1)


def _grey(image: Float[Array, "H W C"]) -> Float[Array, "H W 1"]:
    return (image @ jnp.array(LUMA))[..., None] if image.shape[-1] == 3 else image


def _blend(other: Array, image: Array, weight: Array) -> Array:
    return weight * image + (1 - weight) * other  # of `image` exactly, where the weight is 1


def _mix(key: jax.Array, batch: Batch, config: AugmentConfig, *, num_classes: int) -> Batch:
    """Mixes each example with its neighbour in the batch, by mixup or cutmix; with both on, each half of the time.

    A row is mixed only where both it and its neighbour are real.
    """
    image, labels = batch["image"], jax.nn.one_hot(batch["label"], num_classes)
    keys = jax.random.split(key, len(image))
    weight = jax.vmap(lambda key: _weights(key, image.shape[1:3], config))(keys)  # [B H W], the share of the own image
    both_real = (batch["mask"] * jnp.roll(batch["mask"], 1)) > 0
    weight = jnp.where(both_real[:, None, None], weight, 1.0)
    own = weight.mean(axis=(1, 2))[:, None]
    return {
        **batch,
        "image": _blend(jnp.roll(image, 1, axis=0), image, weight[..., None]),
        "label_probs": _blend(jnp.roll(labels, 1, axis=0), labels, own),
    }


def _weights(key: jax.Array, size: tuple[int, int], config: AugmentConfig) -> Float[Array, "H W"]:
    """Draws how much of its own image one example keeps at each pixel."""
    choice_key, mixup_key, cutmix_key = jax.random.split(key, 3)
    mixup = jnp.broadcast_to(jax.random.beta(mixup_key, config.mixup or 1.0, config.mixup or 1.0), size)
    cutmix = _outside_box(cutmix_key, size, config.cutmix or 1.0)
    if not (config.mixup and config.cutmix):
        return mixup if config.mixup else cutmix
    return jnp.where(jax.random.bernoulli(choice_key), mixup, cutmix)


def _outside_box(key: jax.Array, size: tuple[int, int], alpha: float) -> Float[Array, "H W"]:
    """Returns 0 inside a random box of Beta-distributed area, cut at the image's border, and 1 outside."""
    share_key, place_key = jax.random.split(key)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))  # eq. 1 of the paper
    middle = jax.random.uniform(place_key, (2,))
    inside = [
        jnp.abs((jnp.arange(length) + 0.5) / length - centre) < side / 2
        for length, centre in zip(size, middle, strict=True)
    ]
    return 1.0 - (inside[0][:, None] & inside[1][None, :])
