"""A character-level transformer on text that a small grammar makes."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfqn_optax as kfqn
from kfqn_optax.bench._models import Tree
from kfqn_optax.bench._tasks.task import Task, linen_start

LENGTH, BATCH_SIZE, TRAIN, TEST = 64, 64, 4_000, 250
BLOCKS, WIDTH = 2, 64
_GRAMMAR = {
    "text": ["sentence. ", "sentence, and sentence. ", "when sentence, sentence. "],
    "sentence": ["noun verb noun", "noun verb", "noun verb place", "noun says that sentence"],
    "noun": ["the thing", "a thing", "the quality thing", "no quality thing"],
    "thing": ["river", "stone", "baker", "horse", "winter", "letter", "sailor", "garden", "candle"],
    "quality": ["old", "quiet", "bright", "narrow", "distant", "blue"],
    "verb": ["follows", "remembers", "finds", "carries", "hides", "wakes"],
    "place": ["by the thing", "under the quality thing", "without noun"],
}


def make_text(length: int, seed: int) -> str:
    """At least ``length`` characters."""
    rng = np.random.default_rng(seed)

    def expand(symbol: str) -> str:
        words = _GRAMMAR[symbol][rng.integers(len(_GRAMMAR[symbol]))].split(" ")
        return " ".join(_expand_word(word) for word in words)

    def _expand_word(word: str) -> str:
        bare = word.rstrip(".,")
        return expand(bare) + word[len(bare) :] if bare in _GRAMMAR else word

    text = ""
    while len(text) < length:
        text += expand("text")
    return text


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a layer norm; in the form of a scan's body."""

    @nn.compact
    def __call__(self, x, _=None):
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(hidden), None


class Transformer(nn.Module):
    """Blocks between an embedding and a head, written out or as one scan over them."""

    vocabulary: int
    blocks: int = BLOCKS
    scanned: bool = False
    width: int = WIDTH

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        position = self.param("position", nn.initializers.normal(0.1), (ids.shape[1], self.width))
        x = nn.Embed(self.vocabulary, self.width)(ids) + position[None]
        if self.scanned:
            settings = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(Block, length=self.blocks, **settings)()(x, None)
        else:
            for _ in range(self.blocks):
                x, _ = Block()(x)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def load_text(blocks: int = BLOCKS, scanned: bool = False) -> Task:
    sequences, vocabulary = _sequences()
    model = Transformer(vocabulary, blocks, scanned)
    init, layers = linen_start(model, jnp.zeros((1, LENGTH), jnp.int32))

    def cross_entropy(params: Tree, ids: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, ids[:, :-1])
        logits = kfqn.outputs(logits, "categorical")
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    return Task(
        init=init,
        loss=lambda params, ids, state: (cross_entropy(params, ids), state),
        layers=layers,
        train=sequences[:TRAIN],
        test=sequences[TRAIN:],
        batch_size=BATCH_SIZE,
        metric="test bits per character",
        test_metric=lambda params, ids, state: cross_entropy(params, ids) / np.log(2.0),
        evaluated=500,
    )


@functools.cache
def _sequences() -> tuple[np.ndarray, int]:
    """Sequences (TRAIN + TEST, LENGTH + 1) of characters as numbers, and how many characters there are."""
    length = (TRAIN + TEST) * (LENGTH + 1)
    text = np.array(list(make_text(length, seed=0)[:length]))
    letters, ids = np.unique(text, return_inverse=True)
    return ids.reshape(TRAIN + TEST, LENGTH + 1).astype(np.int32), len(letters)
