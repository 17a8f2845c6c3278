"""What `python -m xmc_jax.main` does, mode by mode; each returns the exit code."""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from xmc_jax.config import LabelsConfig, NewLabelsConfig, PredictConfig, RunConfig, ServeConfig
from xmc_jax.data import image_import, image_vectors, prepare
from xmc_jax.data.store import Store
from xmc_jax.files import atomic, workdirs
from xmc_jax.planning import summary
from xmc_jax.reporting import page, workdir_contents
from xmc_jax.retrieval import evaluate, exact, scann, tuned, tuning
from xmc_jax.retrieval.evaluate import Evaluation
from xmc_jax.runtime import distributed, metrics_log
from xmc_jax.runtime.wording import counted
from xmc_jax.shipping import artifact, contents, documents, exporting, labels
from xmc_jax.shipping import predict_files as prediction_files
from xmc_jax.shipping.serve import start as serving
from xmc_jax.training import build, loop
from xmc_jax.training.run import Run
from xmc_jax.training.state import TrainState

_ROWS = {"plain": "trained", "augmented": "trained + augmented"}
_OF_FOLDER = (("encoder", "pooling"), ("fusion", "prefix"), ("fusion", "label_prefix"))
_FAILED, _BY_SIGNAL = 1, 128  # exit codes; of a signal, its number more


@dataclasses.dataclass(frozen=True)
class Invocation:
    """What the flags ask for.

    Attributes:
        config: of the run; None where an exported model is named instead.
        workdir: where the run lives.
        step: which checkpoint: "latest", "best" or a step's number.
        topology: of the mode plan.
        recipe: the config before flags changed it; None without one.
        artifact: an exported folder; None for the workdir's own.
        input: of the mode predict, see `inference.files.predict`.
        output: likewise.
        overwrite: of the modes predict and export, see `export.replacing.replaced`.
        predict: likewise.
        labels: of the mode labels.
        serve: of the mode serve.
        profile: of the mode train, the first and the last step to trace, from 1; None for none.
    """

    config: RunConfig | None
    workdir: epath.Path
    recipe: RunConfig | None = None
    step: str = "latest"
    topology: str = "cpu"
    artifact: str | None = None
    input: str | None = None
    output: str | None = None
    overwrite: bool = False
    predict: PredictConfig = dataclasses.field(default_factory=PredictConfig)
    labels: LabelsConfig = dataclasses.field(default_factory=LabelsConfig)
    serve: ServeConfig = dataclasses.field(default_factory=ServeConfig)
    profile: tuple[int, int] | None = None


def run(mode: str, invocation: Invocation) -> int:
    """Does what a mode is for, and prints what there is to say.

    Args:
        mode: see `xmc_jax.main`.
        invocation: see `Invocation`.

    Returns:
        The exit code.

    Raises:
        ValueError: one line on what is wrong.
    """
    if invocation.config is not None and mode not in ("predict", "labels", "serve"):
        invocation = _filled(invocation)  # other modes need an exported model and no backbone
    if mode in ("export", "predict", "labels", "serve") and jax.process_count() > 1:
        raise ValueError(
            f"--mode={mode}: expected one process, got {jax.process_count()}; one reads the "
            "checkpoints of many: --distributed=off"
        )
    whole = {
        "plan": _plan,
        "prepare": _prepare,
        "train": _train,
        "tune": _tune,
        "report": _report,
        "predict": _predict,
        "labels": _labels,
        "serve": _serve,
    }
    if mode in whole:
        return whole[mode](invocation)
    of_checkpoint = {
        "evaluate": _evaluate,
        "embed": _embed,
        "index": _index,
        "export": _export,
    }
    of_checkpoint[mode](invocation, *_restored(invocation))
    return 0


def _filled(invocation: Invocation) -> Invocation:
    """The same with the fields that the config leaves to the backbone's folder; they are logged."""
    config, recipe = invocation.config, invocation.recipe
    said = distributed.first_then_others("backbone", lambda: build.modules(config))
    if distributed.is_first():
        for line in build.differences(config, said):
            logging.info("%s", line)
    whole = build.filled(config, said)
    for section, name in _OF_FOLDER:
        left = getattr(getattr(config, section), name) is None
        if left and recipe is not None and getattr(getattr(recipe, section), name) is None:
            value = getattr(getattr(whole, section), name)  # no flag changed it
            recipe = recipe.replace(**{section: {name: value}})
    return dataclasses.replace(invocation, config=whole, recipe=recipe)


def _plan(invocation: Invocation) -> int:
    """Prints what a run needs on a topology; fails if there is not enough."""
    text, fits = summary.make(invocation.config, invocation.topology)
    print(text)
    return 0 if fits else _FAILED


def _prepare(invocation: Invocation) -> int:
    """Prints what is in the folders; of known datasets the shares of items with images must fit."""
    data = build.data(invocation.config)
    print(prepare.report(data.folder))
    if data.images is not None:
        print(image_vectors.report(data.images.folder))
        image_import.check_shares(data.name, data.images.shares)
    return 0


def _train(invocation: Invocation) -> int:
    """Trains, the baseline of the config first if it has one; reports them side by side."""
    workdir = invocation.workdir
    rows: dict[str, Any] = {}
    runs = [("", workdir, invocation.config, invocation.recipe)]
    if invocation.config.baseline:
        name, configs = invocation.config.baseline["name"], (invocation.config, invocation.recipe)
        runs.insert(0, (name, workdir / "baseline", *(one and one.compared() for one in configs)))
    with contextlib.ExitStack() as stack:
        for _, folder, _, _ in reversed(runs):
            stack.enter_context(workdirs.locked(folder))
        for name, folder, config, recipe in runs:
            run = _begun(config, folder)
            logging.info("%s: %s", folder, name or config.name)
            try:
                trained = loop.train(run, folder, invocation.profile)
            except loop.Interrupted as interrupted:
                return _interrupted(interrupted)
            logging.info("%s: %s", folder, metrics_log.format_seconds(trained.seconds))
            zero_shot = {"zero-shot": trained.zero_shot} if trained.zero_shot else {}
            table = _write(folder, trained.step, zero_shot, trained.evaluation)
            if distributed.is_first():
                workdir_contents.write_facts(folder, trained.seconds)
                page.write(
                    folder,
                    run.data,
                    evaluation=trained.evaluation,
                    recipe=recipe and dataclasses.asdict(recipe),
                    pictures=build.pictures(config),
                )
            if folder == workdir:  # printed last: standard output may be closed by now
                _show(folder, trained.step, table, trained.evaluation, run.data, rows)
            rows |= {f"{name}: {row}": metrics for row, metrics in table.items()}
    return 0


def _report(invocation: Invocation) -> int:
    """Writes report.html again, from what the workdir holds."""
    workdirs.read_config(invocation.workdir)  # an absent run is answered before anything is loaded
    data = build.data(invocation.config)
    if distributed.is_first():
        pictures = build.pictures(invocation.config)
        recipe = invocation.recipe and dataclasses.asdict(invocation.recipe)
        path = page.write(invocation.workdir, data, recipe=recipe, pictures=pictures)
        print(f"wrote {path}")
    return 0


def _tune(invocation: Invocation) -> int:
    """Chooses weights on validation documents; trains a run without these if there is none.

    The run of the workdir itself is without them if the data name them, or if its config holds some
    out; otherwise another run is trained in `tune`, without the documents drawn for it.
    """
    config, folder = invocation.config, invocation.workdir
    # The choice starts from the config's own settings.
    augmented = dataclasses.replace(config.eval.augmented, weights="config")
    held_out = config.replace(eval={"augmented": augmented, "compare_scann": False})
    if not config.data.validation_fraction and not build.names_validation(config):
        share = config.tune.validation_fraction
        held_out, folder = held_out.replace(data={"validation_fraction": share}), folder / "tune"
    with workdirs.locked(folder):
        run = _begun(held_out, folder)
        if not loop.is_finished(run, folder):
            logging.info("%s: training without the validation documents", folder)
            try:
                trained = loop.train(run, folder)
            except loop.Interrupted as interrupted:
                return _interrupted(interrupted)
            logging.info("%s: %s", folder, metrics_log.format_seconds(trained.seconds))
        step, state = loop.restore(run, folder, invocation.step)
        choice = run.tune(state)
    if choice is not None:
        path = tuned.write(invocation.workdir, choice, config, run.data)
        print(f"{tuning.report(choice, config.tune)}\n\nstep {step} of {folder}; in {path}")
    return 0


def _interrupted(interrupted: loop.Interrupted) -> int:
    logging.info("%s", interrupted)
    return _BY_SIGNAL + interrupted.signum


def _begun(config: RunConfig, folder: epath.Path) -> Run:
    """The run of a config, whose folder it is from now on, if it may be."""
    run, fields = _opened_run(config, folder)
    workdirs.check_config(folder, fields, new=True)
    distributed.barrier("config compared")
    workdirs.write_config(folder, fields)
    distributed.barrier("config written")
    workdirs.check_config(folder, fields, new=False)  # fails where others see no such folder
    return run


def _opened_run(config: RunConfig, folder: epath.Path) -> tuple[Run, dict[str, Any]]:
    """The run of a config, and the content of its config.json."""
    run = build.run(config, workdir=folder)
    provenance = run.provenance()
    distributed.agree("provenance", provenance)
    return run, dataclasses.asdict(config) | {"provenance": provenance}


def _restored(invocation: Invocation) -> tuple[Run, int, TrainState]:
    """The run in the workdir, and a checkpoint of it: its step and its state."""
    workdirs.read_config(invocation.workdir)  # an absent run is answered before anything is loaded
    run, fields = _opened_run(invocation.config, invocation.workdir)
    workdirs.check_config(invocation.workdir, fields, new=False)
    return run, *loop.restore(run, invocation.workdir, invocation.step)


def _evaluate(invocation: Invocation, run: Run, step: int, state: TrainState) -> None:
    # Apart from what training left: the settings may be others.
    workdir, evaluation = invocation.workdir / "evaluate", run.evaluate(state)
    _show(workdir, step, _write(workdir, step, {}, evaluation), evaluation, run.data)


def _embed(invocation: Invocation, run: Run, step: int, state: TrainState) -> None:
    folder = invocation.workdir / "embeddings" / str(step)
    for split in ("test", "train"):
        run.embed_to(state.params, split, folder / f"{split}.npy")
    run.embed_index_to(state, folder / "label.npy")
    print(f"wrote test.npy, train.npy and label.npy to {folder}")


def _index(invocation: Invocation, run: Run, step: int, state: TrainState) -> None:
    labels, folder = exact.to_host(run.embed_index(state)), invocation.workdir / "index" / str(step)
    documents = run.embed(state.params, "test")
    if distributed.is_first():
        config = run.config.eval
        k = min(config.k, len(labels))
        scann.ScannIndex.build(labels, config.scann, documents[1::2], k).save(folder)
        index = scann.ScannIndex.load(folder, labels)
        measured = scann.compare(index, labels, documents[::2], k)
        print(f"wrote {folder}\n{evaluate.format_index({'labels': measured})}")


def _export(invocation: Invocation, run: Run, step: int, state: TrainState) -> None:
    if run.config.export.format == "adapter":
        folder = exporting.encoder(run, state, invocation.workdir, invocation.overwrite)
    else:
        folder = exporting.whole(run, step, state, invocation.workdir, invocation.overwrite)
    print(f"wrote {folder}")


def _predict(invocation: Invocation) -> int:
    """Ranks labels for the documents of a file; what there is to say goes to standard error."""
    opened = _opened(invocation)
    report = prediction_files.predict(
        opened, invocation.predict, invocation.input, invocation.output, invocation.overwrite
    )
    print(f"{invocation.output}: {report}", file=sys.stderr)
    return 0


def _labels(invocation: Invocation) -> int:
    """Changes the labels of an exported model."""
    config, opened = (
        invocation.labels,
        _opened(invocation, verify=False),
    )  # verified when it is changed
    if not (config.add or config.update or config.remove):
        raise ValueError(
            "--mode=labels: expected a file of labels in --labels.add, --labels.update or "
            "--labels.remove, got none"
        )
    read = {
        name: list(
            documents.labels(
                path, opened.model, config.columns, config.delimiter, config.allow_paths
            )
        )
        for name, path in (("add", config.add), ("update", config.update))
        if path
    }
    lines = documents.ids_of(config.remove) or {}
    places = {uid: f"{config.remove}:{line}" for uid, line in lines.items()}
    changes = labels.LabelChanges(**read, remove=list(lines), remove_at=places)
    how = {} if config.how == "auto" else {"how": config.how}
    changed = labels.change(opened.folder, changes, NewLabelsConfig(**how), config.out or None)
    recall = "" if changed.recall is None else f"; the index finds {changed.recall:.2%}"
    print(
        f"{config.out or opened.folder}: {counted(changed.added, 'label')} added, "
        f"{changed.borrowing:,} of them by the documents of similar trained labels, "
        f"{changed.updated:,} updated, {changed.removed:,} removed; {changed.labels:,} now{recall}"
    )
    return 0


def _serve(invocation: Invocation) -> int:
    """Answers queries over HTTP until it is told to end."""
    # It is verified when it is opened to be served.
    serving.run(lambda: _opened(invocation, verify=False).folder, invocation.serve)
    return 0


def _opened(invocation: Invocation, verify: bool = True) -> artifact.Artifact:
    """The artifact that was asked for; exports the checkpoint first if the workdir has none."""
    folder = invocation.artifact or str(invocation.workdir / "export")
    if atomic.is_remote(folder):
        raise ValueError(f"{folder}: expected a local folder; copy it here and name it --artifact")
    if invocation.artifact:
        return artifact.open(folder, verify)
    if not (epath.Path(folder) / contents.MANIFEST).exists():
        invocation = _filled(invocation)
        run, step, state = _restored(invocation)
        logging.info("%s: no exported model yet; exporting step %d", folder, step)
        exporting.whole(run, step, state, invocation.workdir)
        return artifact.open(folder, verify)
    opened = artifact.open(folder, verify)
    if (invocation.workdir / "checkpoints").exists():
        wanted = loop.find(invocation.workdir, invocation.step)
        if opened.step != wanted:
            logging.warning(
                "%s: exported at step %d, and the checkpoint asked for (%s) is of step %d; "
                "--mode=export makes it anew",
                folder,
                opened.step,
                invocation.step,
                wanted,
            )
    return opened


def _write(
    workdir: epath.Path, step: int, rows: dict[str, Any], evaluation: Evaluation
) -> dict[str, Any]:
    """Writes metrics.json and predictions/<step>.npz; returns `rows` and the evaluation's."""
    if distributed.is_first():
        evaluate.write(
            evaluation, workdir / "metrics.json", workdir / "predictions" / f"{step}.npz", rows
        )
    return rows | {_ROWS[kind]: metrics for kind, metrics in evaluation.metrics.items()}


def _show(
    workdir: epath.Path,
    step: int,
    rows: Mapping[str, Any],
    evaluation: Evaluation,
    data: Store,
    baseline: Mapping[str, Any] | None = None,
) -> None:
    """Prints which images there are and the tables, the rows of the baseline first."""
    side_by_side = rows
    if data.images is not None:
        print(f"{image_vectors.report(data.images.folder)}\n")
    if baseline:
        name = f"text + {data.images.encoder}"
        side_by_side = baseline | {f"{name}: {row}": metrics for row, metrics in rows.items()}
    print(evaluate.format_table(side_by_side))
    print()
    print(evaluate.format_full_table(rows))
    if evaluation.index:
        print()
        print(evaluate.format_index(evaluation.index))
    cut = {split: count for split, count in prepare.cut_texts(data.folder).items() if count}
    if cut:
        counts = ", ".join(f"{count:,} {split}" for split, count in cut.items())
        print(f"\ntexts of more than {counted(data.max_length, 'token')}, which were cut: {counts}")
    print(f"\nstep {step}; the same in {workdir / 'metrics.json'}")
