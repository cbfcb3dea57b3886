"""Predict the next character of a text by a small transformer: dense, with top-k, and with its memory (MSBP).

python examples/char_transformer.py --data FILE   # any text file
python examples/char_transformer.py               # the source of Python's own standard library
"""

import argparse
import pathlib
import sysconfig

import flax.linen as nn
import jax
import numpy as np
import optax
from tqdm import tqdm

import msbp_jax as msbp

LENGTH, WIDTH, LAYERS = 64, 128, 2


def load(path: pathlib.Path | None) -> str:
    """Return the text of a file, or two million characters of the standard library."""
    if path is not None:
        return path.read_text()
    sources = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(source.read_text(errors="ignore") for source in sources)[:2_000_000]


class Block(nn.Module):
    """Causal attention and an MLP, with residuals; shaped to be scanned over."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """Return `[batch, time, width]` and nothing."""
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=WIDTH)(nn.LayerNorm()(x), mask=mask)
        h = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(h), None


class Transformer(nn.Module):
    """Characters in, logits of the next ones out; the readout is the embedding's transpose."""

    vocabulary: int

    @nn.compact
    def __call__(self, characters: jax.Array) -> jax.Array:
        """Return logits `[batch, time, vocabulary]`."""
        embed = nn.Embed(self.vocabulary, WIDTH)
        positions = self.param("positions", nn.initializers.normal(0.02), (LENGTH, WIDTH))
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = blocks(name="blocks")(embed(characters) + positions[None], None)
        return embed.attend(nn.LayerNorm()(x))


def windows(text: np.ndarray, count: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return random windows of the text and, for each character, the one behind it."""
    starts = draw.integers(0, len(text) - LENGTH - 1, count)
    found = text[starts[:, None] + np.arange(LENGTH + 1)]
    return found[:, :-1], found[:, 1:]


def train(model: msbp.SparseModule, text: np.ndarray, steps: int, batch: int, seed: int) -> dict[str, jax.Array]:
    """Return the parameters after so many steps."""
    draw = np.random.default_rng(seed)
    x, _ = windows(text, batch, draw)
    variables = model.init(jax.random.key(seed), x)
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10, steps), weight_decay=0.01)

    def loss_fn(params, memory, x, y):  # noqa: ANN001, ANN202
        logits = model.apply({"params": params}, x, memory=memory)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    memory = model.init_memory(variables, x)
    state = msbp.TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx, memory=memory)
    step = msbp.train_step(loss_fn)
    for _ in tqdm(range(steps), leave=False, disable=None):
        state, _ = step(state, *windows(text, batch, draw))
    return state.params


def main(data: pathlib.Path | None = None, steps: int = 400, batch: int = 32, seed: int = 0) -> dict[str, float]:
    """Train the three, print how often each predicts the next character of held-out text, and return it."""
    text = load(data)
    characters = {character: i for i, character in enumerate(sorted(set(text)))}
    numbers = np.array([characters[character] for character in text], np.int32)
    held_out = len(numbers) // 10
    test_x, test_y = windows(numbers[-held_out:], 256, np.random.default_rng(7))

    # The first layer of each MLP, the widest; top-k in all of them slows a transformer's learning a good deal more.
    top_k = msbp.top_k(density=0.25)
    accuracies = {}
    for name, sparsifier in {
        "dense": msbp.dense(),
        "top-k 25 %": top_k,
        "MSBP 25 %": msbp.memorized(top_k, decay=0.8),
    }.items():
        model = msbp.sparse_vjp(Transformer(len(characters)), {"blocks/Dense_0/*": sparsifier})
        params = train(model, numbers[:-held_out], steps, batch, seed)
        predict = jax.jit(lambda p, x, m=model: m.apply({"params": p}, x).argmax(-1))
        accuracies[name] = float((np.asarray(predict(params, test_x)) == test_y).mean())
        print(f"{name:10} accuracy {accuracies[name]:.2%}")
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, help="a text file")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
