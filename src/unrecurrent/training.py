"""One training loop for every model and task: resumable bit for bit, logged, stopped early on validation."""

import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unrecurrent.batches import Batch, scoring_columns, sequence_batches, stream_batches
from unrecurrent.beam_search import beam_search
from unrecurrent.cells import find_recurrent
from unrecurrent.checkpoint import TRAINING, load_tensors, save_model, save_tensors
from unrecurrent.errors import Diverged, InputError, as_number, checked_whole
from unrecurrent.files import make_folder, write_text
from unrecurrent.models import Cache, Interface, SequenceModel, Settings, build_model, parameter_count
from unrecurrent.optimizer_step import OptimizerStep
from unrecurrent.softmax import WordSampler, linear_cross_entropy, linear_losses
from unrecurrent.tasks.task import Example, Split, Task

LOG = "log.jsonl"
#: steps of a stream scored at once
SCORING_PIECE = 256


#: how many seeds there are; torch takes more, but not times a million, as the order of an epoch asks for
SEEDS = 2**32
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; every field has the same meaning for every model.

    `batch_size` counts sequences (columns of a stream), `piece` the steps of a stream between two optimizer
    steps (truncated back-propagation through time with carried state), `clip_norm` the largest gradient norm,
    `epochs` passes over the data, of which the last may be cut short (0.3: the first 30 % of one pass),
    `patience` the epochs without a better validation loss after which training stops (`None`: never).
    `schedule` is `constant`, `cosine` (to zero at the last step) or `plateau` (a quarter of the rate after
    each epoch that is no better). `weight_decay` (AdamW's is decoupled: a step takes learning rate times decay
    off a weight) is that of all parameters. Torch's recurrent layers and the stable ones learn at
    `recurrent_learning_rate_factor` times the rate and decay by `recurrent_weight_decay` (`None`: as the rest).
    Three fields concern predictions over a large vocabulary: `softmax`, the type its products are made in while
    training and validating (`float32`, `bfloat16`), `sampled_words`, how many words normalise them in a training
    step (0: all), and `frequency_bias`, whether the biases of the readout start at the logarithms of the words'
    frequencies (else as the model has them). What a trained model scores is always exact and in float32.
    """

    epochs: float = 20
    learning_rate: float = 2e-3
    optimizer: str = "adamw"
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    schedule: str = "constant"
    batch_size: int = 16
    piece: int = 64
    patience: int | None = None
    sampled_words: int = 0
    softmax: str = "float32"
    frequency_bias: bool = False
    recurrent_learning_rate_factor: float = 1.0
    recurrent_weight_decay: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choices = (("optimizer", ("adamw", "sgd")), ("schedule", ("constant", "cosine", "plateau")))
        for name, known in (*choices, ("softmax", tuple(_DTYPES))):
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        for name in ("batch_size", "piece"):
            checked_whole(name, getattr(self, name), 1)
        for name in ("epochs", "learning_rate", "recurrent_learning_rate_factor"):
            if (as_number(getattr(self, name)) or 0) <= 0:
                raise InputError(f"{name} must be positive and finite, not {getattr(self, name)!r}")
        if not (isinstance(self.clip_norm, Real) and self.clip_norm > 0):
            raise InputError(f"clip_norm must be positive, not {self.clip_norm!r}")
        own_decay = () if self.recurrent_weight_decay is None else ("recurrent_weight_decay",)
        for name in ("sampled_words", "weight_decay", *own_decay):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0 and finite, not {getattr(self, name)}")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience must be at least 1, not {self.patience}")
        if checked_whole("seed", self.seed, 0) >= SEEDS:
            raise InputError(f"seed must be smaller than {SEEDS:,}, not {self.seed}")

    def identity(self) -> dict[str, Any]:
        """Return what tells one training from another: every field, but for new ones that leave things as they were."""
        return {name: value for name, value in asdict(self).items() if value != _NEW_FIELDS.get(name, ...)}


#: fields that came to be after folders were named for the others, with the value that is how it was before
_NEW_FIELDS = {"recurrent_learning_rate_factor": 1.0, "recurrent_weight_decay": None}


def with_defaults(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded fields of a `TrainingConfig`, and those it did not have yet as they are by default."""
    return {**asdict(TrainingConfig()), **training}


@dataclass
class Progress:
    """Where a run stands; everything a resumed run needs besides tensors."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0
    best_loss: float = math.inf
    best_epoch: int = 0
    worse_epochs: int = 0
    decays: int = 0
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


Report = Callable[[dict[str, Any]], None]


def task_interface(task: Task) -> Interface:
    """Return what a model must read and write for a task."""
    return Interface(task.vocabulary, task.features, task.outputs, task.separator)


def train_steps(task: Task) -> int:
    """Return how many steps the training data have."""
    return sum(len(example.inputs) for example in task.load("train"))


def scored_batches(task: Task, examples: Sequence[Example], size: int = 32) -> Iterator[Batch]:
    """Yield a split so that every step counts once."""
    if task.stream:
        for example in examples:
            columns = scoring_columns(len(example.inputs))
            yield from stream_batches(example, columns, SCORING_PIECE, whole=True)
    else:
        yield from sequence_batches(examples, size, mask_of=task.mask)


def training_batches(
    task: Task, examples: Sequence[Example], config: TrainingConfig, epoch: int = 0
) -> Iterator[Batch]:
    """Yield the batches of an epoch; their order depends on the seed and the epoch alone."""
    if task.stream:
        for example in examples:
            yield from stream_batches(example, config.batch_size, config.piece, whole=False)
    else:
        generator = torch.Generator().manual_seed(1_000_003 * config.seed + epoch)
        yield from sequence_batches(examples, config.batch_size, generator, task.mask)


def batch_count(task: Task, examples: Sequence[Example], config: TrainingConfig) -> int:
    """Return how many batches an epoch has, without padding sequences to find out."""
    if task.stream:
        return sum(1 for _ in training_batches(task, examples, config))
    return -(-len(examples) // config.batch_size)


def losses(task: Task, outputs: Tensor, batch: Batch) -> Tensor:
    """Return the loss in nats of each step that counts, as one flat tensor."""
    loss = task.loss(outputs, batch.targets)
    return loss[batch.mask] if batch.mask is not None else loss.flatten()


def counted(batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden features `(N, H)` and the targets `(N,)` of the steps that count."""
    if batch.mask is not None:
        return hidden[batch.mask], batch.targets[batch.mask]
    return hidden.flatten(0, 1), batch.targets.flatten()


@torch.no_grad()
def score(
    model: SequenceModel, task: Task, batch: Batch, cache: Cache, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Cache]:
    """Return the loss of each step that counts, as one flat tensor, and the next cache."""
    if not task.large_vocabulary:
        outputs, cache = model.advance(batch.inputs, cache)
        return losses(task, outputs, batch), cache
    hidden, cache = model.advance_hidden(batch.inputs, cache)
    hidden, targets = counted(batch, hidden)
    return linear_losses(hidden, model.readout.weight, model.readout.bias, targets, dtype), cache


def training_loss(
    model: SequenceModel,
    task: Task,
    batch: Batch,
    cache: Cache,
    config: TrainingConfig,
    sampler: WordSampler | None = None,
) -> tuple[Tensor, Cache]:
    """Return the mean loss of the steps that count, to be differentiated, and the next cache.

    With a sampler, few rows of the tables of words get gradients: these are sparse, and `OptimizerStep` must take them.
    """
    if not task.large_vocabulary:
        outputs, cache = model.advance(batch.inputs, cache)
        return losses(task, outputs, batch).mean(), cache
    sparse = sampler is not None
    with sparse_embedding(model, sparse):
        hidden, cache = model.advance_hidden(batch.inputs, cache)
    hidden, targets = counted(batch, hidden)
    sample = sampler.draw().to(hidden.device) if sampler else None
    readout, dtype = model.readout, _DTYPES[config.softmax]
    return linear_cross_entropy(hidden, readout.weight, readout.bias, targets, sample, dtype, sparse), cache


@contextmanager
def sparse_embedding(model: SequenceModel, sparse: bool) -> Iterator[None]:
    """Let the words that are read inside have sparse gradients, or dense ones; the model is as it was afterwards."""
    embedding = model.embedding
    if embedding is None or embedding.sparse == sparse:
        yield
        return
    embedding.sparse = sparse
    try:
        yield
    finally:
        embedding.sparse = not sparse


def word_sampler(task: Task, examples: Sequence[Example], config: TrainingConfig) -> WordSampler | None:
    """Return what draws the words that normalise a training step (`None`: all of them do)."""
    if not (task.large_vocabulary and config.sampled_words):
        return None
    return WordSampler(word_counts(task, examples), config.sampled_words)


def word_counts(task: Task, examples: Sequence[Example]) -> Tensor:
    """Return how often each word is a target at the steps that count, `(V,)`."""
    counts = torch.zeros(task.outputs, dtype=torch.int64)
    for example in examples:
        mask = task.mask(example)
        counts += torch.bincount(example.targets if mask is None else example.targets[mask], minlength=task.outputs)
    return counts


@torch.no_grad()
def start_at_frequencies(model: SequenceModel, counts: Tensor) -> None:
    """Set the readout's biases to the logarithms of the words' frequencies: `b_j = log(n_j / Σ n)`, with n_j >= 1.

    A model that knows nothing yet then predicts these frequencies, rather than spend its first steps on finding them.
    """
    counts = counts.clamp(min=1).double()
    model.readout.bias.copy_((counts / counts.sum()).log())


class Scores(NamedTuple):
    """How a model does on a split: its mean loss in nats a step that counts, and the metric of the task."""

    loss: float
    metric: float

    def named(self, split: Split) -> dict[str, float]:
        """Return both as they stand in logs and results."""
        return {f"{split}_{name}": value for name, value in self._asdict().items()}


def evaluate(
    model: SequenceModel, task: Task, examples: Sequence[Example], dtype: torch.dtype = torch.float32
) -> float:
    """Return the mean loss in nats a step that counts, in evaluation mode; `dtype` is that of a large softmax."""
    return assess(model, task, examples, dtype).loss


@torch.no_grad()
def assess(model: SequenceModel, task: Task, examples: Sequence[Example], dtype: torch.dtype = torch.float32) -> Scores:
    """Return mean loss and metric, in evaluation mode; `dtype` is that of a large softmax."""
    training = model.training
    model.eval()
    total, steps, cache = 0.0, 0, None
    answers: list[tuple[Tensor, Tensor]] = []
    for batch in scored_batches(task, examples):
        batch = batch.to(model.device)
        if batch.fresh or cache is None:
            cache = model.init_cache(batch.inputs.shape[0])
        if task.metric.of_predictions and not task.writes:
            outputs, cache = model.advance(batch.inputs, cache)
            found = losses(task, outputs, batch)
            answers += _answers(outputs, batch)
        else:
            found, cache = score(model, task, batch, cache, dtype)
        total += float(found.double().sum())
        steps += batch.steps
    loss = total / steps
    if task.writes:
        metric = task.judge_written(partial(beam_search, model), examples)
    else:
        metric = task.judge(*zip(*answers, strict=True)) if answers else task.metric.of(loss)
    model.train(training)
    return Scores(loss, metric)


def _answers(outputs: Tensor, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Return, for each sequence of a batch, what is predicted at the steps that count and what is right there."""
    predicted, wanted = outputs.argmax(-1).cpu(), batch.targets.cpu()
    if batch.mask is None:
        return list(zip(predicted, wanted, strict=True))
    return [(p[m], w[m]) for p, w, m in zip(predicted, wanted, batch.mask.cpu(), strict=True)]


class TrainingRun:
    """A model being trained on a task; with a folder, interrupted at any moment it resumes to the same weights.

    Bit for bit holds on the same machine with the same number of threads. The folder holds `config.json` and
    `model.safetensors` (the weights of the best epoch on validation data), `training.safetensors` (present weights,
    optimizer, generator, carried state) and `log.jsonl`.
    """

    def __init__(
        self,
        task: Task,
        model_name: str,
        settings: Settings,
        config: TrainingConfig,
        folder: Path | None = None,
        device: str | torch.device = "cpu",
        checkpoint_steps: int = 500,
    ):
        self.task, self.model_name, self.settings, self.config = task, model_name, settings, config
        self.folder = Path(folder) if folder is not None else None
        self.device = find_device(device)
        self.checkpoint_steps = checkpoint_steps
        self.progress = Progress()
        self.digest, self.scales = task.digest(), task.scales
        self.cache: tuple[Tensor, ...] | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What to build and how it was trained: the contents of `config.json`."""
        return {
            "task": self.task.name,
            "data": self.digest,
            "model": self.model_name,
            "interface": task_interface(self.task)._asdict(),
            "settings": self.settings,
            "training": asdict(self.config),
            **({} if self.scales is None else {"scales": self.scales}),
        }

    def run(self, report: Report | None = None) -> SequenceModel:
        """Train to the end (or from where an earlier run stopped); return the best model, in evaluation mode."""
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            self._prepare()
            if not self.progress.finished:
                self._train(report)
            self.model.load_state_dict(self.best)
            return self.model.eval()

    def _train(self, report: Report | None) -> None:
        self.board = open_board(self.folder, self.progress.step)
        try:
            while not self.progress.finished:
                self._run_epoch(report)
                self._end_epoch(report)
        finally:
            if self.board is not None:
                self.board.close()

    def _prepare(self) -> None:
        self.model = build_model(self.model_name, task_interface(self.task), self.settings).to(self.device)
        self.examples: dict[Split, Sequence[Example]] = {s: self.task.load(s) for s in ("train", "valid")}
        if self.config.frequency_bias and self.task.large_vocabulary:
            start_at_frequencies(self.model, word_counts(self.task, self.examples["train"]))
        self.optimizer = make_optimizer(self.model, self.config)
        self.optimize = OptimizerStep(self.optimizer, self.config.clip_norm)
        self.best = _copied(self.model.state_dict())
        self.sampler = word_sampler(self.task, self.examples["train"], self.config)
        batches = batch_count(self.task, self.examples["train"], self.config)
        self.steps = max(1, round(self.config.epochs * batches))
        if self.folder is not None:
            make_folder(self.folder)
            if (self.folder / TRAINING).exists():
                self._restore()
            self._rewrite_log()

    def _epoch_batches(self, epoch: int) -> Iterator[Batch]:
        return training_batches(self.task, self.examples["train"], self.config, epoch)

    def _run_epoch(self, report: Report | None) -> None:
        progress = self.progress
        self.model.train()
        for index, batch in enumerate(self._epoch_batches(progress.epoch)):
            if index < progress.batch:
                continue
            if progress.step >= self.steps:
                break
            began = time.perf_counter()
            loss = self._train_on(batch.to(self.device))
            progress.batch, progress.step = index + 1, progress.step + 1
            progress.tokens += batch.tokens
            progress.loss_sum += loss * batch.steps
            progress.loss_steps += batch.steps
            progress.seconds += time.perf_counter() - began
            if report:
                report(self._state_of_play())
            self._save_now_and_then()

    def _train_on(self, batch: Batch) -> float:
        if batch.fresh or self.cache is None:
            self.cache = self.model.init_cache(batch.inputs.shape[0])
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate() * group.get("factor", 1.0)
        loss, cache = training_loss(self.model, self.task, batch, self.cache, self.config, self.sampler)
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(
                f"the training loss of {self.model_name!r} became {value} at step {self.progress.step}:"
                " lower the learning rate or clip_norm"
            )
        self.optimize(loss)
        self.model.project()
        self.cache = tuple(part.detach() for part in cache)
        return value

    def learning_rate(self) -> float:
        """Return the learning rate of the next step, a function of the progress alone."""
        rate = self.config.learning_rate
        if self.config.schedule == "cosine":
            done = self.progress.step / self.steps
            return rate * 0.5 * (1 + math.cos(math.pi * done))
        return rate * 0.25**self.progress.decays

    def _end_epoch(self, report: Report | None) -> None:
        progress = self.progress
        self.model.settle()
        valid = assess(self.model, self.task, self.examples["valid"], _DTYPES[self.config.softmax])
        named = valid.named("valid")
        best = min(map(self.task.criterion, progress.history), default=math.inf)
        if self.task.criterion(named) < best:
            progress.best_loss, progress.best_epoch, progress.worse_epochs = valid.loss, progress.epoch + 1, 0
            self.best = _copied(self.model.state_dict())
        else:
            progress.worse_epochs += 1
            progress.decays += self.config.schedule == "plateau"
        record = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "train_loss": progress.loss_sum / progress.loss_steps,
            **named,
            "learning_rate": self.learning_rate(),
            "seconds": round(progress.seconds, 3),
        }
        progress.history.append(record)
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.loss_sum, progress.loss_steps = 0.0, 0
        patience = self.config.patience
        tired = patience is not None and progress.worse_epochs >= patience
        progress.finished = tired or progress.step >= self.steps
        self._log(record)
        if progress.finished:
            self._save()
        if report:
            report({**self._state_of_play(), "loss": record["train_loss"]})

    def _state_of_play(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "model": self.model_name,
            "fraction": progress.step / self.steps,
            "loss": progress.loss_sum / max(1, progress.loss_steps),
            "tokens_per_s": progress.tokens / max(1e-9, progress.seconds),
            "finished": progress.finished,
        }

    def _save_now_and_then(self) -> None:
        """Write a checkpoint every so many steps, and go on from what was written.

        Layers that keep themselves stable may touch their weights when these are read out and when they are loaded. An
        uninterrupted run must do both at the same steps as one that resumes: by count, and not by the clock.
        """
        if self.progress.step % self.checkpoint_steps == 0:
            self._save()
            self.model.load_state_dict(_copied(self.model.state_dict()))

    def _save(self) -> None:
        if self.folder is None:
            return
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        tensors |= {f"cache.{i}": part for i, part in enumerate(self.cache or ())}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items() if torch.is_tensor(v)}
        tensors["generator"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["generator_cuda"] = torch.cuda.get_rng_state(self.device)
        # The model first: a run is finished only when its model is there.
        save_model(self.folder, self.best, {**self.about, "parameters": parameter_count(self.model)})
        save_tensors(self.folder / TRAINING, tensors, {**self.about, "progress": asdict(self.progress)})

    def _restore(self) -> None:
        assert self.folder is not None
        tensors, about = load_tensors(self.folder / TRAINING)
        progress = about.pop("progress")
        if _with_defaults(about) != _with_defaults(json.loads(json.dumps(self.about))):
            raise InputError(f"{self.folder} holds a run with other settings: name another folder, or delete it")
        self.progress = Progress(**progress)
        self.model.load_state_dict(_below("model.", tensors))
        self.best = _below("best.", tensors)
        cache = _below("cache.", tensors)
        self.cache = tuple(cache[str(i)].to(self.device) for i in range(len(cache))) or None
        self.optimizer.load_state_dict(
            {**self.optimizer.state_dict(), "state": _optimizer_state(_below("optimizer.", tensors))}
        )
        torch.set_rng_state(tensors["generator"])
        if "generator_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["generator_cuda"], self.device)

    def _rewrite_log(self) -> None:
        """Drop the lines an interrupted run logged after its last checkpoint: they are made again."""
        assert self.folder is not None
        write_text(self.folder / LOG, "".join(json.dumps(r) + "\n" for r in self.progress.history))

    def _log(self, record: dict[str, float]) -> None:
        if self.folder is None:
            return
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        if self.board is not None:
            for name in ("train_loss", "valid_loss", "valid_metric", "learning_rate"):
                self.board.add_scalar(name, record[name], int(record["step"]))


def open_board(folder: Path | None, step: int) -> Any:
    """Return a TensorBoard writer for a run that stands at `step`, or `None` where there is no folder or no package."""
    if folder is None or importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def find_device(name: str | torch.device) -> torch.device:
    """Return the device of that name; one that is not there is an `InputError`."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"unknown device {name!r}: write cpu, cuda, or cuda:1") from error
    try:  # only torch knows what it can compute on here, and it has no one error for what it cannot
        torch.ones((), device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise InputError(f"the device {str(device)!r} cannot be used here ({reason}): train on cpu") from error
    return device


def make_optimizer(model: torch.nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a configuration, in torch's fused form."""
    groups = _parameter_groups(model, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def _parameter_groups(model: torch.nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Return the parameters as an optimizer takes them; recurrent layers apart, if they learn or decay otherwise.

    An optimizer that divides by the size of gradients moves each weight by about the learning rate: a row of a table
    of words may move as much, where a state that is read H times over may not.
    """
    factor, decay = config.recurrent_learning_rate_factor, config.recurrent_weight_decay
    own = {} if factor == 1 else {"lr": config.learning_rate * factor, "factor": factor}
    own |= {} if decay is None else {"weight_decay": decay}
    if not own:
        return [{"params": list(model.parameters())}]
    try:
        layers = find_recurrent(model)
    except InputError as error:
        raise InputError(
            f"recurrent_learning_rate_factor and recurrent_weight_decay must be left out for {type(model).__name__}:"
            f" {error}"
        ) from error
    apart = {parameter for _, layer in layers for parameter in layer.parameters()}
    return [
        {"params": [p for p in model.parameters() if p not in apart]},
        {"params": [p for p in model.parameters() if p in apart], **own},
    ]


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _with_defaults(about: dict[str, Any]) -> dict[str, Any]:
    """What a run is about, with the fields that came to be after it was begun: those do what was done before."""
    interface = {**Interface._field_defaults, **about["interface"]}
    return {**about, "interface": interface, "training": with_defaults(about["training"])}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _optimizer_state(flat: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    return state
