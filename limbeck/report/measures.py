"""What the measures in a result are called, which way is better, and how their values and differences are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, Literal

from limbeck.report.numbers import ABSENT, digits, finite, human_bytes, human_count, human_seconds, percent, times

Kind = Literal["percent", "number", "count", "bytes", "seconds", "ratio"]
Better = Literal["higher", "lower"]

_WRITE = {
    "percent": percent,
    "number": digits,
    "count": human_count,
    "bytes": human_bytes,
    "seconds": human_seconds,
    "ratio": digits,
}
_LESS_MORE = {"count": ("fewer", "more"), "bytes": ("smaller", "larger"), "seconds": ("faster", "slower")}


@dataclass(frozen=True)
class Measure:
    """One measure as it is shown."""

    name: str
    label: str
    kind: Kind = "number"
    better: Better | None = None
    group: str = "other measures"

    def text(self, value: Any) -> str:
        """The value with its unit; ``n/a`` for what is no finite number."""
        number = finite(value)
        return ABSENT if number is None else _WRITE[self.kind](number)

    def difference(self, value: float | None) -> str:
        """A signed difference of two values: +1.2 points, -0.0313."""
        number = finite(value)
        if number is None:
            return ABSENT
        if self.kind == "percent":
            return f"{_sign(f'{100 * number:.1f}')} points"
        return _sign(_WRITE[self.kind](number))

    def interval(self, low: float | None, high: float | None) -> str:
        """The ends of an interval of a difference, without unit: [+0.4, +2.0]."""
        ends = [finite(low), finite(high)]
        widest = max((abs(e) for e in ends if e is not None), default=0.0)
        return f"[{', '.join(ABSENT if e is None else _sign(self._beside(e, widest)) for e in ends)}]"

    def spread(self, values: Sequence[Any]) -> str:
        """Mean ± standard deviation; the mean alone for one value."""
        numbers = [v for v in map(finite, values) if v is not None]
        if len(numbers) < 2:
            return self.text(numbers[0] if numbers else None)
        mean, deviation = fmean(numbers), stdev(numbers)
        unit = " %" if self.kind == "percent" else ""
        return f"{self._beside(mean, abs(mean))} ± {self._beside(deviation, abs(mean))}{unit}"

    @property
    def scale(self) -> float | None:
        """What tick labels multiply values by; None where :meth:`text` must write them."""
        return {"percent": 100.0, "number": 1.0, "ratio": 1.0}.get(self.kind)

    def axis(self, *, difference: bool = False) -> str:
        """The label of an axis with this measure, or with differences of it."""
        unit = f", {'points' if difference else '%'}" if self.kind == "percent" else ""
        if difference:
            return f"difference of {self.label}{unit}; positive is better"
        return f"{self.label}{unit} {self.arrow}".strip()

    def _beside(self, value: float, size: float) -> str:
        """The value with the decimals that ``size`` would have, without a percent's unit."""
        if self.kind == "percent":
            return f"{100 * value:.1f}"
        if self.kind in ("number", "ratio") and 1e-4 <= size < 1e3:
            return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"
        return _WRITE[self.kind](value)

    def versus(self, value: Any, other: Any) -> tuple[str, str]:
        """How ``value`` compares with ``other``: the text, and ``better``, ``worse`` or an empty string."""
        a, b = finite(value), finite(other)
        if a is None or b is None:
            return "", ""
        if a == b:
            return "same", ""
        judged = "" if self.better is None else "better" if (a > b) == (self.better == "higher") else "worse"
        if self.kind in _LESS_MORE and a > 0 and b > 0:
            less, more = _LESS_MORE[self.kind]
            return f"{times(max(a, b) / min(a, b))} times {less if a < b else more}", judged
        if self.kind == "ratio":
            return "", ""
        return self.difference(a - b), judged

    @property
    def arrow(self) -> str:
        """Which way is better, as papers mark it."""
        return {"higher": "↑", "lower": "↓", None: ""}[self.better]


_KNOWN = [
    Measure("accuracy", "accuracy", "percent", "higher", "quality"),
    Measure("accuracy_seen", "accuracy, test nodes that were there in training", "percent", "higher", "quality"),
    Measure("accuracy_hidden", "accuracy, hidden test nodes", "percent", "higher", "quality"),
    Measure("accuracy_val", "accuracy on validation nodes", "percent", "higher", "quality"),
    Measure("uniform_accuracy", "mean accuracy of uniform sub-networks", "percent", "higher", "quality"),
    Measure("uniform_accuracy_bignas", "the same, trained from the start", "percent", "higher", "quality"),
    Measure("uniform_accuracy_late", "the same, after a late start", "percent", "higher", "quality"),
    Measure("smallest_accuracy", "accuracy of the smallest sub-network", "percent", "higher", "quality"),
    Measure("full_accuracy", "accuracy of the full network", "percent", "higher", "quality"),
    Measure("accuracy_smallest", "accuracy, smallest sub-network", "percent", "higher", "quality"),
    Measure("accuracy_full", "accuracy, full network", "percent", "higher", "quality"),
    Measure("score", "score before training", "number", "higher", "quality"),
    Measure("judged", "candidates judged", "count"),
    Measure("top5", "top-5 accuracy", "percent", "higher", "quality"),
    Measure("accuracy_std", "its standard deviation over seeds", "percent", None, "quality"),
    Measure("macro_f1", "macro F1", "percent", "higher", "quality"),
    Measure("mrr_at_10", "MRR@10", "percent", "higher", "retrieval"),
    Measure("recall_at_1", "recall@1", "percent", "higher", "retrieval"),
    Measure("recall_at_10", "recall@10", "percent", "higher", "retrieval"),
    Measure("ndcg_at_10", "NDCG@10", "percent", "higher", "retrieval"),
    Measure("code_mrr_at_10", "MRR@10, code to code", "percent", "higher", "retrieval"),
    Measure("code_recall_at_1", "recall@1, code to code", "percent", "higher", "retrieval"),
    Measure("code_recall_at_10", "recall@10, code to code", "percent", "higher", "retrieval"),
    Measure("code_ndcg_at_10", "NDCG@10, code to code", "percent", "higher", "retrieval"),
    Measure("recall_at_5", "recall@5", "percent", "higher", "retrieval"),
    Measure("median_rank", "median rank", "number", "lower", "retrieval"),
    Measure("mean_rank", "mean rank", "number", "lower", "retrieval"),
    Measure("mean_cosine", "mean cosine of two gallery items", "number", "lower", "retrieval"),
    Measure("nearest_similarity", "cosine of nearest gallery items", "number", "lower", "retrieval"),
    Measure("hubness", "hubness (skewness of occurrences among the first 10)", "number", "lower", "retrieval"),
    Measure("shift", "mean distance that items moved", "number", None, "retrieval"),
    Measure("target_similarity", "cosine of queries and what they look for", "number", "higher", "retrieval"),
    Measure("mrr", "MRR of nodes", "percent", "higher", "links"),
    Measure("hits_at_10", "hits@10 of nodes", "percent", "higher", "links"),
    Measure("precision_at_10", "precision@10 of nodes", "percent", "higher", "links"),
    Measure("f1_at_10", "F1@10 of nodes", "percent", "higher", "links"),
    Measure("link_hits_at_20", "hits@20 of links", "percent", "higher", "links"),
    Measure("link_hits_at_50", "hits@50 of links", "percent", "higher", "links"),
    Measure("link_hits_at_100", "hits@100 of links", "percent", "higher", "links"),
    Measure("pearson_recall_at_10", "correlation with recall@10", "number", None, "links"),
    Measure("pearson_hits_at_10", "correlation with hits@10", "number", None, "links"),
    Measure("pearson_ndcg_at_10", "correlation with NDCG@10", "number", None, "links"),
    Measure("pearson_precision_at_10", "correlation with precision@10", "number", None, "links"),
    Measure("pearson_f1_at_10", "correlation with F1@10", "number", None, "links"),
    Measure("pearson_mrr", "correlation with MRR", "number", None, "links"),
    Measure("spearman_recall_at_10", "rank correlation with recall@10", "number", None, "links"),
    Measure("correlation", "correlation with recall@10 of nodes", "number", "higher", "links"),
    Measure("correlation_recall", "correlation with recall@10 of nodes", "number", "higher", "links"),
    Measure("correlation_ndcg", "correlation with NDCG@10 of nodes", "number", "higher", "links"),
    Measure("correlation_hits", "correlation with hits@10 of nodes", "number", "higher", "links"),
    Measure("correlation_f1", "correlation with F1@10 of nodes", "number", "higher", "links"),
    Measure("agreement", "correlation with the exact concentration, one hop", "number", "higher", "links"),
    Measure("agreement_two_hops", "correlation with the exact concentration, two hops", "number", "higher", "links"),
    Measure("atc_against_tc", "correlation of approximated and exact concentration", "number", "higher", "links"),
    Measure("tc_train", "mean concentration of training links", "number", None, "links"),
    Measure("tc_test", "mean concentration of test links", "number", None, "links"),
    Measure("tc_shift", "concentration of training less that of test links", "number", None, "links"),
    Measure("size_of_shift", "size of that shift", "number", "lower", "links"),
    Measure("message_tc", "concentration as message passing sees it", "number", None, "links"),
    Measure("message_tc_before", "concentration of message passing, original weights", "number", None, "links"),
    Measure("message_tc_after", "concentration of message passing, new weights", "number", None, "links"),
    Measure("linear_probe", "linear probe accuracy", "percent", "higher", "quality"),
    Measure("knn_probe", "k-NN probe accuracy", "percent", "higher", "quality"),
    Measure("miou", "mean IoU", "percent", "higher", "quality"),
    Measure("pixel_accuracy", "pixel accuracy", "percent", "higher", "quality"),
    Measure("mse", "MSE", "number", "lower", "quality"),
    Measure("r2", "R²", "number", "higher", "quality"),
    Measure("nll", "NLL", "number", "lower", "calibration"),
    Measure("brier", "Brier score", "number", "lower", "calibration"),
    Measure("ece", "ECE", "number", "lower", "calibration"),
    Measure("adaptive_ece", "adaptive ECE", "number", "lower", "calibration"),
    Measure("frechet_pixels", "Fréchet distance, pixels", "number", "lower", "generation"),
    Measure("frechet_features", "Fréchet distance, classifier features", "number", "lower", "generation"),
    Measure("sliced_wasserstein", "sliced Wasserstein distance", "number", "lower", "generation"),
    Measure("mmd", "squared kernel MMD", "number", "lower", "generation"),
    Measure("precision", "precision", "percent", "higher", "generation"),
    Measure("recall", "recall", "percent", "higher", "generation"),
    Measure("density", "density", "number", "higher", "generation"),
    Measure("coverage", "coverage", "percent", "higher", "generation"),
    Measure("condition_agreement", "agreement with the condition", "percent", "higher", "generation"),
    Measure("classes_covered", "classes covered", "number", "higher", "generation"),
    Measure("modes", "modes covered", "number", "higher", "generation"),
    Measure("near_modes", "samples near a mode", "percent", "higher", "generation"),
    Measure("spread_ratio", "spread, ratio to the data", "ratio", None, "generation"),
    Measure("paired_mse", "squared distance to the teacher's fine solution", "number", "lower", "generation"),
    Measure("psnr", "PSNR on held-out views, dB", "number", "higher", "quality"),
    Measure("ssim", "SSIM on held-out views", "number", "higher", "quality"),
    Measure("nearest_distance", "distance to the nearest image of the prior", "number", "lower", "generation"),
    Measure("view_distance", "distance between views", "number", "higher", "generation"),
    Measure("view_entropy", "entropy of the nearest true views, nats", "number", "higher", "generation"),
    Measure("inception_quality", "entropy of a view's class, nats", "number", "lower", "generation"),
    Measure("inception_variety", "entropy of the classes of all views, nats", "number", "higher", "generation"),
    Measure("inception_gain", "gain of the latter over the former", "number", "higher", "generation"),
    Measure("particle_distance", "distance between particles", "number", "higher", "generation"),
    Measure("nfe", "network evaluations per sample", "count", "lower", "cost"),
    Measure("seconds_per_sample", "seconds per sample", "seconds", "lower", "cost"),
    Measure("seconds_per_view", "seconds per view", "seconds", "lower", "cost"),
    Measure("gt_weight", "weight of the labels", "number"),
    Measure("parameters", "parameters", "count", "lower", "cost"),
    Measure("bytes", "size", "bytes", "lower", "cost"),
    Measure("stored_bytes", "size as it is stored", "bytes", "lower", "cost"),
    Measure("compression", "times smaller than in float32", "ratio", "higher", "cost"),
    Measure("bits_per_weight", "bits for each compressed weight", "number", "lower", "cost"),
    Measure("sparsity", "weights that are zero", "percent", None, "cost"),
    Measure("perplexity", "perplexity", "number", "lower", "quality"),
    Measure("relative_passes", "forward passes, ratio to training all from the start", "ratio", "lower", "cost"),
    Measure("forward_gigaflops", "forward GFLOPs of training", "number", "lower", "cost"),
    Measure("flops", "FLOPs per sample", "count", "lower", "cost"),
    Measure("latency", "latency, batch of 64", "seconds", "lower", "cost"),
    Measure("latency_8", "latency, batch of 8", "seconds", "lower", "cost"),
    Measure("latency_ratio", "latency, ratio to the first", "ratio", "lower", "cost"),
    Measure("int8_latency_ratio", "latency in 8-bit integers, ratio to floats", "ratio", "lower", "cost"),
    Measure("sparse_latency_ratio", "latency when zeros are skipped, ratio to dense", "ratio", "lower", "cost"),
    Measure("sparse_single_ratio", "the same for a single sample", "ratio", "lower", "cost"),
    Measure("latency_whole", "latency, all nodes", "seconds", "lower", "cost"),
    Measure("latency_single", "latency, a single node", "seconds", "lower", "cost"),
    Measure("ratio_whole", "latency of all nodes, ratio to the first", "ratio", "lower", "cost"),
    Measure("ratio_single", "latency of a single node, ratio to the first", "ratio", "lower", "cost"),
    Measure("seconds", "seconds", "seconds", "lower", "cost"),
    Measure("samples", "samples", "count", None, "cost"),
    Measure("share_of_real_bytes", "share of the bytes of the real data", "percent"),
    Measure("distinct_trees", "distinct computation trees", "count"),
    Measure("tree_coverage", "nodes that the most frequent tenth of them covers", "percent"),
    Measure("topology_score", "topology score (members' distance to their hyperedge's mean)"),
    Measure("codes_used", "codes in use", "count"),
    Measure("code_perplexity", "perplexity of the codes in use"),
    Measure("assignment_entropy", "entropy of code assignments, nats"),
    Measure("cut_consistency", "cut consistency of the answers"),
    Measure("same_code", "nodes with the teacher's code", "percent"),
    Measure("auroc", "AUROC", "number", "higher", "quality"),
    Measure("ratio_teacher_right", "mean weight of the teacher over training, where it is right"),
    Measure("ratio_teacher_wrong", "mean weight of the teacher over training, where it is wrong"),
    Measure("final_ratio", "mean weight of the teacher at the end"),
    Measure("top1_agreement", "same answers as the teacher", "percent", "higher", "agreement"),
    Measure("features", "distance of the blocks' outputs", "number", "lower", "agreement"),
    Measure("worst_block", "distance in the worst block", "number", "lower", "agreement"),
    Measure(
        "int8_agreement", "same answers in 8-bit integers as in their simulation", "percent", "higher", "agreement"
    ),
    Measure("int8_agreement_float", "same answers in 8-bit integers as in floats", "percent", "higher", "agreement"),
    Measure("int8_difference", "largest difference of 8-bit logits, of the largest", "number", "lower", "agreement"),
    Measure("kl", "KL(teacher, student)", "number", "lower", "agreement"),
]
KNOWN: Mapping[str, Measure] = {m.name: m for m in _KNOWN}


def measure(name: str, higher_is_better: bool | None = None) -> Measure:
    """The measure called ``name``; an unknown one is a plain number whose label is its name.

    Args:
        name: as in a result.
        higher_is_better: overrules the direction, or gives it where the name is unknown.
    """
    found = KNOWN.get(name) or Measure(name, name.replace("_", " "))
    known, _, where = name.partition(" on ")
    if where and known in KNOWN:  # a measure on one of several networks
        found = replace(KNOWN[known], name=name, label=f"{KNOWN[known].label} on {where}")
    if higher_is_better is None:
        return found
    return Measure(found.name, found.label, found.kind, "higher" if higher_is_better else "lower", found.group)


@dataclass(frozen=True)
class Line:
    """One measure over all contestants."""

    measure: Measure
    values: list[str]
    versus: str
    judged: str


def contestants(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, list[Line]]]:
    """A result's rows, turned: the contestants' names, and lines by group of measures.

    With two contestants each line also says how the first compares with the second.
    """
    names = [str(row.get("who", number + 1)) for number, row in enumerate(rows)]
    keys = dict.fromkeys(k for row in rows for k, v in row.items() if k != "who" and finite(v) is not None)
    order = {name: n for n, name in enumerate(KNOWN)}
    groups: dict[str, list[Line]] = {}
    for key in sorted(keys, key=lambda k: order.get(k, len(order))):
        shown = measure(key)
        values = [row.get(key) for row in rows]
        versus, judged = shown.versus(*values) if len(rows) == 2 else ("", "")
        line = Line(shown, [shown.text(v) for v in values], versus, judged)
        groups.setdefault(shown.group, []).append(line)
    return names, groups


def _sign(text: str) -> str:
    if text.lstrip("-0.") == "" and text != "":  # a zero, rounded or not, has no sign
        return text.lstrip("-")
    return text if text.startswith("-") else f"+{text}"
