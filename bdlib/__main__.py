"""The command line: ``python -m bdlib COMMAND``.

Each command is a thin function: it parses options, calls one function of the library
and prints the result. Library modules are imported inside the command that needs them,
so that ``--help`` is quick. A mistake in the input (ValueError, OSError) is one line on
standard error and exit status 2; set ``BDLIB_TRACEBACK=1`` to see where it came from.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="BudgetDraft: sparse-KV speculative decoding, from the command line.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="Assets to fetch; all of them if none is named.")
    ] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Fetch this asset again, replacing what is there."),
    ] = None,
    quiet: Annotated[bool, typer.Option(help="No progress output.")] = False,
) -> None:
    """Download and verify the model and the texts; nothing to do the second time."""
    from bdlib import assets

    results: dict[str, str] = {}
    if force:
        results |= assets.fetch(force, force=True, progress=not quiet)
    if names or not force:
        results |= assets.fetch(names or None, progress=not quiet)
    if all(outcome == "present" for outcome in results.values()):
        typer.echo("Nothing to do: everything is present and verified.")
    else:
        fetched = [name for name, outcome in results.items() if outcome == "fetched"]
        typer.echo(f"Fetched: {', '.join(fetched)}.")


@app.command()
def notebooks(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Notebooks, by number, name or path; all of them if none is named."),
    ] = None,
    profile: Annotated[str, typer.Option(help="quick, cpu or gpu.")] = "quick",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the executed copies; build/notebooks if unset.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the stored form only, without running.")
    ] = False,
    strip: Annotated[
        bool, typer.Option("--strip", help="Remove widget state from the notebooks, in place.")
    ] = False,
) -> None:
    """Run the lessons with papermill, or check their stored form."""
    from bdlib import lessons

    paths = lessons.find(names)
    if strip:
        for path in paths:
            if lessons.strip(path):
                typer.echo(f"stripped {lessons.label(path)}")
    if check:
        faults = [fault for path in paths for fault in lessons.check(path)]
        for fault in faults:
            typer.echo(fault, err=True)
        typer.echo(f"{len(paths)} notebook(s) checked, {len(faults)} fault(s)")
        raise typer.Exit(1 if faults else 0)
    if strip:
        return
    failures = lessons.run(paths, profile=profile, out=out)
    for failure in failures:
        typer.echo(str(failure), err=True)
    typer.echo(f"{len(paths) - len(failures)} of {len(paths)} notebook(s) ran without error")
    raise typer.Exit(1 if failures else 0)


@app.command()
def html(
    names: Annotated[
        list[str] | None, typer.Argument(help="Notebooks, by number, name or path; all if none.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; build/site if unset.")] = None,
) -> None:
    """Write the lessons as static pages, to be read without a kernel; nothing is run."""
    from bdlib import lessons, site

    pages = site.build(out, lessons.find(names), lambda name: typer.echo(name, err=True))
    typer.echo(f"{len(pages)} pages; begin with {pages[0]}")


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, CPU, GPU, fetched files."""
    from bdlib import doctor as examination

    rows = examination.examine()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


@app.command()
def measure(
    pair: Annotated[
        str, typer.Option(help="smollm2, paper, or a folder or hub id of a target.")
    ] = "smollm2",
    drafter: Annotated[
        str,
        typer.Option(help="self, ngram, or a folder or hub id of a model, with @copies or not."),
    ] = "self",
    policy: Annotated[
        str, typer.Option(help="What the drafter's cache keeps, for example sink_window.")
    ] = "chunk_topk_recent",
    budget: Annotated[
        int, typer.Option(help="Entries it keeps; policy full keeps the whole context.")
    ] = 256,
    context: Annotated[int, typer.Option(help="Tokens of prompt and output together.")] = 2048,
    gamma: Annotated[int, typer.Option(help="Tokens drafted per round.")] = 4,
    controller: Annotated[
        bool,
        typer.Option("--controller", help="Choose anew in each round: gamma at most, or none."),
    ] = False,
    text: Annotated[
        str, typer.Option(help="A file or folder of text, or embedded:train|held-out|all.")
    ] = "embedded:held-out",
    samples: Annotated[int, typer.Option(help="Windows of text to measure on.")] = 4,
    within: Annotated[
        int | None,
        typer.Option(help="Prompts are the ends of windows of this context; else cut anew."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate per sample.")] = 64,
    refresh: Annotated[
        int | None, typer.Option(help="Select entries anew every so many rounds.")
    ] = None,
    reach: Annotated[
        int | None,
        typer.Option(help="Tokens of the prompt a second model reads; 0: all; else as trained."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the best so many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from this much probability.")] = 1.0,
    verification: Annotated[
        str, typer.Option(help="When sampling, drafts are checked as a block, or by token.")
    ] = "block",
    seed: Annotated[int, typer.Option(help="Chooses windows and what sampling draws.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float32 or float64.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    chat: Annotated[
        bool, typer.Option(help="Ask for a summary of the passage, instead of continuing it.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Runs of each kind; times are medians.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--json", help="File to write records and aggregate to.")
    ] = None,
) -> None:
    """Measure a drafter on text: acceptance, speed-up, memory, identity of the output."""
    from bdlib import measure as measuring

    settings = measuring.MeasureSettings(
        pair=pair,
        drafter=drafter,
        policy=policy,
        budget=budget,
        context=context,
        gamma=gamma,
        controller=controller,
        text=text,
        samples=samples,
        within=within,
        new_tokens=new_tokens,
        refresh=refresh,
        reach=reach,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        verification=verification,
        seed=seed,
        dtype=dtype,
        device=device,
        chat=chat,
        repeats=repeats,
    )
    if output is not None:
        output = measuring.check_output(output)
    from tqdm import tqdm

    records = []
    with tqdm(total=samples, unit="sample", file=sys.stderr) as bar:

        def show(record: dict) -> None:
            records.append(record)
            rates = [r["acceptance_rate"] for r in records if r["acceptance_rate"] is not None]
            speedups = [r["speedup_decode"] for r in records]
            bar.set_postfix_str(
                f"acceptance {sum(rates) / len(rates) if rates else float('nan'):.3f},"
                f" speed-up {sum(speedups) / len(speedups):.2f}x",
                refresh=False,
            )
            bar.update()

        try:
            report = measuring.measure(settings, progress=show)
        except Exception:
            bar.leave = False  # the error's line stands alone
            raise
    if output is not None:
        report.write(output)
    typer.echo(report.table())


@app.command()
def train(
    recipe: Annotated[str, typer.Option(help="Which drafter, for example budgetdraft or paper.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; a stopped run goes on there.")],
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of teacher targets, shared by recipes.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, instead of the recipe's.")] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Windows a step, instead of the recipe's; processes share them."),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 3.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train a drafter; Ctrl-C saves and stops, the same command goes on.

    With several processes: accelerate launch -m bdlib train --recipe NAME --batch 2 --out DIR
    """
    from dataclasses import replace

    from tqdm import tqdm

    from bdlib import assets, recipes

    chosen = recipes.get(recipe)
    changes = {k: v for k, v in {"steps": steps, "windows": batch}.items() if v is not None}
    chosen = replace(chosen, settings=replace(chosen.settings, **changes))
    accelerator = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=device == "cpu")
    quiet = accelerator is not None and not accelerator.is_main_process
    pair = recipes.load(chosen, device)
    teaching = tqdm(unit="window", desc="teacher", file=sys.stderr, disable=quiet)
    training = tqdm(total=chosen.settings.steps, unit="step", file=sys.stderr, disable=quiet)
    recent: dict[str, float] = {}

    def taught(done: int, total: int) -> None:
        teaching.total, teaching.n = total, done
        teaching.refresh()

    def trained(line: dict) -> None:
        training.n = line["step"]
        seen = {"full": line["full"]} | {str(v["budget"]): v for v in line["views"]}
        for name, figures in seen.items():
            before = recent.get(name, figures["agreement"])
            recent[name] = 0.9 * before + 0.1 * figures["agreement"]
        shown = " ".join(f"{k}:{v:.2f}" for k, v in sorted(recent.items(), key=_by_budget))
        training.set_postfix_str(f"loss {line['loss']:.3f}, agreement {shown}", refresh=False)
        training.update()

    folder = teacher or assets.data_root() / "teacher"
    with teaching, training:
        try:
            trainer = recipes.train(
                chosen,
                out,
                folder,
                pair,
                minutes,
                trained,
                taught,
                accelerator,
            )
        except KeyboardInterrupt:
            typer.echo(f"stopped and saved in {out}; the same command goes on", err=True)
            raise typer.Exit(130) from None
    if not quiet:
        typer.echo(f"{trainer.step} steps; the drafter is in {out / recipes.SAVED}")


def _by_budget(item: tuple[str, float]) -> float:
    return float(item[0]) if item[0].isdigit() else float("inf")


@app.command()
def agreement(
    drafter: Annotated[
        list[str], typer.Option(help="Folder of a trained drafter; may be repeated.")
    ],
    policy: Annotated[list[str], typer.Option(help="May be repeated.")] = ("chunk_topk_recent",),
    budget: Annotated[list[int], typer.Option(help="May be repeated; 0: the full cache.")] = (
        256,
        0,
    ),
    context: Annotated[int, typer.Option(help="Tokens of each window.")] = 4096,
    positions: Annotated[int, typer.Option(help="Positions measured at its end.")] = 256,
    text: Annotated[
        str, typer.Option(help="A file or folder of text, or embedded:train|held-out|all.")
    ] = "embedded:held-out",
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 4,
    seed: Annotated[int, typer.Option(help="Chooses the windows.")] = 0,
    pair: Annotated[str, typer.Option(help="The target: smollm2 or paper.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float32 or float64.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path | None, typer.Option("--json", help="File to write to.")] = None,
) -> None:
    """Teacher-forced: how often trained drafters say what the target says, along human text."""
    from tqdm import tqdm

    from bdlib import forced
    from bdlib import measure as measuring

    settings = forced.ForcedSettings(
        drafters=tuple(drafter),
        policies=tuple(policy),
        budgets=tuple(budget),
        context=context,
        positions=positions,
        text=text,
        samples=samples,
        seed=seed,
        pair=pair,
        dtype=dtype,
        device=device,
    )
    if output is not None:
        output = measuring.check_output(output)
    with tqdm(total=samples, unit="window", file=sys.stderr) as bar:
        result = forced.run(settings, progress=lambda done: bar.update())
    if output is not None:
        measuring.write_json(output, result)
    typer.echo(forced.table(result))


@app.command("export")
def export_drafter(
    drafter: Annotated[
        str, typer.Argument(help="A drafter's folder, a shipped one's name, or a plain model.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    engine: Annotated[str, typer.Option("--for", help="transformers or vllm.")],
    pair: Annotated[
        str, typer.Option(help="smollm2, paper, or a folder or hub id of a target.")
    ] = "smollm2",
    gamma: Annotated[int, typer.Option(help="Tokens drafted per round.")] = 4,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Write a standalone drafter for transformers' assistant_model or for vLLM."""
    from bdlib import serving

    folder = serving.export(drafter, out, engine, pair, gamma, dtype)
    typer.echo(f"wrote {out}; how to use it: {folder / serving.CARD_FILE}")


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="A grid, for example data/grids/quick.toml.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; a stopped sweep goes on there.")
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes; more than one disturbs measured speeds.")
    ] = 1,
    texts: Annotated[
        Path | None, typer.Option(help="Folder of the texts that the grid names.")
    ] = None,
    drafters: Annotated[
        Path | None, typer.Option(help="Folder of the drafters that the grid names.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the grid and all it names, measure nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure a grid of settings, cell by cell; stopped or killed, it goes on where it was."""
    from contextlib import nullcontext

    from bdlib import sweeps

    asked = sweeps.read(grid, [folder for folder in (texts, drafters) if folder is not None])
    if check:
        planned = sweeps.plan(asked)
        typer.echo(
            f"{grid.name}: {len(asked.points)} points on {len(planned.jobs)} windows,"
            f" {len(planned.cells)} cells"
        )
        return
    if out is None:
        raise ValueError("no folder for the results: give --out DIR")
    command = f"python -m bdlib sweep {grid.name} --out DIR"
    command += f" --workers {workers}" if workers != 1 else ""
    command += " --texts TEXTS" if texts else ""
    command += " --drafters DRAFTERS" if drafters else ""
    executor = nullcontext() if workers == 1 else sweeps.pool(workers)
    try:
        with executor as running:
            rows = sweeps.run(asked, out, running, not quiet, command)
    except KeyboardInterrupt:
        typer.echo(
            f"stopped; what is measured is kept in {out}, and the same command goes on", err=True
        )
        raise typer.Exit(130) from None
    typer.echo(f"{len(rows)} rows in {out / 'results.csv'}")


@app.command()
def figure(
    name: Annotated[
        str,
        typer.Argument(
            help="headline, acceptance, transfer, robustness, refresh, controller, paired, speed."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="PNG, or a folder of them; beside the results if unset.")
    ] = None,
) -> None:
    """Draw a figure again from the archived results."""
    import json

    import matplotlib

    from bdlib import assets, figures

    swept = {
        "transfer": ("transfer",),
        "robustness": ("robustness",),
        "refresh": ("refresh",),
        "controller": ("controller", "predicted"),
        "paired": ("controller", "longer", "copies", "predicted"),
        "speed": ("speed",),
    }
    names = ("headline", "acceptance", *swept)
    if name not in names:
        raise ValueError(f"unknown figure {name!r}; allowed: {', '.join(names)}")
    root = assets.checkout()
    if root is None:
        raise ValueError(
            "the archived results are in a checkout of the repository; run this in one"
        )
    matplotlib.use("Agg")
    folder = root / "data" / "results"
    if name != "headline":
        from bdlib import sweeps

        folder = folder / name
        table = "records" if name in swept else "results"
        rows = sweeps.load(folder / f"{table}.csv")
        about = json.loads((folder / f"{table}.json").read_text(encoding="utf8"))
        figures.use_style()
        out = out or folder
        out.mkdir(parents=True, exist_ok=True)
        found = {key: getattr(figures, key)(rows, about)[0] for key in swept.get(name, ())}
        if name == "paired":
            contests, of = figures.contests(folder)
            found["fixed"] = figures.fixed(contests, of)[0]
        for key, drawn in (found or figures.acceptance(rows, about)).items():
            drawn.savefig(out / f"{key}.png", dpi=110, format="png", metadata={"Software": None})
            typer.echo(f"wrote {key}.png")
        return
    paths = sorted(folder.glob("agreement_4096_*.json"))
    if not paths:
        raise ValueError(f"no agreement_4096_*.json among the archived results in {folder.name}")
    figures.use_style()
    results = {
        path.stem.rpartition("_")[2]: json.loads(path.read_text(encoding="utf8")) for path in paths
    }
    drawn, _ = figures.agreement_by_budget(results, "chunk_topk_recent")
    out = out or folder / f"{name}.png"
    scratch = out.with_name(f".{out.name}.writing")
    drawn.savefig(scratch, dpi=110, format="png", metadata={"Software": None})
    scratch.replace(out)
    typer.echo(f"wrote {out.name} from {len(paths)} archived results")


bench = typer.Typer(help="Time parts of the library against what they replace.")
app.add_typer(bench, name="bench", no_args_is_help=True)


@bench.callback()
def _bench() -> None:
    """Time parts of the library against what they replace."""


def _say(words: str) -> None:
    """What a benchmark is at, on standard error."""
    typer.echo(f"bench: {words}", err=True)


@bench.command()
def engine(
    contexts: Annotated[
        str, typer.Option(help="Lengths in tokens, with commas between.")
    ] = "512,4096,8192",
    steps: Annotated[int, typer.Option(help="Steps of each kind to time.")] = 40,
    pair: Annotated[str, typer.Option(help="smollm2, or a model folder.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float32 or float64.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="File to write the JSON to.")] = None,
) -> None:
    """The compact decoder beside transformers' generate, and both beside the memory's limit."""
    import json

    from bdlib import bench as benching
    from bdlib import measure as measuring

    lengths = benching.parse_contexts(contexts)
    settings = benching.EngineSettings(contexts=lengths, steps=steps, pair=pair, dtype=dtype)
    if out is not None:
        out = measuring.check_output(out)

    result = benching.engine(settings, progress=_say)
    if out is not None:
        measuring.write_json(out, result)
    typer.echo(json.dumps(result, indent=2) if as_json else benching.table(result))


@bench.command()
def training(
    recipe: Annotated[
        list[str] | None, typer.Option(help="Which recipe; may be repeated (default: both kinds).")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of the window.")] = 2048,
    repeats: Annotated[int, typer.Option(help="Passes with each number of views.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="File to write the JSON to.")] = None,
) -> None:
    """A training step with one sparse view and with three, beside the machine's matrix rate."""
    import json

    from bdlib import bench_training
    from bdlib import measure as measuring

    chosen = {"recipes": tuple(recipe)} if recipe else {}
    settings = bench_training.TrainingBenchSettings(**chosen, length=length, repeats=repeats)
    if out is not None:
        out = measuring.check_output(out)
    result = bench_training.training(settings, progress=_say)
    if out is not None:
        measuring.write_json(out, result)
    typer.echo(json.dumps(result, indent=2) if as_json else bench_training.table(result))


@bench.command()
def gpu(
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.html.")],
    dry: Annotated[
        bool, typer.Option("--dry", help="Tiny sizes on the CPU, to see that it reaches its end.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer shapes, lengths and repeats: a few minutes.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Chooses texts and random inputs.")] = 0,
) -> None:
    """Everything about a GPU in one report: kernels right and fast, decoding, training."""
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported, later than this
    from bdlib import bench_gpu

    report = bench_gpu.run(out, dry, seed, _say, quick)
    typer.echo(bench_gpu.summary(report))
    typer.echo(f"wrote {out / 'report.json'} and {out / 'report.html'}")
    raise typer.Exit(1 if report["faults"] else 0)


@bench.command()
def baselines(
    out: Annotated[Path, typer.Option(help="FILE.csv; what a stopped run measured stays in it.")],
    texts: Annotated[
        str, typer.Option(help="A file or folder of text, or embedded:train|held-out|all.")
    ] = "embedded:held-out",
    methods: Annotated[
        str,
        typer.Option(help="Names with commas between, NAME:GAMMA and NAME:auto too; all if unset."),
    ] = "",
    regime: Annotated[str, typer.Option(help="greedy, sampling or chat.")] = "chat",
    context: Annotated[int, typer.Option(help="Tokens of prompt and output together.")] = 2048,
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 4,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate per window.")] = 64,
    gamma: Annotated[int, typer.Option(help="Tokens drafted per round.")] = 4,
    budget: Annotated[int, typer.Option(help="Entries of every sparse cache.")] = 256,
    repeats: Annotated[int, typer.Option(help="Turns per window; times are medians.")] = 1,
    drafters: Annotated[
        Path | None, typer.Option(help="Folder of drafters besides the shipped ones.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses windows and what sampling draws.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float32 or float64.")] = "auto",
) -> None:
    """Every method on the same prompts: ours, transformers', lookup, self-speculation, TriForce."""
    from tqdm import tqdm

    from bdlib import baselines as comparing

    settings = comparing.BaselineSettings(
        methods=tuple(name.strip() for name in methods.split(",") if name.strip()),
        regime=regime,
        context=context,
        samples=samples,
        new_tokens=new_tokens,
        gamma=gamma,
        budget=budget,
        text=texts,
        drafters=None if drafters is None else str(drafters),
        repeats=repeats,
        seed=seed,
        dtype=dtype,
    )
    text = texts if texts.startswith("embedded:") else "TEXTS"
    command = (
        f"python -m bdlib bench baselines --texts {text} --regime {regime} --context {context}"
    )
    command += f" --samples {samples} --new-tokens {new_tokens} --gamma {gamma} --budget {budget}"
    command += f" --repeats {repeats} --seed {seed} --out FILE.csv"
    command += f" --methods {methods}" if methods else ""
    command += " --drafters DRAFTERS" if drafters else ""
    with tqdm(unit="decoding", file=sys.stderr) as bar:

        def show(words: str) -> None:
            bar.set_postfix_str(words, refresh=False)
            bar.update()

        try:
            records = comparing.run(settings, out, command, show)
        except KeyboardInterrupt:
            bar.leave = False
            typer.echo(f"stopped; the same command goes on in {out.name}", err=True)
            raise typer.Exit(130) from None
        except Exception:
            bar.leave = False  # the error's line stands alone
            raise
    typer.echo(comparing.table(records))


kernels = typer.Typer(help="The Triton kernels, without a GPU.")
app.add_typer(kernels, name="kernels", no_args_is_help=True)


@kernels.callback()
def _kernels() -> None:
    """The Triton kernels, without a GPU."""


@kernels.command("compile")
def kernels_compile(
    out: Annotated[Path, typer.Option(help="Folder for kernels_compiled.csv and .json.")],
    kernel: Annotated[
        list[str] | None, typer.Option(help="Module, for example verify; may be repeated.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; may be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that compile.")] = 1,
) -> None:
    """Compile every kernel for real GPUs; registers, spills, shared memory, instructions."""
    from tqdm import tqdm

    from bdlib.kernels import compiling

    names = tuple(kernel or compiling.MODULES)
    targets = tuple(target or compiling.TARGETS)
    total = len(compiling.configurations(names)) * len(targets)
    with tqdm(total=total, unit="kernel", file=sys.stderr) as bar:
        rows, faults = compiling.compile_all(
            out, names, targets, workers, progress=lambda row: bar.update()
        )
    typer.echo(compiling.summary(rows))
    for fault in faults:
        typer.echo(fault, err=True)
    typer.echo(f"{len(rows)} compiled, {len(faults)} fault(s)")
    raise typer.Exit(1 if faults else 0)


def main() -> None:
    """Run a command; turn an error in the input into one line and exit status 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("BDLIB_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
