"""Small random models, a model folder with a tokenizer, and a slow greedy reference, for the tests."""

from dataclasses import replace

import torch

from bdlib.transformer import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=23,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=512,
    rope={"rope_type": "default", "rope_theta": 10_000.0},
    tie_embeddings=False,
    model_type="llama",
)


def model(seed=0, dtype=torch.float64, sharp=1.0, **changes):
    """A random decoder of :data:`CONFIG`; ``sharp`` scales its queries, so that keys matter more."""
    made = Decoder.random(replace(CONFIG, **changes), seed=seed, dtype=dtype)
    for layer in made.layers:
        layer.qkv.weight[: made.config.num_heads * made.config.head_dim] *= sharp
    return made


def perturbed(target, amount, seed=0):
    """A copy of a decoder with noise on every matrix: a drafter that is right now and then."""
    copy = Decoder(target.config).to(target.dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in target.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        state[name] = tensor + amount * noise * tensor.shape[-1] ** -0.5 * (tensor.dim() > 1)
    copy.load_state_dict(state)
    return copy


def text(length, seed=0, vocabulary=CONFIG.vocab_size):
    """Random token ids ``[length]``."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, vocabulary, (length,), generator=generator)


def greedy(target, prompt, count, stops=()):
    """Greedy decoding as it is defined: the whole text through the model for every token, no cache."""
    tokens = prompt.tolist()
    for _ in range(count):
        tokens.append(int(target(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def chances(target, prompt, count):
    """The target's distribution of the next ``count`` tokens, by enumeration ``[V ** count]``."""
    size = target.config.vocab_size
    texts = torch.cartesian_prod(*[torch.arange(size)] * count)
    with torch.inference_mode():
        whole = torch.cat((prompt.expand(len(texts), -1), texts), 1)
        probs = torch.softmax(target(whole), -1)
    wanted = torch.ones(len(texts), dtype=torch.float64)
    for i in range(count):
        wanted *= probs[torch.arange(len(texts)), len(prompt) - 1 + i, texts[:, i]]
    return wanted


def chi_square(drafter, target, prompt, runs, gamma=3, see=lambda result: None, **settings):
    """p-value of the first three sampled tokens against :func:`chances`; ``see`` gets each result."""
    from scipy.stats import chisquare

    from bdlib.decoding import generate
    from bdlib.drafters import prefill
    from bdlib.sampling import Sampling

    count, size = 3, target.config.vocab_size
    wanted = chances(target, prompt, count)
    generator = torch.Generator().manual_seed(5)
    counts = torch.zeros(len(wanted), dtype=torch.float64)
    cache = prefill(target, prompt, 16)
    for _ in range(runs):
        cache.rewind(len(prompt) - 1)
        result = generate(
            target, prompt, drafter, cache=cache, gamma=gamma, max_new_tokens=count + 1,
            sampling=Sampling(1.0), generator=generator, **settings,
        )  # fmt: skip
        see(result)
        a, b, c = result.tokens[:count]
        counts[size * (size * a + b) + c] += 1
    likely = wanted * runs >= 5
    observed = torch.cat((counts[likely], counts[~likely].sum()[None]))
    expected = torch.cat((wanted[likely], wanted[~likely].sum()[None])) * runs
    return chisquare(observed.numpy(), expected.numpy()).pvalue


def words(ids):
    """The text that the tokenizer of :func:`save_folder` reads as these ids."""
    return " ".join(f"w{i}" for i in ids)


def save_folder(folder, decoder, vocabulary=None, end=0):
    """Write a Hugging Face folder, tokenizer included: word ``w7`` is token 7, ``w0`` ends a text.

    ``vocabulary`` overrides the words, in the order of their ids.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    decoder.save(folder)
    listed = vocabulary or [f"w{i}" for i in range(decoder.config.vocab_size)]
    ids = {word: i for i, word in enumerate(listed)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=listed[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=listed[end], unk_token=listed[-1]
    ).save_pretrained(folder)
    return folder


def place(folder, vocabulary, **changes):
    """A target of three layers with a tokenizer in ``folder``, and a text of 2,000 tokens; the folder."""
    made = model(seed=3, dtype=torch.float32, vocab_size=vocabulary, num_layers=3, **changes)
    save_folder(folder / "target", made)
    ids = text(2000, seed=1, vocabulary=vocabulary).tolist()
    (folder / "text.txt").write_text(words(ids), encoding="utf8")
    return folder


def run_in_interpreter(file, seconds=600):
    """Run a test file again in a process where Triton interprets kernels, and see that it passes.

    The variable is read when a kernel is decorated, so it has to be there before the first import.
    """
    import os
    import subprocess
    import sys

    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
