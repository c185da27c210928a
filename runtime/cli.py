"""The command `bar-edge`. A verb imports what it needs when it runs, and says which extra is missing.

Exit codes: 0 done; 1 a check ran and failed; 2 a mistake that one sentence explains (`--debug` shows where).
"""

import json
import math
import shlex
import sys
import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.tables import redirected_width
from bar_edge.runtime.terminal import err, run

app = typer.Typer(
    help="Run trained BAR image generators without PyTorch: export, generate, verify.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console(soft_wrap=True, width=redirected_width(), markup=False)
_MOST_IMAGES = 2**32 - 1  # of a seed
_SHEET_IMAGES = 100  # on a contact sheet, which holds them in memory
_LINE_SECONDS = 60.0  # between lines of progress in a log

Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
EngineName = Annotated[str, typer.Option("--engine", help="auto, or an engine's name, which then is never replaced.")]
Threads = Annotated[int, typer.Option(min=0, max=1024, help="CPU threads; 0 for all cores.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,
) -> None:
    """Options of every verb."""


@app.command()
def export(
    generator: Annotated[Path, typer.Argument(help="The generator: .bin, .pt or .safetensors.")],
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="The tokenizer it was trained with.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle folder to make.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="The authors' YAML; optional for published variants.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value over the YAML.")] = None,
    force: Force = False,
) -> None:
    """Export a checkpoint to an fp32 ONNX bundle, proven against the reference model.

    Example: bar-edge export bar_b.bin --config bar_b.yaml --tokenizer bar_fsq_16bits_ft.bin -o bar_b/
    """
    exporter = _need("bar_edge.export.exporter", "export")
    with _progress() as bar:
        bundle = exporter.export_bundle(
            generator, tokenizer, config, output, overrides=overrides or (), force=force, progress=bar
        )
    recipe = bundle.recipe
    out.print(
        f"{output}: {bundle.variant or 'no published variant'}, {bundle.spec.image_size}x{bundle.spec.image_size}; "
        f"samples with guidance {recipe.guidance:g}, temperature {recipe.temperature:g}, "
        f"allocation {','.join(map(str, recipe.allocation))}; "
        f"{len(bundle.graphs)} graphs, self-test drawn and repeated by the reference model"
    )


@app.command()
def quantize(
    bundle: Annotated[Path, typer.Argument(help="An fp32 bundle folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle folder to make.")],
    precision: Annotated[str, typer.Option(help="int8 (static W8A8), int8-weight or int4-weight.")] = "int8",
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="File of ranges: used if it exists, written if not.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Images to calibrate on.", show_default="32")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the calibration images.", show_default="1000")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Images drawn together.", show_default="8")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Real images, pretokenized (ROOT/train/CLASS/*.npz), instead of drawn ones."),
    ] = None,
    observer: Annotated[str, typer.Option(help="Range of activations: max, percentile, entropy or mse.")] = "mse",
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="Zero points for static activations; only ONNX Runtime runs them.")
    ] = False,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", help="A linear layer to leave in fp32, or LAYER=fp16; repeat.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Fraction of decisions that may flip; harmful layers stay fp32 until it holds.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Keep graphs fp32 where integers are not faster on this machine."),
    ] = True,
    threads: Threads = 0,
    force: Force = False,
) -> None:
    """Quantize a bundle with what its layers really see, measure it, and say what became of each graph.

    Example: bar-edge quantize bar_b/ --precision int8 -o bar_b-int8/
    """
    from bar_edge.runtime.bundle import check_output

    ranges = _need("bar_edge.calibration.ranges", "calibration")
    quantizer = _need("bar_edge.calibration.quantizer", "calibration")
    check_output(output, force=force, sources=[bundle])
    kept = tuple(layer.removesuffix("=fp16") for layer in keep or ())
    halves = tuple(layer.removesuffix("=fp16") for layer in keep or () if layer.endswith("=fp16"))
    with _progress() as bar, ExitStack() as kept_for_later:
        source = _open(bundle, bar)
        quantizer.check_settings(source, precision=precision, observer=observer, keep=kept, budget=budget)
        partial = output.absolute().parent / f".{output.name}.calibration.npz"
        kept_for_later.callback(_tell_of, partial)
        there = calibration is not None and calibration.exists()
        collected = ranges.obtain(
            source, ranges.Asked(images, seed, batch_size, data), file=calibration, partial=partial, threads=threads,
            progress=bar,
        )  # fmt: skip
        if there:
            err.print(f"using the ranges in {calibration}: {collected.plan.images} images, seed {collected.plan.seed}")
        made = quantizer.quantize_bundle(
            source, collected, output, precision=precision, observer=observer, asymmetric=asymmetric,
            keep_fp32=tuple(set(kept) - set(halves)), keep_fp16=halves, budget=budget, measure=measure, force=force,
            threads=threads, progress=bar,
        )  # fmt: skip
        kept_for_later.pop_all()
    partial.unlink(missing_ok=True)
    facts = made.manifest["quantization"]
    for sentence in facts["timings"] or ["nothing measured on this machine (--no-measure)"]:
        out.print(sentence)
    for name in ("onnxruntime_modulation", "onnxruntime_step", "onnxruntime_decode"):
        out.print(f"{name}: {made.manifest['graphs'][name]['precision']}")
    quality = facts["quality"]
    out.print(
        f"{output}: {quality['flips']:.2%} of {quality['decisions']:,} decisions flip against fp32, "
        f"KL {quality['kl']:.2e} nats a bit, latents {quality['latent_snr_db']:.1f} dB "
        f"(teacher-forced on {quality['images']} images not calibrated on)"
    )
    if searched := facts["sensitivity"]:
        out.print(f"kept in fp32 for the budget: {', '.join(searched['kept_fp32']) or 'nothing'}")


@app.command("compile")
def compile_(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder, fp32 or quantized.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Compiled bundle folder to make.")],
    target: Annotated[
        str,
        typer.Option(
            help="rtx (any RTX card, builds without a GPU), host, or a device as rtx4090, orin, thor; "
            "cuda is our own kernels, on any GPU from SM 8.0 on."
        ),
    ] = "host",
    precision: Annotated[str, typer.Option(help="Of what is not in integers: fp16, bf16 or fp32.")] = "fp16",
    batches: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, help="Images drawn together; repeat for several sets of engines."),
    ] = None,
    keep_onnx: Annotated[
        Path | None, typer.Option("--keep-onnx", help="New folder for the compiled graphs, to look at with Polygraphy.")
    ] = None,
    force: Force = False,
) -> None:
    """Compile a bundle to TensorRT engines, and read back what the builder really did; or pack it for our own kernels.

    Example: bar-edge compile bar_b-int8/ --target rtx --batch 1 --batch 8 -o bar_b-int8-rtx/
    """
    from bar_edge.runtime.bundle import check_output
    from bar_edge.runtime.engines.cuda.device import host_sm
    from bar_edge.runtime.inspection import library_sentence

    check_output(output, force=force, sources=[bundle])
    if target == "cuda":
        if precision != "fp16" or batches or keep_onnx:
            raise RequestError("--target cuda takes fp16 and any batch, and makes no graphs: leave those options out")
        packer = _need("bar_edge.export.prepack", "compile")
        with _progress() as bar:
            made = packer.prepack_bundle(_open(bundle, bar), output, force=force, progress=bar)
        out.print(f"{output}: {packer.sentence(made)}")
        return
    compiler = _need("bar_edge.export.compile", "compile")
    with _progress() as bar:
        made = compiler.compile_bundle(
            _open(bundle, bar), output, target=target, precision=precision, batches=tuple(sorted(set(batches or (1,)))),
            host_sm=host_sm(), keep_onnx=keep_onnx, force=force, progress=bar,
        )  # fmt: skip
    facts = made.manifest["engines"]["tensorrt"]
    out.print(f"{output}: {library_sentence(facts)}")
    for profile in facts["profiles"]:
        buffers = f"{profile['buffer_bytes'] / 2**20:.0f} MiB of buffers beside the plans"
        out.print(f"{profile['sizes']['rows']} rows, {buffers}:")
        for name, plan in profile["plans"].items():
            out.print(f"  {name}: {compiler.sentence(plan)}")


@app.command()
def generate(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the PNGs and the contact sheet.")],
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Class number or, for 1000 classes, ImageNet name; repeat.")
    ] = None,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Images of no class.")] = False,
    num: Annotated[int, typer.Option(min=1, max=_MOST_IMAGES, help="Images per class.")] = 1,
    seed: Annotated[int, typer.Option(help="0 to 2**64-1; with the image's index it decides every bit.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; up to 1 turns guidance off.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    allocation: Annotated[str | None, typer.Option(help="Bits unmasked per head pass, as 2,2,5,7.")] = None,
    order: Annotated[str, typer.Option(help="raster or random.")] = "raster",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images drawn together.")] = 8,
    threads: Threads = 0,
    engine: EngineName = "auto",
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that has files already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw images: one PNG each, with its settings inside, and a labelled contact sheet.

    Example: bar-edge generate bar_b/ --class 207 --class "red panda" --num 4 --seed 1 -o out/
    """
    from bar_edge.runtime.classes import class_name, parse_class
    from bar_edge.runtime.folders import check_folder, locked
    from bar_edge.runtime.generator import Generator
    from bar_edge.runtime.pictures import columns_for, contact_sheet, save_png

    if bool(classes) == unconditional:
        raise RequestError("give --class (several times if you like) or --unconditional, one of the two")
    check_folder(output, force=force)
    with _progress() as bar, ExitStack() as writing:
        verified = _open(bundle, bar)
        spec = verified.spec
        ids: list[int | None] = [None] if unconditional else [parse_class(text, spec) for text in classes or ()]
        with Generator(verified, engine=engine, threads=threads) as bar_generator:
            recipe = bar_generator.recipe(guidance, temperature, _allocation(allocation))
            settings = {
                "bundle": verified.digest, "variant": verified.variant, "engine": bar_generator.engine_name,
                "bar-edge": metadata.version("bar-edge"), "seed": seed, "order": order, "guidance": recipe.guidance,
                "temperature": recipe.temperature, "allocation": list(recipe.allocation),
            }  # fmt: skip
            stream = bar_generator.stream(
                ids, seed=seed, num=num, guidance=recipe.guidance, temperature=recipe.temperature,
                allocation=recipe.allocation, order=order, batch_size=batch_size,  # type: ignore[arg-type]
                progress=lambda finished, images, done, tokens: bar(
                    f"images {finished + 1}-{min(finished + batch_size, images)} of {images}, tokens", done, tokens
                ),
            )  # fmt: skip
            output.mkdir(parents=True, exist_ok=True)
            writing.enter_context(locked(output))
            check_folder(output, force=force)  # someone else may have been faster
            images: list[Any] = []
            labels, files = [], []
            for drawn in stream:
                name = class_name(drawn.class_id, spec)
                file = output / f"{drawn.index:05d}.png"
                save_png(
                    drawn.image, file, {**settings, "class_id": drawn.class_id, "class": name, "index": drawn.index}
                )
                files.append(str(file))
                if len(images) < _SHEET_IMAGES:
                    images.append(drawn.image)
                    labels.append(
                        name if name == str(drawn.class_id) or drawn.class_id is None else f"{drawn.class_id} {name}"
                    )
        sheet = output / "sheet.png"
        save_png(contact_sheet(images, labels, columns_for(len(images), num)), sheet, settings)
    if as_json:
        print(json.dumps({"images": files, "sheet": str(sheet), "settings": settings}))
        return
    out.print(f"engine {bar_generator.engine_name} ({bar_generator.engine_reason})")
    on_sheet = f" of the first {len(images)}" if len(images) < len(files) else ""
    out.print(f"{len(files)} images in {output}, contact sheet{on_sheet} {sheet}")


@app.command()
def sample(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the set; taken up again if it was begun.")],
    num: Annotated[int, typer.Option(min=1, max=_MOST_IMAGES, help="Images in all.")] = 50_000,
    classes: Annotated[
        str, typer.Option(help="balanced (image i is of class i mod C), or classes taken in turn, as 207,360.")
    ] = "balanced",
    seed: Annotated[int, typer.Option(help="0 to 2**64-1; with the image's index it decides every bit.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; up to 1 turns guidance off.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    allocation: Annotated[str | None, typer.Option(help="Bits unmasked per head pass, as 2,2,5,7.")] = None,
    png: Annotated[bool, typer.Option("--png/--no-png", help="PNGs beside samples.npz.")] = True,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images drawn together.")] = 8,
    threads: Threads = 0,
    engine: EngineName = "auto",
    ray: Annotated[
        str | None, typer.Option("--ray", help="local, auto or HOST:PORT: share the work on a Ray cluster.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw an evaluation set: PNGs and the samples.npz that evaluators read. Interrupted, the same command goes on.

    Example: bar-edge sample bar_b/ --num 50000 --classes balanced -o bar_b-50k/
    """
    from bar_edge.runtime import engines, ray_shards
    from bar_edge.runtime.evaluation_set import EvaluationSet
    from bar_edge.runtime.evaluation_settings import EvaluationSettings
    from bar_edge.runtime.generator import Generator

    if ray is not None:
        _need("ray", "ray")
    with _progress() as bar:
        verified = _open(bundle, bar)
        settings = EvaluationSettings.of(
            verified, engine=engines.choose(engine, verified)[0], num=num, classes=classes, seed=seed,
            guidance=guidance, temperature=temperature, allocation=_allocation(allocation), png=png,
        )  # fmt: skip
        with EvaluationSet.begin(output, settings) as folder:
            if folder.missing() and ray is not None:
                ray_shards.draw(folder, verified, address=ray, threads=threads, batch_size=batch_size, progress=bar)
            elif folder.missing():
                with Generator(verified, engine=settings.engine, threads=threads) as bar_generator:
                    folder.draw(bar_generator, batch_size=batch_size, progress=bar)
            samples = folder.assemble(bar)
    if as_json:
        print(json.dumps({"samples": str(samples), "images": str(folder.images) if png else None}))
        return
    out.print(f"{num:,} images in {samples}" + (f" and {folder.images}" if png else ""))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, an ONNX file or a bundle folder.")],
    as_json: AsJson = False,
) -> None:
    """Say what a file or bundle is: variant, shapes, sizes, bytes read per token, precision, provenance.

    Example: bar-edge inspect bar_b/
    """
    if path.is_dir():
        from bar_edge.runtime.inspection import describe_bundle, summarized

        with _progress() as bar:
            facts = describe_bundle(_open(path, bar))
        if not as_json:
            facts = summarized(facts)
    elif not path.exists():
        raise RequestError(f"{path}: no such file or folder")
    else:
        facts = _need("bar_edge.export.inspection", "export").describe_file(path)
    _show(facts, as_json)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    against: Annotated[Path | None, typer.Option("--against", help="The checkpoint it was exported from.")] = None,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="The checkpoint's tokenizer.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="The checkpoint's YAML.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Images to compare with the checkpoint or the fp32 bundle.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of those images.")] = 0,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="The fp32 bundle a quantized one was made from.")
    ] = None,
    threads: Threads = 0,
    engine: EngineName = "auto",
    as_json: AsJson = False,
) -> None:
    """Prove a bundle on this machine.

    Always its self-test; with --against, every decision beside the checkpoint; with --reference, how far a quantized
    bundle is from fp32.

    Example: bar-edge verify bar_b/ --against bar_b.bin --tokenizer bar_fsq_16bits_ft.bin
    """
    from bar_edge.runtime import selftest
    from bar_edge.runtime.generator import Generator

    if (against is None) != (tokenizer is None):
        raise RequestError("--against and --tokenizer go together: give both or neither")
    if config is not None and against is None:
        raise RequestError("--config is the checkpoint's: give --against and --tokenizer as well, or leave it out")
    with _progress() as bar, Generator(_open(bundle, bar), engine=engine, threads=threads) as runtime:
        if against is not None and "quantization" in runtime.bundle.manifest:
            raise RequestError(f"{bundle} is quantized: compare it with --reference FP32_BUNDLE instead of --against")
        tested = selftest.run(runtime)
        facts: dict[str, Any] = {"selftest": tested.to_dict()}
        passed = tested.passed
        if against is not None and tokenizer is not None:
            checkpoint = _need("bar_edge.export.checkpoint", "export").load_checkpoint(against, tokenizer, config)
            if checkpoint.spec != runtime.spec:
                raise RequestError(f"{against} is not the checkpoint of {bundle}: their shapes differ")
            comparison = _need("bar_edge.export.verification", "export").compare(
                runtime, checkpoint, images=num, seed=seed, progress=bar
            )
            facts["against_checkpoint"] = comparison.to_dict()
            passed = passed and comparison.passed
        if reference is not None:
            measured = _need("bar_edge.calibration.quality", "calibration").compare_bundles(
                _open(reference, bar), runtime.bundle, images=num, seed=seed, threads=threads, progress=bar
            )
            facts |= measured
    _show({"passed": passed, **facts}, as_json)
    if not passed:
        if runtime.engine_name == "tensorrt":
            err.print(
                "to find the graph that differs, compile the source again with --keep-onnx GRAPHS and let Polygraphy "
                "compare: polygraphy run GRAPHS/step-ROWS.onnx --trt --onnxrt --strongly-typed",
                highlight=False,
            )
        raise typer.Exit(1)


@app.command()
def bench(
    paths: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="Bundle folders; with --compare, two report.json files.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the report.")] = Path("bench-output"),
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="The checkpoint the bundles come from, to run in PyTorch.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="The checkpoint's tokenizer.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="The checkpoint's YAML.")] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(
            "--form",
            help="Of the baseline: fp32, tf32, bf16, compiled, compiled-bf16; repeat. Default: fp32, bf16, compiled.",
        ),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option("--engine", help="Repeat. Every engine a bundle was made for unless given.")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Images drawn together; repeat. 1 unless given.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Counted batches of every contender; p99 needs 100.")] = 10,
    warmup: Annotated[int, typer.Option(min=1, help="Batches before, of which the first is proven.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the images.")] = 0,
    threads: Threads = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Say what moved between two reports.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that has files already.")] = False,
) -> None:
    """Time bundles beside PyTorch, after proving that they draw the same images: table, JSON, HTML, charts.

    Example: bar-edge bench bar_b/ bar_b-int8/ --baseline bar_b.bin --tokenizer bar_fsq_16bits_ft.bin -o report/
    """
    command = _need("bar_edge.benchmarks.command", "bench")
    if compare:
        command.compare(paths, out)
        return
    plans = _need("bar_edge.benchmarks.plan", "bench")
    if (baseline is None) != (tokenizer is None):
        raise RequestError("--baseline and --tokenizer go together: give both or neither")
    if baseline is None and (form or config):
        raise RequestError("--form and --config are of the PyTorch reference: give --baseline and --tokenizer as well")
    reference = None
    if baseline is not None:
        _need("torch", "export")
        reference = plans.Baseline(baseline, tokenizer, config, tuple(form or plans.DEFAULT_FORMS))
        command.check_baseline(reference)
    with _progress() as bar:
        bundles = [_open(path, bar) for path in paths]
        plan = plans.Plan.of(
            bundles, baseline=reference, engines=engine or (), batch_sizes=batch_size or (1,), rounds=rounds,
            warmup=warmup, threads=threads, seed=seed, command=shlex.join(["bar-edge", *sys.argv[1:]]),
        )  # fmt: skip
        command.check_output(output, force=force)
        report = command.measure(plan, output, bar)
    command.show(report, out)
    out.print(f"{output / command.HTML}, {output / command.JSON} and the charts as PNGs")
    if missed := command.shortfalls(report, plan.engines):
        for sentence in missed:
            err.print(sentence, markup=False, highlight=False)
        raise typer.Exit(1)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say which engines and extras work on this machine, and what to install for the others.

    Example: bar-edge doctor
    """
    from bar_edge.runtime import engines

    facts: dict[str, Any] = {
        "bar-edge": metadata.version("bar-edge"),
        "python": sys.version.split()[0],
        "engines": {
            state.name: {"usable": state.usable, "detail": state.detail} for state in map(engines.status, engines.NAMES)
        },
        "extras": {name: _extra_state(name, modules) for name, modules in _EXTRAS.items()},
    }
    _show(facts, as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for everything the demo makes.")] = Path(
        "demo-output"
    ),
    force: Force = False,
) -> None:
    """Export, draw, verify and time the small trained model that ships with bar-edge.

    Example: bar-edge demo -o demo-output
    """
    runner = _need("bar_edge.export.demo", "export")
    runner.run(output, force=force, console=out, progress=_progress)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="VARIANT", help="A published variant, as bar_b, or a bundle folder.")],
    device: Annotated[str, typer.Option("--device", help="As orin, thor, rtx4090, h200 or epyc-2core.")],
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Images drawn together; repeat. 1 and 8 unless given.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Folder of measured results: show the plan's error for each.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict latency, memory and the largest batch on a device, for every precision, before building anything.

    Example: bar-edge plan bar_b --device orin
    """
    from bar_edge.runtime import plan_tables, planning
    from bar_edge.runtime.devices import find_device
    from bar_edge.runtime.plan_accuracy import deviations

    target = find_device(device)
    variant, workloads = _planned(model, set(target.rates))
    plans = [
        (planning.predict(workload, target, images), planning.largest_batch(workload, target))
        for workload in workloads
        for images in batch or (1, 8)
    ]
    if against is not None and variant is None:
        raise RequestError(f"{model}: --against compares published variants, and this is none; leave it out")
    found = [] if against is None or variant is None else deviations(against, variant, target)
    if as_json:
        facts = {
            "model": model,
            "device": target.to_dict(),
            "plans": [{**prediction.to_dict(), "largest_batch": largest} for prediction, largest in plans],
            "deviations": [one.to_dict() for one in found],
        }
        print(json.dumps(facts, indent=1))
        return
    out.print(plan_tables.plan_table(model, target, plans))
    out.print(plan_tables.source_table(target.sources))
    if found:
        out.print(plan_tables.deviation_table(found))


_EXTRAS = {
    "bench": ("jinja2", "matplotlib", "onnx"),
    "compile": ("ml_dtypes", "onnx"),
    "cuda": ("cuda",),
    "pycuda": ("pycuda",),
    "export": ("torch", "onnx", "safetensors", "yaml"),
    "calibration": ("onnx", "matplotlib"),
    "ray": ("ray",),
}


def main() -> None:
    """Run the command; a BarEdgeError becomes one line and exit code 2."""
    run(app)


class _Bar:
    """One progress line that changes its description; where stderr is not a terminal, a line a minute."""

    def __init__(self) -> None:
        self._next_line = time.monotonic() + _LINE_SECONDS
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=err, transient=True, disable=not err.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=None)
        self._what = ""

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: float, total: int) -> None:
        if what != self._what:
            self._progress.reset(self._task, description=what, total=total)
            self._what = what
        self._progress.update(self._task, completed=done, total=total)
        if not err.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            err.print(f"{what}: {int(done):,} of {total:,}", markup=False, highlight=False)


def _progress() -> _Bar:
    return _Bar()


def _open(path: Path, bar: _Bar) -> Any:
    from bar_edge.runtime.bundle import Bundle

    return Bundle.open(path, bar)


def _planned(model: str, precisions: set[str]) -> tuple[Any, list[Any]]:
    """The published variant that `model` is, if any, and its workloads: one a precision, or a bundle's own."""
    from bar_edge.runtime import weights, workload
    from bar_edge.runtime.bundle import check_not_compiled
    from bar_edge.runtime.precisions import PRECISIONS
    from bar_edge.runtime.spec import VARIANTS

    if model in VARIANTS:
        known = [name for name in PRECISIONS if name in precisions]
        return VARIANTS[model], [workload.of_variant(VARIANTS[model], name) for name in known]
    if not Path(model).is_dir():
        raise RequestError(f"{model}: neither a bundle folder nor a published variant ({', '.join(VARIANTS)})")
    with _progress() as bar:
        bundle = _open(Path(model), bar)
    check_not_compiled(bundle)
    places = weights.read_places(bundle.path / weights.FILE_NAME)
    return VARIANTS.get(bundle.variant), [workload.of_bundle(bundle.spec, bundle.recipe, places)]


def _need(module: str, extra: str) -> ModuleType:
    """Import a module of an optional part, or say what to install."""
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "bar_edge":
            raise
        raise RequestError(f"this needs {error.name}; pip install 'bar-edge[{extra}]'") from error


def _tell_of(partial: Path) -> None:
    if partial.exists():
        err.print(f"the ranges collected so far are in {partial}; the same command goes on from there", markup=False)


def _extra_state(extra: str, modules: tuple[str, ...]) -> str:
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    return f"missing {', '.join(missing)}; pip install 'bar-edge[{extra}]'" if missing else "installed"


def _allocation(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise RequestError(f"allocation {text!r} is not a list of numbers like 2,2,5,7") from error


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(_finite(facts), indent=1))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        _rows(table, key.replace("_", " "), value)
    out.print(table)


def _finite(value: Any) -> Any:
    """With null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(table: Table, key: str, value: Any) -> None:
    if isinstance(value, dict) and value:
        for i, (name, inner) in enumerate(value.items()):
            table.add_row(key if i == 0 else "", f"{name}: {_text(name, inner)}")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, entry in enumerate(value):
            table.add_row(key if i == 0 else "", _text("", entry))
    else:
        table.add_row(key, _text(key, value))


def _text(key: str, value: Any) -> str:
    if value is None or value in ({}, [], ()):
        return "none"
    if isinstance(value, dict):
        parts = ((name, _text(name, inner), isinstance(inner, dict)) for name, inner in value.items())
        return ", ".join(f"{name} ({text})" if nested else f"{name} {text}" for name, text, nested in parts)
    if isinstance(value, list | tuple):
        return ", ".join(f"({_text('', one)})" if isinstance(one, dict) else _text("", one) for one in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if "bytes" in key and isinstance(value, int):
        return f"{value:,} ({value / 2**20:,.1f} MiB)"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
