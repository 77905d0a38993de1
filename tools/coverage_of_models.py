"""Removes half of every group of the field's models with kddp_ext and with Torch-Pruning, and writes docs/models.md:

    pip install torchvision timm transformers torch-pruning
    python tools/coverage_of_models.py [model ...]

The models are those of tools/field_models.py. Each is measured in a process of its own, on one thread. docs/models.json
keeps the results; if models are named, only theirs are replaced. All of them take about an hour.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from field_models import FieldModel, Inputs, find, names
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kddp_ext

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "models.md", ROOT / "docs" / "models.json"
TABLES = re.compile(r"(?<=<!-- tables -->\n).*(?=<!-- end of tables -->)", re.DOTALL)
PACKAGES = ("kddp_ext", "torch", "torchvision", "timm", "transformers", "torch-pruning")
LIMIT = 60  # processor seconds of one measurement; Torch-Pruning does not end for some models
# Every neuron counts as inactive, so exactly half of each group goes.
HALF: dict[str, Any] = {"threshold": 2.0, "patience": 1, "maximum_share": 0.5}
EXACT: dict[str, Any] = {"compensate": False, "reconstruction_samples": 0}
HAS_STREAMS = "streams" in inspect.signature(kddp_ext.DynamicPruner).parameters

Result = dict[str, Any]


# --- kddp_ext


class Stopwatch:
    """Processor seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[stage] = time.process_time() - started


def prune_half(model: nn.Module, example: Inputs, **options: Any) -> dict[str, float]:
    """Remove half of the neurons of every group, chosen at random; return the processor seconds."""
    positional, keywords = example
    if keywords:
        options["example_kwargs"] = keywords
    draws = torch.Generator().manual_seed(1)
    options["criterion"] = lambda statistics, _: torch.rand(statistics.width, generator=draws)
    stopwatch = Stopwatch()
    with stopwatch("build"):
        pruner = kddp_ext.DynamicPruner(model, example_inputs=positional, **HALF, **options)
    with torch.no_grad():
        model.eval()(*positional, **keywords)
    pruner.activations.observe()
    with stopwatch("prune"):
        pruner.prune()
    pruner.close()
    return stopwatch.seconds


def share_of_kddp(case: FieldModel, **options: Any) -> Result:
    """Seconds and shares in training with Adam, with the pruner's default settings."""
    model, example = case.build(), case.inputs(0, False)
    before = size(model, example)
    return {**prune_half(model, example, optimizer=adam(model), **options), **gone(before, size(model, example))}


def error_of_kddp(case: FieldModel, **options: Any) -> Result:
    """The error of removing dead neurons without compensation, which shows whether anything else was removed."""
    model, example = precise(case)
    reference, labels = copy.deepcopy(model), label(copy.deepcopy(model))
    prune_half(model, example, copies=[labels], **EXACT, **options)
    zero_removed(reference, labels)
    return difference(case, reference, model)


def error_of_streams(case: FieldModel) -> Result:
    """The same for streams behind a LayerNorm, where removal is not exact, and what reconstruction makes of it."""
    result = error_of_kddp(case, streams="all")
    model, example = precise(case)
    labels = label(copy.deepcopy(model))
    prune_half(copy.deepcopy(model), example, copies=[labels], streams="all", **EXACT)
    zero_removed(model, labels)
    reference = copy.deepcopy(model)
    prune_half(model, example, streams="all")
    return {**result, "reconstructed": difference(case, reference, model)["change"]}


def adam(model: nn.Module) -> torch.optim.Adam:
    """Adam with gradients and moments, as in the middle of a training. They are zero; their sizes matter."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


# --- Torch-Pruning

# The layers that compute queries, keys and values, and the attributes of their module that follow the heads.
_PROJECTIONS = "query key value|q_proj k_proj v_proj|q_lin k_lin v_lin|q k v|qkv|qkv_proj"
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
_HEAD_WIDTHS = ("all_head_size", "inner_dim", "embed_dim", "attn_dim", "dim", "hidden_size")


def heads_of(module: nn.Module) -> dict[nn.Linear, int]:
    """The number of heads of the Linear layers that compute queries, keys and values in an attention module."""
    holders = [module, getattr(module, "config", None)]
    count = next((getattr(h, name) for h in holders for name in _HEAD_COUNTS if hasattr(h, name)), None)
    for group in _PROJECTIONS.split("|"):
        named = [getattr(module, name, None) for name in group.split()]
        layers = [layer for layer in named if isinstance(layer, nn.Linear)]
        if len(layers) == 1 and layers[0].out_features != 3 * layers[0].in_features:
            continue  # heads of unequal sizes in one layer
        if count and len(layers) == len(named):
            width = layers[0].out_features // count  # of one head, in the first of them
            return {layer: count if len(layers) == 1 else layer.out_features // width for layer in layers}
    return {}


def torch_pruning(model: nn.Module, example: Inputs, *, importance: str, relabel: bool = False) -> Result:
    """Prune at a ratio of 0.5, heads included, as its examples do; return the processor seconds.

    With `relabel`, the model is labelled before the step.
    """
    library = importlib.import_module("torch_pruning")
    if hasattr(getattr(model, "config", None), "use_cache"):
        model.config.use_cache = False  # with the caches it fails, or does not end
    output = output_of(model.eval(), example)
    classes = output.shape[-1] if output.dim() == 2 or example[0][0].dim() == 2 else output.shape[1]
    last = [m for m in model.modules() if classes in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))]
    attentions = {module: heads for module in model.modules() if (heads := heads_of(module))}
    counts = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    stopwatch = Stopwatch()
    with stopwatch("build"):
        pruner = library.pruner.BasePruner(
            model,
            (example[0], example[1]),
            importance=getattr(library.importance, importance)(),
            pruning_ratio=0.5,
            head_pruning_ratio=0.5,
            prune_num_heads=True,
            prune_head_dims=False,
            num_heads={layer: count for heads in attentions.values() for layer, count in heads.items()},
            ignored_layers=last,
            in_channel_groups={},
            out_channel_groups=counts,
            forward_fn=output_of,
        )
    if relabel:
        label(model)
    with stopwatch("prune"):
        pruner.step()
    for module, heads in attentions.items():
        update_heads(module, [pruner.num_heads[layer] for layer in heads], next(iter(heads)), packed=len(heads) == 1)
    if isinstance(getattr(model, "conv_proj", None), nn.Conv2d):
        model.hidden_dim = model.conv_proj.out_channels  # of torchvision's VisionTransformer
    return stopwatch.seconds


def update_heads(module: nn.Module, counts: list[int], layer: nn.Linear, *, packed: bool) -> None:
    """Give an attention module the sizes that Torch-Pruning leaves to its user."""
    width = layer.out_features // (3 if packed else 1)
    sizes = dict.fromkeys(_HEAD_COUNTS, counts[0]) | dict.fromkeys(_HEAD_WIDTHS, width)
    sizes["num_key_value_groups"] = counts[0] // min(counts)
    for name, value in sizes.items():
        if hasattr(module, name):
            setattr(module, name, value)


def share_of_torch_pruning(case: FieldModel) -> Result:
    model, example = case.build(), case.inputs(0, False)
    before = size(model, example)
    result = torch_pruning(model, example, importance="MagnitudeImportance")
    try:
        return {**result, **gone(before, size(model, example))}
    except Exception as error:
        left = sum(map(Tensor.numel, model.parameters()))
        told = f"does not run after the prune: {type(error).__name__}: {error}"
        return {**result, "parameters": 1 - left / before["parameters"], "of": before["parameters"], "failed": told}


def error_of_torch_pruning(case: FieldModel) -> Result:
    """The change of the outputs when the neurons that it removes were dead."""
    model, example = precise(case)
    reference = copy.deepcopy(model)
    torch_pruning(model, example, importance="RandomImportance", relabel=True)
    zero_removed(reference, model)
    originals = {**dict(reference.named_parameters(remove_duplicate=False)), **floating_buffers(reference)}
    for name, tensor in {**dict(model.named_parameters()), **floating_buffers(model)}.items():
        tensor.data = originals[name].data.flatten()[tensor.data.long()]
    return difference(case, reference, model)


# --- Which neurons were removed, and what that changed


def output_of(model: nn.Module, arguments: Inputs) -> Tensor:
    output = model(*arguments[0], **arguments[1])
    return output if isinstance(output, Tensor) else output.logits


def doubled(arguments: Inputs) -> Inputs:
    """The arguments with floating-point tensors as float64."""

    def double(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return tuple(map(double, arguments[0])), {name: double(tensor) for name, tensor in arguments[1].items()}


def floating_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def precise(case: FieldModel) -> tuple[nn.Module, Inputs]:
    """The model and its inputs in float64, with values that let errors show."""
    model, example = case.build().double(), doubled(case.inputs(0, False))
    spread_values(model, example)
    return model, example


def spread_values(model: nn.Module, example: Inputs) -> None:
    """Draw parameters that are constant at the start, and compute the statistics of BatchNorms, so that errors show.

    Zero biases, scales of 1 or 1e-6, a zero head and activations that vanish in a deep network would hide them.
    """
    generator = torch.Generator().manual_seed(2)
    for name, tensor in model.named_parameters():
        if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            if tensor.dim() > 1 and tensor.shape[-1] > 1:
                tensor.data.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                tensor.data.normal_(std=0.1, generator=generator)
            else:
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    norms = [module for module in model.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(*example[0], **example[1])


def label(model: nn.Module) -> nn.Module:
    """Give each entry of each parameter and buffer its index as its value, so that a prune shows what remains."""
    for tensor in [*model.parameters(), *floating_buffers(model).values()]:
        tensor.data = torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return model


def zero_removed(model: nn.Module, pruned_labels: nn.Module) -> None:
    """Zero the entries of the model's parameters that a prune of its labels has removed.

    Nothing enters or leaves the removed neurons then: they are dead for every input.
    """
    labels = dict(pruned_labels.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        kept = labels[name].data.flatten()
        if torch.equal(kept, kept.round()):  # the weight of an RMSNorm is rescaled; its channels are dead anyway
            alive = torch.zeros(parameter.numel(), dtype=parameter.dtype)
            alive[kept.long()] = 1
            parameter.data.mul_(alive.view(parameter.shape))


def difference(case: FieldModel, reference: nn.Module, pruned: nn.Module) -> Result:
    """The largest error relative to the largest output, and the change of all outputs relative to them.

    Other inputs than those of the pruning are used, of another shape where the model allows it.
    """
    for other in (True, False):
        arguments = doubled(case.inputs(3, other))
        try:
            with torch.no_grad():
                expected = output_of(reference.eval(), arguments)
            break
        except (AssertionError, RuntimeError, ValueError):
            if not other:  # the model allows one shape only
                raise
    with torch.no_grad():
        change = output_of(pruned.eval(), arguments) - expected
    # What all samples have in common, such as the last bias, tells nothing about the neurons.
    varying = expected - expected.mean(0)
    return {
        "error": float(change.abs().max() / expected.abs().max()),
        "change": float(change.norm() / expected.norm()),
        "varying": float(varying.norm() / expected.norm()),
        "inputs": "×".join(map(str, arguments[0][0].shape[-2:])),
    }


def size(model: nn.Module, example: Inputs) -> dict[str, int]:
    """Parameters, and multiply-accumulates of the forward pass in evaluation mode."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(*example[0], **example[1])
    return {"parameters": sum(map(Tensor.numel, model.parameters())), "macs": counter.get_total_flops() // 2}


def gone(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    return {name: 1 - after[name] / before[name] for name in before} | {"of": before["parameters"]}


# --- One model


def measure(name: str) -> Iterator[tuple[str, Result]]:
    """The measurements of a model by name, each as soon as it is there."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warm_up()
    case = find(name)
    parts: dict[str, Callable[[FieldModel], Result]] = {"kddp_ext": share_of_kddp, "kddp_ext dead": error_of_kddp}
    if HAS_STREAMS:
        parts["streams"] = lambda case: share_of_kddp(case, streams="all")
        parts["streams dead"] = error_of_streams
    parts |= {"Torch-Pruning": share_of_torch_pruning, "Torch-Pruning dead": error_of_torch_pruning}
    signal.signal(signal.SIGPROF, stop)
    failed: set[str] = set()
    for part, function in parts.items():
        if part.removesuffix(" dead") in failed:
            continue
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        try:
            result = function(case)
        except Exception as error:
            told = str(error).strip() or "no message"
            refused = isinstance(error, kddp_ext.UnsupportedModelError)
            result = {"refused": told} if refused else {"failed": f"{type(error).__name__}: {told}"}
            failed.add(part)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        yield part, {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in result.items()}


def stop(*_: object) -> None:
    raise TimeoutError(f"not ready after {LIMIT} s")


def warm_up() -> None:
    """Let both tools import and cache what their first use needs."""
    example: Inputs = (torch.randn(2, 4),), {}
    prune_half(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), example)
    torch_pruning(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), example, importance="MagnitudeImportance")


def measure_apart(name: str) -> dict[str, Result]:
    """The same in another process, which may crash."""
    command = [sys.executable, __file__, "--measure", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    results: dict[str, Result] = {}
    for line in done.stdout.splitlines():
        results |= json.loads(line) if line.startswith("{") else {}
    if done.returncode:
        print(f"{name}: its process ended with {done.returncode}", file=sys.stderr)
    return results


# --- The tables

_HEAD = (
    *("model", "parameters (M)", "parameters gone (%)", "MACs gone (%)", "largest error", "inputs", "build (s)"),
    *("prune (s)", "TP: parameters gone (%)", "TP: MACs gone (%)", "TP: outputs change (%)", "TP: build (s)"),
    "TP: prune (s)",
)
_STREAMS = (
    *("model", "parameters gone (%)", "MACs gone (%)", "outputs change (%)", "with reconstruction (%)"),
    *("TP: outputs change (%)", "build (s)", "prune (s)"),
)
_NOTHING: Result = {}


def cell(result: Result, key: str, form: str) -> str:
    """A figure, or why there is none. `form` is that of `format`, or % for the percentage of a share."""
    if key not in result:
        return next((word for word in ("refused", "failed") if word in result), "")
    if form == "%":
        return f"{100 * result[key]:.0f}"
    return format(result[key], form) if result[key] else "0"


def row(name: str, parts: dict[str, Result]) -> list[str]:
    ours, dead, theirs, changed = (
        parts.get(part, _NOTHING) for part in ("kddp_ext", "kddp_ext dead", "Torch-Pruning", "Torch-Pruning dead")
    )
    of = next((f"{part['of'] / 1e6:.1f}" for part in (ours, theirs) if "of" in part), "")
    cells = [name, of, cell(ours, "parameters", "%"), cell(ours, "macs", "%")]
    cells += [cell(dead, "error", ".0e"), dead.get("inputs", ""), cell(ours, "build", ".2f")]
    cells += [cell(ours, "prune", ".2f"), cell(theirs, "parameters", "%"), cell(theirs, "macs", "%")]
    return [*cells, cell(changed, "change", "%"), cell(theirs, "build", ".2f"), cell(theirs, "prune", ".2f")]


def row_of_streams(name: str, parts: dict[str, Result]) -> list[str]:
    ours, dead, changed = (parts.get(part, _NOTHING) for part in ("streams", "streams dead", "Torch-Pruning dead"))
    cells = [name, cell(ours, "parameters", "%"), cell(ours, "macs", "%"), cell(dead, "change", "%")]
    cells += [cell(dead, "reconstructed", "%"), cell(changed, "change", "%")]
    return [*cells, cell(ours, "build", ".2f"), cell(ours, "prune", ".2f")]


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def means(models: dict[str, dict[str, Result]]) -> str:
    told = []
    for part in ("kddp_ext", "streams", "Torch-Pruning"):
        shares = [parts[part].get("parameters", 0.0) for parts in models.values() if part in parts]
        if shares:
            gone = [share for share in shares if share]
            told.append(f"{part} {100 * sum(shares) / len(models):.1f}% ({len(gone)} of {len(models)} models)")
    return f"Mean share of parameters gone, 0 where nothing is: {', '.join(told)}.\n"


def messages(models: dict[str, dict[str, Result]]) -> str:
    """The first line of each refusal and failure."""
    lines = []
    for name, parts in models.items():
        for part, result in parts.items():
            text = result.get("refused", result.get("failed"))
            if text:
                lines.append(f"- {name}, {part}: `{text.splitlines()[0][:300].replace('`', chr(39))}`\n")
    return "".join(lines)


def gain_of_streams(parts: dict[str, Result]) -> float:
    """What streams="all" removes beyond the default; 0 for models without a LayerNorm behind a stream."""
    return float(
        parts.get("streams", _NOTHING).get("parameters", 0.0) - parts.get("kddp_ext", _NOTHING).get("parameters", 0.0)
    )


def page(results: dict[str, Any]) -> str:
    models = results["models"]
    parts = [table(_HEAD, [row(name, models[name]) for name in models]), means(models)]
    more = [name for name in models if gain_of_streams(models[name]) > 0]
    if more:
        parts.append(table(_STREAMS, [row_of_streams(name, models[name]) for name in more]))
    parts += [messages(models), f"With {', '.join(f'{k} {v}' for k, v in results['versions'].items())}.\n"]
    return "\n".join(["", *filter(None, parts)])


def write(results: dict[str, Any]) -> None:
    """Write both files; the JSON has one line for each model."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(parts)}" for name, parts in results["models"].items())
    RESULTS.write_text(f'{{"versions": {json.dumps(results["versions"])},\n"models": {{\n{lines}\n}}}}\n')
    PAGE.write_text(TABLES.sub(lambda _: page(results), PAGE.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", help="default: all")
    parser.add_argument("--measure", metavar="MODEL", help="measure one model in this process and print the results")
    options = parser.parse_args()
    if options.measure:
        for part, result in measure(options.measure):
            print(json.dumps({part: result}), flush=True)
        return 0
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    results["versions"] = {name: version(name) for name in PACKAGES} | {"on": platform.machine()}
    for name in options.models or names():
        results["models"][name] = measure_apart(name)
        results["models"] = {name: results["models"][name] for name in names() if name in results["models"]}
        write(results)
        print(" | ".join(row(name, results["models"][name])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
