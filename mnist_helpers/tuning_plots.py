"""What a search has found: the table of its runs, and its figures."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from optuna.trial import TrialState

from mnist_helpers.plots import BLUE, GREEN, GREY, ORANGE, make_axes, spread_accuracies
from mnist_helpers.runs import Run, format_knob, list_runs

KINDS = {  # of runs, and how their points are drawn: by shape and colour
    "ran to its end": {"marker": "o", "color": BLUE, "s": 28},
    "pruned": {"marker": "x", "color": GREY, "s": 28},
    "mine": {"marker": "D", "color": GREEN, "s": 36, "zorder": 3},
    "best": {"marker": "*", "color": ORANGE, "s": 170, "zorder": 4},
}
LOG_KNOBS = ("learning rate", "weight decay")


@dataclass(frozen=True, repr=False)
class RunsTable:
    """Runs as a plain HTML table in a notebook, as text elsewhere; the first is the best."""

    runs: Sequence[Run]

    def make_rows(self) -> list[list[str]]:
        """The heading and one row for each run, with the knobs that are not the same in all of them."""
        varied = [knob for knob, values in self._collect_knobs().items() if len(set(values)) > 1]
        rows = [["rank", "run", "accuracy", "seconds", *varied, "ended early"]]
        for rank, run in enumerate(self.runs, start=1):
            accuracy = f"{run.accuracy:.2%}" if run.accuracies else "-"
            knobs = [format_knob(run.knobs[knob]) for knob in varied]
            rows.append([str(rank), run.name, accuracy, f"{run.seconds:.1f}", *knobs, run.reason])
        return rows

    def describe_rest(self) -> str:
        """The knobs that are the same in all runs."""
        same = {knob: values[0] for knob, values in self._collect_knobs().items() if len(set(values)) == 1}
        return f"The same in all: {', '.join(f'{knob} {value}' for knob, value in same.items())}."

    def _collect_knobs(self) -> dict[str, list[str]]:
        knobs = self.runs[0].knobs if self.runs else {}
        return {knob: [format_knob(run.knobs[knob]) for run in self.runs] for knob in knobs}

    def _repr_html_(self) -> str:
        head, *body = [[html.escape(cell) for cell in row] for row in self.make_rows()]
        body[:1] = [[f"<b>{cell}</b>" for cell in row] for row in body[:1]]
        lines = ["".join(f"<th>{cell}</th>" for cell in head)]
        lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
        table = "\n".join(f"<tr>{line}</tr>" for line in lines)
        style = "white-space: nowrap; font-size: 80%"  # many columns: rather scrolled sideways than torn
        return f'<table style="{style}">\n{table}\n</table>\n<p>{html.escape(self.describe_rest())}</p>'

    def __repr__(self) -> str:
        rows = self.make_rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, self.describe_rest()])


def runs_table(study: optuna.Study) -> RunsTable:
    """All runs of the study, the tuner's and the reader's, best first."""
    return RunsTable(list_runs(study))


def plot_runs(study: optuna.Study) -> Figure:
    """The learning curves of all runs; a cross marks where one was pruned."""
    figure, ax = make_axes()
    runs = _list_trained(study)
    for rank, run in enumerate(runs):
        epochs, errors = range(1, len(run.accuracies) + 1), [_error(accuracy) for accuracy in run.accuracies]
        colour = KINDS[_kind(run, rank)]["color"]
        bold = rank == 0 or run.name.startswith("mine")
        ax.plot(epochs, errors, color=colour, linewidth=2.5 if bold else 1, zorder=3 if bold else 1)
    _scatter(ax, runs, [len(run.accuracies) for run in runs])
    best = f"; the best, {runs[0].name}, ends at {runs[0].accuracy:.2%}" if runs else ""
    ax.set(title=f"Learning curves of {len(runs)} runs{best}", xlabel="epoch", ylabel="validation accuracy")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    spread_accuracies(ax, [accuracy for run in runs for accuracy in run.accuracies])
    _show_legend(ax)
    return figure


def plot_knobs(study: optuna.Study) -> Figure:
    """The accuracy of every run against its knobs: a panel for each knob that is not the same in all runs."""
    runs = _list_trained(study)
    names = _split_shape(runs[0]) if runs else []
    columns = {name: [_split_shape(run)[name] for run in runs] for name in names}
    varied = {name: values for name, values in columns.items() if len(set(values)) > 1}
    rows = max(1, -(-len(varied) // 4))
    figure, axes = make_axes(rows, 4, (9, 0.5 + 2.1 * rows), sharey=True, squeeze=False)
    for ax in axes.flat[len(varied) :]:
        ax.axis("off")
    for ax, (name, values) in zip(axes.flat, varied.items(), strict=False):
        if isinstance(values[0], float) or len(set(values)) > 6:
            if name in LOG_KNOBS and max(values) > 0:  # logarithmic as far as 0 allows
                ax.set_xscale("symlog", linthresh=min(value for value in values if value > 0))
        else:  # a few choices: side by side at the same distance
            choices = sorted(set(values))
            ax.set_xticks(range(len(choices)), choices)
            ax.set_xlim(-0.5, len(choices) - 0.5)
            values = [choices.index(value) for value in values]
        _scatter(ax, runs, values)
        ax.set_xlabel(name)
    spread_accuracies(axes[0, 0], [accuracy for run in runs for accuracy in run.accuracies])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper right", ncols=4, fontsize=9)
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy")
    figure.suptitle("Validation accuracy of all runs against their knobs", x=0.01, ha="left", fontsize=12)
    return figure


def plot_seconds(study: optuna.Study) -> Figure:
    """The accuracy of every run against the time it took; the line is the best to be had in that time."""
    figure, ax = make_axes()
    runs = _list_trained(study)
    _scatter(ax, runs, [run.seconds for run in runs])
    quickest_first = sorted(runs, key=lambda run: run.seconds)
    least = list(accumulate((_error(run.accuracy) for run in quickest_first), min))
    ax.step(
        [run.seconds for run in quickest_first], least, where="post", color="black", linewidth=1, zorder=0
    )
    ax.set(title="What accuracy costs: the line is the best to be had in that time")
    ax.set(xlabel="seconds of training", ylabel="validation accuracy")
    ax.set_xlim(left=0)
    spread_accuracies(ax, [accuracy for run in runs for accuracy in run.accuracies])
    _show_legend(ax)
    return figure


def plot_importance(study: optuna.Study, seed: int = 0) -> Figure:
    """How much of the differences in accuracy each knob explains, by functional ANOVA (Hutter et al. 2014).

    It can only look at the tuner's trials that ran to their end; there must be two at least.
    """
    ended = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    shares = {}
    if len({trial.value for trial in ended}) > 1:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    figure, ax = make_axes()
    bars = ax.barh([knob.replace("_", " ") for knob in shares], list(shares.values()), color=BLUE)
    ax.bar_label(bars, fmt="{:.0%}", padding=3)
    ax.set(title=f"Which knobs matter, judged by the {len(ended)} trials that ran to their end")
    ax.set(xlabel="share of the differences in accuracy", xlim=(0, 1))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return figure


def _list_trained(study: optuna.Study) -> list[Run]:
    """The runs with at least one complete epoch, best first."""
    return [run for run in list_runs(study) if run.accuracies]


def _split_shape(run: Run) -> dict:
    """The run's knobs with the list of widths taken apart, since a plot needs single values."""
    knobs = {name.replace("_", " "): value for name, value in run.knobs.items()}
    hidden = knobs.pop("hidden")
    return {"hidden layers": len(hidden), "first width": hidden[0], "last width": hidden[-1]} | knobs


def _kind(run: Run, rank: int) -> str:
    """Which of `KINDS` the run is."""
    if rank == 0:
        return "best"
    if run.name.startswith("mine"):
        return "mine"
    return "ran to its end" if run.state == "complete" else "pruned"


def _error(accuracy: float) -> float:
    """The fraction of wrong answers; never 0, which a logarithmic axis cannot show."""
    return max(1 - accuracy, 0.001)


def _scatter(ax, runs: Sequence[Run], places: Sequence[float]) -> None:
    """A point for each run at `places`, at the height of its last accuracy."""
    for kind, style in KINDS.items():
        ranks = [rank for rank, run in enumerate(runs) if _kind(run, rank) == kind]
        if ranks:
            heights = [_error(runs[rank].accuracy) for rank in ranks]
            ax.scatter([places[rank] for rank in ranks], heights, label=kind, **style)


def _show_legend(ax) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="lower right", fontsize=9)
