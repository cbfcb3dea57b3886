"""Tag words with their parts of speech by a bidirectional LSTM: dense, with top-k, and with its memory (MSBP).

python examples/lstm_tagger.py --data FOLDER    # Universal Dependencies English EWT, en_ewt-ud-*.conllu(.gz)
python examples/lstm_tagger.py                  # sentences from a small grammar with ambiguous words
"""

import argparse
import gzip
import pathlib
import random

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import msbp_jax as msbp

type Sentences = list[list[tuple[str, str]]]

LENGTH = 32
GRAMMAR = {
    "DET": "the a this that every",
    "ADJ": "light old plain dry cold clean",
    "NOUN": "light water plant saw run cook plain dog house fire",
    "VERB": "light water plant saw run cook clean dry fire see",
    "ADV": "now again slowly here well",
    "ADP": "in on near with by",
    "PRON": "we they you i",
}
PATTERNS = ["PRON VERB DET NOUN", "DET ADJ NOUN VERB ADV", "PRON ADV VERB ADP DET NOUN", "DET NOUN VERB DET ADJ NOUN"]


def read_conllu(path: pathlib.Path) -> Sentences:
    """Return the sentences of a CoNLL-U file as (word, UPOS) pairs."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        blocks = file.read().split("\n\n")
    rows = [[line.split("\t") for line in block.splitlines() if line[:1].isdigit()] for block in blocks]
    return [[(row[1].lower(), row[3]) for row in block if row[0].isdigit()] for block in rows if block]


def make_sentences(count: int, seed: int) -> Sentences:
    """Return sentences of the small grammar."""
    draw = random.Random(seed)
    tags = [" ADP ".join(draw.choices(PATTERNS, k=draw.randint(1, 3))).split() for _ in range(count)]
    return [[(draw.choice(GRAMMAR[tag].split()), tag) for tag in sentence] for sentence in tags]


def load(folder: pathlib.Path | None) -> tuple[Sentences, Sentences]:
    """Return training and test sentences."""
    if folder is None:
        return make_sentences(2000, 0), make_sentences(400, 1)
    train, test = (sorted(folder.glob(f"en_ewt-ud-{part}.conllu*")) for part in ("train", "test"))
    return read_conllu(train[0]), read_conllu(test[0])


def encode(train: Sentences, test: Sentences) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int, int]:
    """Return both sets as arrays of word, suffix and tag numbers (0: padding, 1: unknown), and how many there are."""
    tags = {tag: i + 1 for i, tag in enumerate(sorted({tag for s in train for _, tag in s}))}
    pieces = sorted({p for s in train for word, _ in s for p in (word, "-" + word[-3:])})
    known = {piece: i + 2 for i, piece in enumerate(pieces)}

    def arrays(sentences: Sentences) -> dict[str, np.ndarray]:
        out = {name: np.zeros((len(sentences), LENGTH), np.int32) for name in ("words", "suffixes", "tags")}
        for i, sentence in enumerate(sentences):
            for j, (word, tag) in enumerate(sentence[:LENGTH]):
                out["words"][i, j] = known.get(word, 1)
                out["suffixes"][i, j] = known.get("-" + word[-3:], 1)
                out["tags"][i, j] = tags.get(tag, 0)
        return out

    return arrays(train), arrays(test), len(known) + 2, len(tags) + 1


class Tagger(nn.Module):
    """Embeddings of words and suffixes, an LSTM in both directions, a tag for each word."""

    vocabulary: int
    tags: int

    @nn.compact
    def __call__(self, words: jax.Array, suffixes: jax.Array) -> jax.Array:
        """Return logits `[batch, time, tags]`."""
        embed = nn.Embed(self.vocabulary, 64)
        x = jnp.concatenate([embed(words), embed(suffixes)], axis=-1)
        x = nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(128)), nn.RNN(nn.OptimizedLSTMCell(128)))(x)
        return nn.Dense(self.tags)(x)


def train(
    model: msbp.SparseModule, data: dict[str, np.ndarray], steps: int, batch: int, seed: int
) -> dict[str, jax.Array]:
    """Return the parameters after so many steps."""
    first = {name: rows[:batch] for name, rows in data.items()}
    variables = model.init(jax.random.key(seed), first["words"], first["suffixes"])
    memory = model.init_memory(variables, first["words"], first["suffixes"])
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss_fn(params, memory, batch):  # noqa: ANN001, ANN202
        logits = model.apply({"params": params}, batch["words"], batch["suffixes"], memory=memory)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tags"])
        real = batch["tags"] > 0
        return jnp.where(real, losses, 0.0).sum() / real.sum()

    state = msbp.TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx, memory=memory)
    step = msbp.train_step(loss_fn)
    draw = np.random.default_rng(seed)
    for _ in tqdm(range(steps), leave=False, disable=None):
        rows = draw.choice(len(data["words"]), batch, replace=False)
        state, _ = step(state, {name: array[rows] for name, array in data.items()})
    return state.params


def main(data: pathlib.Path | None = None, steps: int = 400, batch: int = 64, seed: int = 0) -> dict[str, float]:
    """Train the three, print the accuracy of each over the words of the test set, and return them."""
    train_set, test_set, vocabulary, tags = encode(*load(data))
    top_k = msbp.top_k(density=0.04)
    accuracies = {}
    for name, sparsifier in {
        "dense": msbp.dense(),
        "top-k 4 %": top_k,
        "MSBP 4 %": msbp.memorized(top_k, decay=0.8),
    }.items():
        model = msbp.sparse_vjp(Tagger(vocabulary, tags), sparsifier)
        params = train(model, train_set, steps, batch, seed)
        predict = jax.jit(lambda p, words, suffixes, m=model: m.apply({"params": p}, words, suffixes).argmax(-1))
        right = np.asarray(predict(params, test_set["words"], test_set["suffixes"])) == test_set["tags"]
        accuracies[name] = float(right[test_set["tags"] > 0].mean())
        print(f"{name:10} accuracy {accuracies[name]:.2%}")
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, help="folder of the CoNLL-U files")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
