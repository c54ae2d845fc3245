"""How fast is the engine, against transformers' ``generate`` and against what memory allows?

Speculative decoding divides by the speed of plain decoding, so a slow baseline flatters it. This
bench states the baseline twice: beside the step of transformers' greedy ``generate`` (DynamicCache,
sdpa attention) and as a fraction of its floor, the time in which this machine's memory can deliver
the weights and the keys and values that a step has to read.

Both engines run in one process and take turns in short stretches, so that a ratio compares moments
close to each other; medians and quartiles are over steps, those of ratios over turns.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdlib.measure import provenance, synchronise

if TYPE_CHECKING:
    import torch

    from bdlib.cache import KVCache
    from bdlib.transformer import Decoder

SCHEMA = 1
TURNS = 5  # stretches of steps that alternate between the engines
PREFILLS = 3  # prompts read by each engine, in turns
BUFFER_BYTES = 2**29  # far larger than any processor's cache
REQUIRED = {"step": {512: 1.8, 8192: 2.8}, "prefill": {8192: 1.0}}
"""Speed-ups over transformers that the engine must reach, by tokens of context."""


@dataclass(frozen=True)
class EngineSettings:
    """What to time.

    Attributes
    ----------
    contexts
        Lengths at which a step is timed, in tokens: the last timed step reaches it.
    steps
        Steps of each kind at each context, at least.
    verify
        Tokens checked in one forward pass, compared with one token.
    budget
        Entries of the sparse cache that a draft step attends to (sink + window).
    pair
        ``"smollm2"`` or a model folder.
    """

    contexts: tuple[int, ...] = (512, 4096, 8192)
    steps: int = 40
    verify: int = 5
    budget: int = 512
    pair: str = "smollm2"
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "verify", "budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.contexts:
            raise ValueError("contexts () must name at least one length")
        for context in self.contexts:
            if context < self.least:
                raise ValueError(
                    f"context {context} must be at least {self.least} for {self.steps} steps"
                )

    @property
    def stretch(self) -> int:
        """Steps that an engine takes in one turn."""
        return -(-self.steps // min(TURNS, self.steps))

    @property
    def least(self) -> int:
        """The shortest context that leaves room for a turn and a prompt before it, in tokens."""
        return 2 * (self.stretch + self.verify)


def parse_contexts(text: str) -> tuple[int, ...]:
    """``"512,4096"`` to ``(512, 4096)``."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"contexts {text!r} must be whole numbers with commas between") from None


def engine(
    settings: EngineSettings | None = None, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Time the compact decoder and transformers in turns; a dictionary that JSON can hold.

    Parameters
    ----------
    progress
        Called with a few words before each part.

    Raises
    ------
    ValueError
        If the model is missing or damaged, or a context is beyond its positions.
    """
    from bdlib import pairs

    settings = settings or EngineSettings()
    say = progress or (lambda words: None)
    say("loading")
    folder = _folder(settings.pair)
    pair = pairs.load_pair(
        settings.pair,
        target=folder,
        dtype=settings.dtype,
        device=settings.device,
        context=max(settings.contexts),
    )
    theirs = _Transformers(folder, pair.device, pair.dtype)
    say("memory bandwidth")
    bandwidth = _bandwidth(pair.device)
    warm = min(*settings.contexts, max(64, settings.least))
    _context(settings, warm, pair.target, theirs, 1, 1, lambda words: None)
    rows = []
    for context in settings.contexts:
        turns = min(TURNS, settings.steps)
        row = _context(settings, context, pair.target, theirs, turns, PREFILLS, say)
        rows.append(row | _floors(settings, context, pair.target, row, bandwidth["median"]))
    return {
        "schema": SCHEMA,
        "bench": "engine",
        "model": folder.name,
        "scaling": pair.scaling,
        "dtype": str(pair.dtype).removeprefix("torch."),
        "device": pair.device.type,
        "settings": {k: v for k, v in asdict(settings).items() if k != "pair"},
        "bandwidth_bytes_per_second": bandwidth,
        "weight_bytes": pair.target.weight_bytes(),
        "contexts": rows,
        "required": _required(rows),
        **provenance(),
    }


def _folder(pair: str) -> Path:
    from bdlib import assets

    if pair == "smollm2":
        return assets.model_folder("smollm2")
    folder = Path(pair).expanduser()
    if not folder.is_dir():
        raise ValueError(f"pair {pair!r} is neither 'smollm2' nor a model folder")
    return folder


class _Transformers:
    """Greedy ``generate`` of transformers, timed token by token."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        )
        self.model = model.to(device).eval()
        self.model.generation_config.eos_token_id = None  # time every step, whatever is generated
        self.model.generation_config.pad_token_id = 0
        self.device = device

    def prefill(self, prompt: torch.Tensor) -> float:
        """Read a prompt ``[T]`` into a new cache, up to the first token; seconds."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        return self._generate(prompt, 1)[0]

    def steps(self, prompt: torch.Tensor, count: int) -> list[float]:
        """Seconds of each of ``count`` steps after the first token; the cache holds the prompt."""
        surplus = self.cache.get_seq_length() - (len(prompt) - 1)
        if surplus:
            self.cache.crop(-surplus)  # transformers takes the number of tokens to remove, negative
        return self._generate(prompt, count + 1)[1:]

    def _generate(self, prompt: torch.Tensor, count: int) -> list[float]:
        import torch

        marks: list[float] = []

        class Stamps:
            """A streamer that notes when the prompt and each token pass by."""

            def put(self, tokens: torch.Tensor) -> None:
                marks.append(time.perf_counter())

            def end(self) -> None:
                pass

        synchronise(self.device)
        began = time.perf_counter()
        self.model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            cache=self.cache,
            max_new_tokens=count,
            do_sample=False,
            streamer=Stamps(),
        )
        marks[0] = began  # the prompt is put when generate has been set up; setting up counts
        return [after - before for before, after in itertools.pairwise(marks)]


def _context(
    settings: EngineSettings,
    context: int,
    target: Decoder,
    theirs: _Transformers,
    turns: int,
    prefills: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Every time at one length of context."""
    import torch

    from bdlib.drafters import prefill

    count = settings.stretch
    generator = torch.Generator().manual_seed(0)
    shape = (context - count - 1,)
    prompt = torch.randint(0, target.config.vocab_size, shape, generator=generator)
    prompt = prompt.to(target.device)

    times: dict[str, list[list[float]]] = {}

    def note(name: str, seconds: list[float]) -> None:
        times.setdefault(name, []).append(seconds)

    for turn in range(prefills):
        say(f"context {context}: prefill {turn + 1} of {prefills}")
        note("transformers_prefill", [theirs.prefill(prompt)])
        synchronise(target.device)
        began = time.perf_counter()
        cache = prefill(target, prompt, context)
        first = _plain(target, cache, prompt[-1:])
        note("compact_prefill", [time.perf_counter() - began])
    for turn in range(turns):
        say(f"context {context}: steps, turn {turn + 1} of {turns}")
        note("transformers_step", theirs.steps(prompt, count))
        note("compact_step", _steps(target, cache, prompt, count))
        checked, single = _verify(target, cache, prompt, count, settings.verify)
        note("verify", checked)
        note("single", single)
        note("draft_step", _draft_steps(settings, target, cache, first, count))
    out: dict[str, Any] = {"context": context, "prompt_tokens": len(prompt)}
    seconds = {name: [s for turn in runs for s in turn] for name, runs in times.items()}
    out["seconds"] = {name: spread(all_of_them) for name, all_of_them in seconds.items()}
    for name, above, below in (
        ("step_speedup", "transformers_step", "compact_step"),
        ("prefill_speedup", "transformers_prefill", "compact_prefill"),
        ("verify_cost", "verify", "single"),
        ("draft_cost", "draft_step", "compact_step"),
    ):
        pairs = zip(times[above], times[below], strict=True)
        out[name] = spread([statistics.median(a) / statistics.median(b) for a, b in pairs])
    return out


def _plain(target: Decoder, cache: KVCache, tokens: torch.Tensor) -> torch.Tensor:
    """The token ``[1]`` after ``tokens`` ``[n]``, as a greedy step chooses it."""
    import torch

    with torch.inference_mode():
        token = target(tokens[None], cache, last_only=True)[0].argmax(-1)
    synchronise(target.device)
    return token


def _steps(target: Decoder, cache: KVCache, prompt: torch.Tensor, count: int) -> list[float]:
    """Seconds of each of ``count`` plain steps, as a caller of ``decode`` sees them."""
    from bdlib.decoding import decode

    cache.rewind(len(prompt) - 1)
    marks = []
    for _ in decode(target, cache, prompt, max_new_tokens=count + 1):
        synchronise(target.device)
        marks.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(marks)]


def _verify(
    target: Decoder, cache: KVCache, prompt: torch.Tensor, count: int, tokens: int
) -> tuple[list[float], list[float]]:
    """Seconds of forward passes over ``tokens`` tokens and over one, in turns."""
    import torch

    base = len(prompt) - tokens
    found: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(count):
            for seconds, piece in zip(found, (prompt[base:], prompt[-1:]), strict=True):
                cache.rewind(len(prompt) - len(piece))
                began = time.perf_counter()
                target(piece[None], cache).argmax(-1)
                synchronise(target.device)
                seconds.append(time.perf_counter() - began)
    return found


def _draft_steps(
    settings: EngineSettings, target: Decoder, cache: KVCache, first: torch.Tensor, count: int
) -> list[float]:
    """Seconds of each of ``count`` greedy steps on a sparse cache."""
    from bdlib.cache import SparseKVCache
    from bdlib.selection import SinkWindow

    place = (cache.batch, cache.dtype, cache.device)
    sparse = SparseKVCache(cache.config, settings.budget, SinkWindow(), *place)
    sparse.fill(cache)
    token = _plain(target, sparse, first)  # makes room, which later steps seldom have to
    found = []
    for _ in range(count):
        began = time.perf_counter()
        token = _plain(target, sparse, token)
        found.append(time.perf_counter() - began)
    return found


def _bandwidth(device: torch.device) -> dict[str, float]:
    """Bytes per second that a sum over a large buffer reads, all threads at work."""
    import psutil
    import torch

    size = BUFFER_BYTES
    if device.type == "cpu":
        size = min(size, psutil.virtual_memory().available // 8)
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    found = []
    for _ in range(9):
        synchronise(device)
        began = time.perf_counter()
        buffer.sum()
        synchronise(device)
        found.append(buffer.nbytes / (time.perf_counter() - began))
    return spread(found[1:])


def _floors(
    settings: EngineSettings, context: int, target: Decoder, row: dict[str, Any], bandwidth: float
) -> dict[str, Any]:
    """Least seconds of each step, (weights + keys and values) / bandwidth, and the part reached."""
    entries = {
        "transformers_step": context,
        "compact_step": context,
        "verify": context,
        "draft_step": min(settings.budget, context),
    }
    weights = target.weight_bytes()
    floors = {
        name: (weights + target.config.kv_bytes(held, target.dtype)) / bandwidth
        for name, held in entries.items()
    }
    reached = {name: floor / row["seconds"][name]["median"] for name, floor in floors.items()}
    return {"floor_seconds": floors, "fraction_of_floor": reached}


def _required(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The speed-ups that are asked for at the contexts that were timed, and whether they hold."""
    return [
        {
            "what": what,
            "context": row["context"],
            "least": REQUIRED[what][row["context"]],
            "found": row[f"{what}_speedup"]["median"],
            "holds": row[f"{what}_speedup"]["median"] >= REQUIRED[what][row["context"]],
        }
        for row in rows
        for what in REQUIRED
        if row["context"] in REQUIRED[what]
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of some values."""
    quartiles = (values[0],) * 3
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": quartiles[1], "q1": quartiles[0], "q3": quartiles[2], "n": len(values)}


def table(result: dict[str, Any]) -> str:
    """A result of :func:`engine` as a few lines of text, times in milliseconds."""
    bandwidth = result["bandwidth_bytes_per_second"]["median"] / 1e9
    lines = [
        f"{result['model']}, {result['dtype']}, {result['threads']} thread(s),"
        f" {result['machine']['cpu']}, reads {bandwidth:.1f} GB/s",
        f"{'context':>8}{'transformers':>14}{'compact':>10}{'speed-up':>10}{'of floor':>10}"
        f"{'verify':>9}{'draft':>8}{'prefill':>9}{'speed-up':>10}",
    ]
    for row in result["contexts"]:
        ms = {name: 1e3 * seconds["median"] for name, seconds in row["seconds"].items()}
        lines.append(
            f"{row['context']:>8}{ms['transformers_step']:>14.1f}{ms['compact_step']:>10.1f}"
            f"{row['step_speedup']['median']:>9.2f}x{row['fraction_of_floor']['compact_step']:>10.2f}"
            f"{ms['verify']:>9.1f}{ms['draft_step']:>8.1f}{ms['compact_prefill']:>9.0f}"
            f"{row['prefill_speedup']['median']:>9.2f}x"
        )
    for one in result["required"]:
        verdict = "holds" if one["holds"] else "MISSED"
        lines.append(
            f"{one['what']} at {one['context']}: {one['found']:.2f}x,"
            f" at least {one['least']}x asked: {verdict}"
        )
    return "\n".join(lines)
