"""`megaft estimate`: memory of each GPU, speed and duration of a run, computed without a GPU.

It uses closed formulas and builds nothing, so it takes a second for any size. docs/estimates.md shows its accuracy.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megaft.base.hardware import GIB, GPUS, RESERVED_BYTES, Gpu, data_sheet_flops, published_utilizations
from megaft.commands.estimate.attention import attention_kernel, attention_note
from megaft.commands.estimate.changes import MAX_TENSOR_PARALLEL_SIZE, MAX_TIMES_RANKS, changes
from megaft.commands.estimate.config import EstimateConfig
from megaft.commands.estimate.recipe import Recipe
from megaft.commands.estimate.roofline import predicted_rates, state_bytes_of
from megaft.config.deepspeed_json import ResolvedSettings, read_deepspeed_json
from megaft.config.train import bytes_per_parameter
from megaft.weights.dimensions import flops_per_token, num_elements
from megaft.weights.families import attention_dropout_of, dimensions_of
from megaft.weights.presets import configuration, source_of

SECONDS_PER_DAY = 86_400
RECOMPUTED = 3 / 4
"""Share of a step's FLOPs that are model FLOPs with activation checkpointing."""
NOTHING_FITS = (
    "None of the changes tried makes it fit: a smaller micro-batch, activation checkpointing, a higher ZeRO stage, "
    f"offloading, tensor parallelism up to {MAX_TENSOR_PARALLEL_SIZE}, and up to {MAX_TIMES_RANKS} times the ranks. "
    "Use GPUs with more memory (--hardware), a shorter context, or a smaller model."
)


def main(config: EstimateConfig) -> int:
    """Print the estimate and return 0.

    Raises:
        UserError: Training would refuse a setting, the DeepSpeed JSON or the model's configuration.
    """
    from megaft.base.files import to_json

    answer = estimate(config)
    print(to_json(answer) if config.json else "\n".join(lines(answer)))
    return 0


def estimate(config: EstimateConfig) -> dict[str, Any]:
    """Return the estimate as JSON values.

    Raises:
        UserError: As in `main`.
    """
    recipe = recipe_of(config)
    footprint = recipe.footprint()
    setup, gpu = footprint.setup, GPUS[config.hardware]
    available = gpu.memory_bytes - RESERVED_BYTES
    fits = footprint.peak_bytes <= available
    fitting_changes = [] if fits else changes(recipe, available)
    return {
        "fits": fits,
        "peak_bytes": footprint.peak_bytes,
        "available_bytes": available,
        "hardware": gpu.name,
        "peak_moment": footprint.peak_phase,
        "components": footprint.phases[footprint.peak_phase],
        "moments": {name: sum(parts.values()) for name, parts in footprint.phases.items()},
        "states": asdict(footprint.states),
        "activations": asdict(footprint.activations),
        "offloaded_bytes": footprint.states.host,
        "changes": [asdict(change) for change in fitting_changes],
        "parameters": recipe.dims.num_parameters,
        "parameters_of_a_rank": num_elements(recipe.work(setup).weights),
        "world_size": recipe.world_size,
        "data_parallel_size": recipe.num_data_ranks,
        "tensor_parallel_size": recipe.tensor_parallel_size,
        "zero_stage": setup.zero_stage,
        "dtype": setup.dtype,
        "has_dtype": gpu.has_bf16 or setup.dtype != "bfloat16",
        "global_batch_size": setup.global_batch_size,
        "micro_batch_size": setup.micro_batch_size,
        "gradient_accumulation_steps": setup.gradient_accumulation_steps,
        "checkpoint_bytes": recipe.dims.num_parameters * bytes_per_parameter(setup.optim),
        "export_bytes": recipe.dims.num_parameters * 4,
        **speed(recipe, setup.dtype, gpu, config.tokens),
        **prediction(recipe, setup, gpu, attention_settings(config, recipe, setup)),
    }


def recipe_of(config: EstimateConfig) -> Recipe:
    """Return the recipe of the settings, reading the model's configuration and the DeepSpeed JSON."""
    return Recipe(
        dims=dimensions_of(configuration(config.model), config.dropout, source_of(config.model)),
        deepspeed=read_deepspeed_json(config.deepspeed_config),
        context_length=config.context_length,
        world_size=config.world_size,
        tensor_parallel_size=config.tensor_parallel_size,
        is_megatron=config.backend == "megatron",
        is_recomputed=config.activation_checkpointing,
        optim=config.optim,
    )


def speed(recipe: Recipe, dtype: str, gpu: Gpu, tokens: float | None) -> dict[str, Any]:
    """Return the FLOPs per token, and the throughput at published shares (MFU) of the GPU's peak.

    The rates are null in float32, for which no shares are published, and in bf16 on a GPU without bf16.
    """
    dims, peak = recipe.dims, data_sheet_flops(gpu.name)
    work = flops_per_token(dims.num_parameters, dims.num_layers, dims.width, recipe.context_length)
    result: dict[str, Any] = dict.fromkeys(("mfu", "mfu_gpu", "mfu_sources", "tokens_per_second", "days"))
    result |= {"flops_per_token": work, "peak_flops": peak}
    if dtype == "float32" or peak is None or (dtype == "bfloat16" and not gpu.has_bf16):
        return result
    shares = published_utilizations(gpu.name)
    useful = RECOMPUTED if recipe.is_recomputed else 1.0
    mfu = [min(share.lowest for share in shares) * useful, max(share.highest for share in shares) * useful]
    rates = [recipe.world_size * peak * share / work for share in mfu]
    days = [tokens / rate / SECONDS_PER_DAY for rate in rates] if tokens else None
    result["mfu_gpu"] = shares[0].gpu
    sources = [f"{share.gpu}, {share.lowest:.1%} to {share.highest:.1%}: {share.source}" for share in shares]
    return result | {"mfu": mfu, "mfu_sources": sources, "tokens_per_second": rates, "days": days}


def attention_settings(config: EstimateConfig, recipe: Recipe, setup: ResolvedSettings) -> dict[str, Any]:
    """Return the settings on which the attention kernel depends besides the GPU."""
    source = source_of(config.model)
    dropout = config.dropout
    if dropout is None:
        dropout = attention_dropout_of(configuration(config.model), source)
    has_mask = config.attend_within_documents
    return {"dtype": setup.dtype, "has_mask": has_mask, "dropout": dropout, "head_width": recipe.dims.head_width}


def prediction(recipe: Recipe, setup: ResolvedSettings, gpu: Gpu, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the attention kernel, a note about a faster one, and the predicted throughput (None in float32)."""
    kernel = attention_kernel(gpu.capability, **settings)
    can_predict = setup.dtype == "float16" or (setup.dtype == "bfloat16" and gpu.has_bf16)
    ranks, work = recipe.num_data_ranks, recipe.work(setup)
    state_bytes, is_compiled = state_bytes_of(work, setup, ranks), not recipe.is_megatron and setup.zero_stage < 3
    rates = predicted_rates(work, gpu, kernel, state_bytes, is_compiled) if can_predict else None
    return {
        "attention_kernel": kernel,
        "attention_note": attention_note(gpu.capability, **settings),
        "predicted_tokens_per_second": None if rates is None else [ranks * rate for rate in rates],
    }


def lines(answer: dict[str, Any]) -> list[str]:
    """Return the lines of the estimate as text."""
    verdict = "fits" if answer["fits"] else "does NOT fit"
    summary = (
        "{parameters:,} parameters ({parameters_of_a_rank:,} on a rank before ZeRO); ZeRO {zero_stage}, {dtype}; "
        "{data_parallel_size} data x {tensor_parallel_size} tensor ranks; global batch {global_batch_size} = "
        "{micro_batch_size} x {gradient_accumulation_steps} x {data_parallel_size}".format(**answer)
    )
    rows = [f"  {name:<16} {size / GIB:9.2f} GiB" for name, size in answer["components"].items() if size]
    peak, free = answer["peak_bytes"] / GIB, answer["available_bytes"] / GIB
    text = [summary, "", f"On each GPU at the peak ({answer['peak_moment']}):", *rows]
    text += [f"  {'total':<16} {peak:9.2f} GiB, {verdict} in the {free:.2f} GiB of the {answer['hardware']}"]
    if answer["offloaded_bytes"]:
        text += [f"  {'on the host':<16} {answer['offloaded_bytes'] / GIB:9.2f} GiB per rank"]
    if not answer["has_dtype"]:
        text += [f"The {answer['hardware']} does NOT compute in bf16: use fp16, as ds_configs/zero1_fp16.json does."]
    if not answer["fits"]:
        text += ["", "It fits with:" if answer["changes"] else NOTHING_FITS]
        text += [f"  {', '.join(change['settings'])} ({_sizes(change)})" for change in answer["changes"]]
    return [*text, "", *_speed_lines(answer), *_prediction_lines(answer), _disk_line(answer)]


def _sizes(change: dict[str, Any]) -> str:
    host = change["offloaded_bytes"]
    return f"{change['peak_bytes'] / GIB:.2f} GiB" + (
        f", and {host / GIB:.2f} GiB per rank on the host" if host else ""
    )


def _speed_lines(answer: dict[str, Any]) -> list[str]:
    work = f"{answer['flops_per_token'] / 1e9:.4g} GFLOP per token"
    if answer["tokens_per_second"] is None:
        return [f"{work}; no speed is estimated for {answer['dtype']} on the {answer['hardware']}."]
    low, high = answer["tokens_per_second"]
    when = "" if answer["fits"] else "if it did fit, "
    text = [f"{work}; {when}{low:,.0f} to {high:,.0f} tokens/s in total, at an MFU of {_range(answer['mfu'])},"]
    text += [f"as published for {_kinds(answer)}:", *(f"  {source}" for source in answer["mfu_sources"])]
    if answer["days"]:
        text.append(f"{when}{answer['days'][1]:.3g} to {answer['days'][0]:.3g} days for the tokens given")
    return text


def _prediction_lines(answer: dict[str, Any]) -> list[str]:
    note = f": {answer['attention_note']}" if answer["attention_note"] else "."
    text = [f"Attention runs torch's {answer['attention_kernel']} kernel{note}"]
    if rates := answer["predicted_tokens_per_second"]:
        when = "" if answer["fits"] else "if it did fit, "
        what = "predicted from FLOPs and memory traffic, without communication"
        text += [f"{when}{rates[0]:,.0f} tokens/s in total {what} ({rates[1]:,.0f} in a short burst)."]
    return text


def _kinds(answer: dict[str, Any]) -> str:
    """Return the GPU on which the shares of peak throughput were measured, for the text."""
    kind, hardware = answer["mfu_gpu"], answer["hardware"]
    return kind if kind in hardware else f"{kind}; no published MFU for the {hardware}"


def _range(shares: list[float]) -> str:
    return f"{shares[0]:.0%} to {shares[1]:.0%}"


def _disk_line(answer: dict[str, Any]) -> str:
    return f"A checkpoint is {answer['checkpoint_bytes'] / GIB:.2f} GiB, the export {answer['export_bytes'] / GIB:.2f}."
