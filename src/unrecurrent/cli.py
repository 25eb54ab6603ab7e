"""The command line, one verb each; errors are one sentence on stderr with exit code 2 (`--debug`: the traceback)."""

import errno
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unrecurrent.errors import InputError
from unrecurrent.files import make_folder

if TYPE_CHECKING:
    from unrecurrent.certificate import Certificate
    from unrecurrent.comparison import Comparison
    from unrecurrent.data import DataFile

app = typer.Typer(
    name="unrecurrent",
    help="Does this model need to be recurrent? Compare, train, certify. Add --debug to any command for a traceback.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="The data sets: what there is, where it lies, whether it is whole.", no_args_is_help=True)
app.add_typer(data_app, name="data")

DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the data sets (default: the environment variable UNRECURRENT_DATA)."),
]
Runs = Annotated[Path, typer.Option(help="Where trainings are kept: run again to resume or reuse.")]
ReportPath = Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")]
RecordsPath = Annotated[Path | None, typer.Option(help="Write the rows as a JSON list of records here.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]

#: whose horizon is proved where what stands before a layer is not known
LAYER_INPUTS = "the layer's own inputs"


def main() -> None:
    """Run the command line; a user's mistake ends with one sentence and exit code 2."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        app()
    except InputError as error:
        if debug:
            raise
        _fail(str(error))
    except OSError as error:
        if debug or error.errno != errno.ENOSPC:
            raise
        _fail("the disk is full: nothing was overwritten; free some space and run again")


def _fail(sentence: str) -> None:
    print(f"unrecurrent: {sentence}", file=sys.stderr)
    sys.exit(2)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


@app.command(epilog="Example: unrecurrent compare chorales --models lstm,tcn --seeds 2 --report report.html")
def compare(
    task: Annotated[str, typer.Argument(help="A task's name (see `unrecurrent data list`) or text:FILE.")],
    models: Annotated[
        str | None,
        typer.Option(help="Names, separated by commas; a setting is written as window:k=4."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Independent trainings of each model.")] = 3,
    parameters: Annotated[int | None, typer.Option(help="Trainable parameters of every model.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training data; 0.5 is half of one.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Minutes a training of the slowest model may take, instead of --epochs.", metavar="<minutes>"
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Draws of the settings to tune over (0: the recorded ones).")] = 0,
    runs: Runs = Path("runs"),
    report: ReportPath = None,
    records: RecordsPath = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Which model does this task need? Trains them at equal budget; table, verdict, report."""
    from unrecurrent.comparison import compare as run_comparison
    from unrecurrent.records import command_line

    _make_folders(report, records)
    comparison = run_comparison(
        task,
        models.split(",") if models else None,
        seeds=seeds,
        parameters=parameters,
        epochs=epochs,
        minutes=budget,
        trials=trials,
        data_dir=data_dir,
        folder=runs,
        command=command_line(),
    )
    _deliver(comparison, report, records, as_json, _show)


def _make_folders(*paths: Path | None) -> None:
    """Make the folders of files to be written before hours of work, not after."""
    for path in paths:
        if path is not None:
            if path.is_dir():
                raise InputError(f"{path} is a folder: name a file to write")
            make_folder(path.parent)


def _deliver(found: Any, report: Path | None, records: Path | None, as_json: bool, show: Callable[[Any], None]) -> None:
    """Write what was asked for of a `Comparison` or a `Lookback`, and print it."""
    from unrecurrent.records import write_records

    if records:
        write_records(records, found.records)
    if report:
        found.save_report(report)
    if as_json:
        _print_json(found.to_dict())
        return
    show(found)
    if report:
        print(f"\nReport: {report}")


def _show(found: "Comparison") -> None:
    from rich.console import Console

    from unrecurrent.report import terminal_table

    comparison, console = found.to_dict(), Console()
    console.print(terminal_table(comparison))
    console.print(f"\nDoes {comparison['task']} need a recurrent model?", style="bold")
    console.print(comparison["verdict"]["text"])


@app.command(epilog="Example: unrecurrent train jsb --model lstm --epochs 20 --out runs/jsb-lstm")
def train(
    task: Annotated[str, typer.Argument(help="A task's name (see `unrecurrent data list`) or text:FILE.")],
    model: Annotated[str, typer.Option(help="The model's name.")],
    out: Annotated[Path, typer.Option(help="The checkpoint's folder; run again to resume.")],
    parameters: Annotated[int | None, typer.Option(help="Trainable parameters.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training data; 0.5 is half of one.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Largest learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences, or columns of a stream, a step.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after this many epochs without a better loss.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the dropout and the order.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, ...")] = "cpu",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Train one model; interrupted at any moment, the same command resumes it to the same weights."""
    from unrecurrent.comparison import Contender
    from unrecurrent.models import match_parameters
    from unrecurrent.progress import progress_bars, updater
    from unrecurrent.recipes import default_parameters, find_recipe
    from unrecurrent.tasks import get_task
    from unrecurrent.training import TrainingRun, assess, task_interface

    contender = Contender.parse(model)
    found = get_task(task, data_dir=data_dir)
    recipe = find_recipe(found, contender.name, epochs)
    given: dict[str, Any] = {
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "patience": patience,
        "seed": seed,
    }
    training = replace(recipe.training, **{key: value for key, value in given.items() if value is not None})
    settings = {**recipe.settings, **contender.overrides}
    if "hidden_size" in contender.overrides and parameters is not None:
        raise InputError("--parameters says how wide the model is, and so does hidden_size: give one of them")
    if "hidden_size" not in settings:
        count = default_parameters(found) if parameters is None else parameters
        settings = match_parameters(contender.name, task_interface(found), settings, count)
    run = TrainingRun(found, contender.name, settings, training, out, device)
    with progress_bars() as bars:
        trained = run.run(updater(bars, bars.add_task(contender.label, total=1.0, start=False, info="")))
    metric = found.metric
    scores = {s: assess(trained, found, found.load(s)).metric for s in ("valid", "test")}
    if as_json:
        _print_json({"checkpoint": str(out), "metric": metric.name, "unit": metric.unit, **scores})
    else:
        print(f"{contender.label} on {found.name}: {metric.name} {scores['test']:.5g} {metric.unit} on test,")
        print(f"{scores['valid']:.5g} on validation (epoch {run.progress.best_epoch}). Checkpoint: {out}")


@app.command(epilog="Example: unrecurrent measure runs/jsb-lstm --report memory.html")
def measure(
    model: Annotated[Path, typer.Argument(help="The folder of a training run, or an ONNX file.")],
    data: Annotated[
        str | None,
        typer.Option(help="A task, a text file, or inputs as .npy, .npz or .csv (default: the checkpoint's own task)."),
    ] = None,
    longest: Annotated[int, typer.Option(help="Longest window and lag to measure.", min=1)] = 2048,
    positions: Annotated[int, typer.Option(help="How many predictions to sample.", min=1)] = 512,
    delta: Annotated[float, typer.Option(help="The relative loss that k* may cost.", min=0)] = 0.01,
    exponents: Annotated[str, typer.Option(help="How many Lyapunov exponents, or all.")] = "16",
    steps: Annotated[int, typer.Option(help="Over how many steps they are averaged.", min=1)] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the samples.", min=0)] = 0,
    report: ReportPath = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """How much memory does this trained model use? Estimates with bands, beside what is proved."""
    from unrecurrent.measuring import measure_file

    if exponents != "all" and not exponents.isdecimal():
        raise InputError(f"--exponents is {exponents!r}: give a whole number or all")
    _make_folders(report)
    profiles = measure_file(
        model,
        data,
        data_dir=data_dir,
        longest=longest,
        positions=positions,
        delta=delta,
        exponents="all" if exponents == "all" else int(exponents),
        steps=steps,
        seed=seed,
        progress=True,
    )
    if report:
        from unrecurrent.memory_charts import page

        page(profiles, report, f"Memory of {model.name}")
    if as_json:
        _print_json({name: profile.to_dict(delta) for name, profile in profiles.items()})
        return
    for name, profile in profiles.items():
        print(f"{name}: {profile}")
    if report:
        print(f"Report: {report}")


@app.command(epilog="Example: unrecurrent certify runs/jsb-lstm --eps 0.01")
def certify(
    checkpoint: Annotated[Path, typer.Argument(help="The folder of a training run, or an ONNX file.")],
    input_bound: Annotated[float | None, typer.Option(help="Inputs have no entry larger than this.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A task (for ONNX: .npy inputs): the statement covers inputs in its test data's range."),
    ] = None,
    eps: Annotated[float, typer.Option(help="The change of the hidden state the horizon is about.")] = 1e-2,
    method: Annotated[str, typer.Option(help="best, componentwise, spectral or miller-hardt.")] = "best",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """What can be proved about a trained model: its rate and horizon, and under which assumptions."""
    from unrecurrent.certificate import checked_eps
    from unrecurrent.checkpoint import load_model
    from unrecurrent.models.recurrent import RecurrentModel
    from unrecurrent.models.seq2seq_lstm import Seq2SeqLSTM
    from unrecurrent.tasks import get_task

    checked_eps(eps)
    if checkpoint.suffix == ".onnx":
        from unrecurrent.measuring import load_arrays
        from unrecurrent.onnx_graph import load_graph

        arrays = load_arrays(Path(data)) if data else None
        proved = load_graph(checkpoint).certificates(arrays, input_bound=input_bound, method=method)
        _show_certificates(proved, eps, as_json, whose=LAYER_INPUTS)
        return
    model, config = load_model(checkpoint)
    if isinstance(model, Seq2SeqLSTM):
        if data or input_bound is not None:
            raise InputError("what is proved of this model's layers holds for all they can read: leave the option out")
        _show_certificates(model.layer_certificates(method=method), eps, as_json, whose=LAYER_INPUTS)
        return
    if not isinstance(model, RecurrentModel):
        reach = f"an output depends on the last {model.receptive_field} inputs alone"
        if model.receptive_field is None:
            reach = "it looks back on the whole past another way"
        raise InputError(f"the model {config['model']!r} has no recurrent layer to certify: {reach}")
    inputs = None
    if data:
        inputs = [example.inputs for example in get_task(data, data_dir=data_dir).load("test")]
    certificate = model.certificate(inputs=inputs, input_bound=input_bound, method=method)
    _show_certificates({checkpoint.name: certificate}, eps, as_json, reach=model.reach)


def _show_certificates(
    certificates: dict[str, "Certificate"], eps: float, as_json: bool, whose: str = "inputs", reach: int = 0
) -> None:
    """Print certificates; `reach` is by how much the horizon for what `whose` names is longer than the layer's own."""
    horizons = {name: None if (h := c.horizon(eps)) is None else h + reach for name, c in certificates.items()}
    if as_json:
        shown = [{**c.to_dict(), "eps": eps, "horizon": horizons[name]} for name, c in certificates.items()]
        _print_json(shown[0] if len(shown) == 1 else dict(zip(certificates, shown, strict=True)))
        return
    for name, certificate in certificates.items():
        print(certificate if len(certificates) == 1 else f"{name}: {certificate}")
        if (horizon := horizons[name]) is not None:
            beside = f" ({reach} of them in the convolution before the layer)" if reach else ""
            print(
                f"Proved: leaving out {whose} more than {horizon:,} steps back{beside} changes the hidden state by at"
                f" most {eps:g}."
            )


@app.command(epilog="Example: unrecurrent lookback ETTh1.csv --target OT --horizon 24 --report lookback.html")
def lookback(
    data: Annotated[str, typer.Argument(help="A CSV file, or ETTh1, tanks or F16. Its first line names the columns.")],
    target: Annotated[str | None, typer.Option(help="The column to predict.")] = None,
    horizon: Annotated[
        int | None, typer.Option(help="Steps ahead (default 1; 0: estimate it from the covariates alone).")
    ] = None,
    covariates: Annotated[
        str | None, typer.Option(help="Columns that help, separated by commas, or all (default: none).")
    ] = None,
    id_column: Annotated[str | None, typer.Option("--id", help="The column that tells several series apart.")] = None,
    time: Annotated[
        str | None, typer.Option(help="The column of dates (default: the first that holds dates, or is called so).")
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(help="Longest window considered (default: an eighth of the training part, to 256)."),
    ] = None,
    delta: Annotated[float, typer.Option(help="The relative loss that the window may cost.")] = 0.01,
    model: Annotated[str, typer.Option(help="The recurrent forecaster: lstm, gru or rnn.")] = "lstm",
    seeds: Annotated[int, typer.Option(help="Independent trainings of each model.")] = 3,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training part.")] = None,
    runs: Runs = Path("runs"),
    report: ReportPath = None,
    records: RecordsPath = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """How long a window does this series need? Trains, measures, recommends, and checks the recommendation."""
    from unrecurrent.lookback import look_back, series_of
    from unrecurrent.records import command_line

    _make_folders(report, records)
    named = tuple(covariates.split(",")) if covariates else ()
    options = {"horizon": horizon, "covariates": named, "id_column": id_column, "time": time, "longest": longest}
    found = look_back(
        series_of(data, target=target, **options),
        model=model,
        seeds=seeds,
        epochs=epochs,
        delta=delta,
        data_dir=data_dir,
        folder=runs,
        command=command_line(),
    )
    _deliver(found, report, records, as_json, lambda shown: print(shown.table, shown.text, sep="\n"))


@data_app.command("list", epilog="Example: unrecurrent data list")
def data_list(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Which data sets there are, and where their files lie."""
    from unrecurrent import data

    _show_files(data.listing(data_dir), as_json)


@data_app.command("check", epilog="Example: unrecurrent data check jsb")
def data_check(
    name: Annotated[str | None, typer.Argument(help="One data set (default: all).")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Compare the files with their published checksums; exit code 1 if one is missing or damaged."""
    from unrecurrent import data

    files = data.check(name, data_dir)
    _show_files(files, as_json)
    raise typer.Exit(any(file.state != "ready" for file in files))


@data_app.command("get", epilog="Example: unrecurrent data get jsb")
def data_get(name: Annotated[str, typer.Argument(help="The data set to download.")], data_dir: DataDir = None) -> None:
    """Download a data set from its public home; an interrupted download is continued."""
    from unrecurrent import data

    with data.progress_bar() as progress:
        paths = data.fetch(name, data_dir, progress)
    for path in paths:
        print(path)


def _show_files(files: Sequence["DataFile"], as_json: bool) -> None:
    if as_json:
        _print_json([{**asdict(file), "path": str(file.path)} for file in files])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("data set", "state", "file", "licence", box=None)
    for file in files:
        table.add_row(file.task, file.state, str(file.path), file.licence)
        if file.note:
            table.add_row("", "", file.note)
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
